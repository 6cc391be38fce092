"""Groups of a pool's entries that have limits of their own. Pure, like `pool.lifecycle`, which keeps them.

A group knows its members, not which of them are idle: members come and go seldom, and are borrowed often. Its idle
ones are looked for, among its members only, when room is needed or the group is over a limit.
"""

from collections.abc import Container, Sequence
from typing import Literal

from pool.config import GroupLimit, PoolConfig
from pool.entry import Close, Entry, says_busy

Limit = Literal["count", "weight", "starting", "max_backends"]
"""What keeps a waiter out: a field of its group's `GroupLimit`, or the cap of the whole pool."""


class Group:
    """The live entries of one group, and how many backends have left it and are not gone yet."""

    __slots__ = ("closing", "members")

    def __init__(self) -> None:
        self.members: dict[Entry, None] = {}
        self.closing = 0

    @property
    def total(self) -> int:
        """Backends that are alive or being made: what ``count`` caps."""
        return len(self.members) + self.closing

    @property
    def weight(self) -> int:
        """Bytes that the live members hold, as last measured."""
        return sum(map(_weigh, self.members))

    @property
    def starting(self) -> int:
        """Members that have no backend yet. The check of one that exists starts nothing."""
        return sum(1 for entry in self.members if entry.backend is None)

    @property
    def spare(self) -> list[Entry]:
        """Idle members that may leave, longest idle first."""
        found = [entry for entry in self.members if entry.state == "idle" and not says_busy(entry.backend)]
        return sorted(found, key=lambda entry: entry.idle_since)

    def make_way(self, limit: GroupLimit, given: int = 0) -> tuple[list[Entry], Limit | None]:
        """Return who has to leave so that one more fits, or the limit that keeps it out even then.

        *given*: places that can be had without anybody leaving. Nothing is changed here.
        """
        if limit.starting is not None and self.starting >= limit.starting:
            return [], "starting"
        leaving: list[Entry] = []
        spare: list[Entry] | None = None
        if limit.weight is not None and (weight := self.weight) >= limit.weight:
            spare = self.spare
            for entry in spare:
                if weight >= limit.weight and _weigh(entry):
                    leaving.append(entry)
                    weight -= _weigh(entry)
            if weight >= limit.weight:
                return [], "weight"
        if self.total >= limit.count and not leaving and not given:
            leaving = (self.spare if spare is None else spare)[:1]
            if not leaving:
                return [], "count"
        return leaving, None

    def over(self, limit: GroupLimit, leaving: Container[Entry]) -> list[Entry]:
        """Return idle members that have to leave, besides those *leaving* already, to get down to the limits."""
        excess = len(self.members) - limit.count
        weight = 0 if limit.weight is None else self.weight
        most = 0 if limit.weight is None else limit.weight
        if excess <= 0 and weight <= most:
            return []
        found = []
        spare = self.spare
        for entry in spare:
            if entry in leaving:
                excess -= 1
                weight -= _weigh(entry)
        for entry in spare:
            if entry not in leaving and (excess > 0 or (weight > most and _weigh(entry))):
                found.append(entry)
                excess -= 1
                weight -= _weigh(entry)
        return found

    @property
    def counts(self) -> dict[str, int]:
        """Counts for statistics and error messages."""
        return {
            "total": self.total,
            "busy": sum(1 for entry in self.members if entry.users),
            "idle": sum(1 for entry in self.members if entry.state == "idle"),
            "starting": self.starting,
            "weight": self.weight,
        }


class Groups(dict[str, Group]):
    """Groups by name: those that have a member, or a backend that is not gone yet.

    ``closing`` counts all backends that have left the pool and are not gone yet, those of no group too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.closing = 0

    def add(self, entry: Entry) -> None:
        """Count a new entry."""
        if entry.group is not None:
            self.setdefault(entry.group, Group()).members[entry] = None

    def discard(self, entry: Entry) -> None:
        """An entry is not live any more."""
        if entry.group is not None and (group := self.get(entry.group)) is not None:
            group.members.pop(entry, None)
            self._prune(entry.group)

    def count_closing(self, name: str | None, step: int) -> None:
        """Count a backend of this group, or of none, that has left and is not gone yet; *step* -1: it is gone."""
        self.closing += step
        self._count_closing(name, step)

    def displace(self, entry: Entry, groups: list[str | None]) -> None:
        """Have a new entry wait until backends of these groups are gone.

        It stands for one of them, of its own group if there is such a one; the others still count.
        """
        entry.displaced = tuple(groups)
        self._count_displaced(entry, 1)

    def made_way(self, entry: Entry) -> None:
        """What the entry had to wait for is gone."""
        self._count_displaced(entry, -1)
        entry.displaced = ()

    def _count_displaced(self, entry: Entry, step: int) -> None:
        others = list(entry.displaced)
        self.closing += step * max(0, len(others) - 1)
        if entry.group in others:
            others.remove(entry.group)
        for group in others:
            self._count_closing(group, step)

    def _count_closing(self, name: str | None, step: int) -> None:
        if name is not None:
            self.setdefault(name, Group()).closing += step
            self._prune(name)

    def make_way(
        self, name: str | None, config: PoolConfig, closes: Sequence[Close] = ()
    ) -> tuple[list[Close], Limit | None]:
        """Return whose place one more of this group can have, if it needs one, or the limit that keeps it out.

        *closes*: backends that are about to be closed anyway.
        """
        limit = config.groups.get(name) if name is not None else None
        group = self.get(name) if name is not None else None
        if limit is None or group is None:
            return [], None
        given = [close for close in closes if close.entry.group == name]
        victims, forbidden = group.make_way(limit, len(given))
        if given and not victims and forbidden is None and group.total >= limit.count:
            return given[:1], None
        return [Close(entry, entry.backend) for entry in victims], forbidden

    def full(self, name: str | None, config: PoolConfig) -> str:
        """Say which limit of the group keeps one more out; empty when none does."""
        forbidden = self.make_way(name, config)[1]
        if name is None or forbidden is None:
            return ""
        told = ", ".join(f"{what} {n}" for what, n in self[name].counts.items())
        return f"group {name!r} is at {forbidden}={getattr(config.groups[name], forbidden)} ({told}), the pool is not"

    def over(self, config: PoolConfig, leaving: Sequence[Entry]) -> list[Entry]:
        """Return idle entries by which groups are over their limits, besides those *leaving* already."""
        limited = [(group, limit) for name, group in self.items() if (limit := config.groups.get(name)) is not None]
        if not limited:
            return []
        known = set(leaving)
        return [entry for group, limit in limited for entry in group.over(limit, known)]

    def counts(self, config: PoolConfig) -> dict[str, dict[str, int]]:
        """Counts of each group that has limits or backends."""
        return {name: (self.get(name) or Group()).counts for name in {**config.groups, **self}}

    def _prune(self, name: str) -> None:
        group = self[name]
        if not group.members and not group.closing:
            del self[name]


def _weigh(entry: Entry) -> int:
    return 0 if entry.backend is None else entry.backend.weight
