"""The life of a pooled backend, and every decision about it. Pure: no clock, no threads, no IO.

`Lifecycle` holds the entries. Each of its methods takes what happened and ``now`` (seconds, monotonic), changes the
state, and appends to ``effects`` what the driver (`pool.manager`) has to do: connect, close, wake somebody up.
The caller serialises the calls with one lock and carries the effects out after letting go of it.

Idle entries sit in one map ordered by the time of their release. Its front is both the least recently used one and
the next to expire, so a sweep costs what it evicts, and a busy entry cannot be evicted because it is not in there.
Limits of groups are `pool.groups`' business; who waits for room stands in `pool.room`.
"""

import random
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from pool.config import PoolConfig
from pool.entry import Close, Connect, Effects, Entry, Event, Identity, Waiter, Wake, says_busy
from pool.errors import BackendClosed, BackendUnavailable, PoolError
from pool.failures import FailureMemory, came_too_late, for_each_waiter
from pool.groups import Groups, Limit
from pool.invariants import check
from pool.room import Room, send_away
from pool.stats import Counters


class Lifecycle:
    """Entries, waiters and remembered failures of one pool."""

    def __init__(self, config: PoolConfig, *, jitter: Callable[[], float] = random.random) -> None:
        self.config = config
        self._jitter = jitter  # -> [0, 1)
        self.entries: dict[Identity, Entry] = {}  # at most one live entry per identity
        self.idle: OrderedDict[Entry, None] = OrderedDict()
        self.outside: set[Entry] = set()  # keyless or retired: alive, but nobody finds them by identity
        self.groups = Groups()  # who is in which, and all that left the pool and is not gone yet: it still counts
        self.room = Room()
        self.failed = FailureMemory(jitter)
        self.counters = Counters()
        self.shut = False

    # -- acquire

    def acquire_warm(self, identity: Identity, override: dict[str, Any] | None, now: float) -> Entry | None:
        """Take a usable entry at once, or return None: `acquire` then finds out why. The hot path."""
        entry = self.entries.get(identity)
        if entry is None or entry.override != override or now >= entry.expires or self.shut:
            return None
        if entry.state == "idle":
            if now - entry.idle_since >= self.config.check_after or not entry.backend.usable:
                return None
            del self.idle[entry]
            entry.busy_since = now
        elif (
            entry.state != "busy"
            or entry.waiters
            or not entry.backend.usable
            or (entry.max_users is not None and entry.users >= entry.max_users)
        ):
            return None
        entry.state = "busy"  # by `TRANSITIONS`: `Entry.apply` would look it up
        entry.history.append("acquire")
        entry.users += 1
        entry.uses += 1
        self.counters.hits += 1
        return entry

    def acquire(self, waiter: Waiter, now: float, effects: Effects) -> None:
        """Serve the waiter now, or put it where it will be served; raise what is already known to fail."""
        if self.shut:
            raise BackendClosed("the pool is closed")
        if waiter.pooled:
            entry = self.entries.get(waiter.identity)
            if entry is not None and not self._stale(entry, waiter, now, effects):
                self._join(entry, waiter, now, effects)
                return
            if (error := self.failed.fresh(waiter.identity, waiter.config, now)) is not None:
                self._fill_room(now, effects)  # a retired entry may have sent its waiters there
                raise error
        self.room.append(waiter)
        self._fill_room(now, effects)

    def _stale(self, entry: Entry, waiter: Waiter, now: float, effects: Effects) -> bool:
        """Retire the entry if this waiter cannot use it: changed config, lost backend, end of its lifetime."""
        if entry.config != waiter.config:
            self._retire(entry, "config", now, effects)
            return True
        if entry.state == "connecting" or (now < entry.expires and entry.backend.usable):
            return False
        self._send_on(entry, now, effects)
        return True

    def _send_on(self, entry: Entry, now: float, effects: Effects) -> None:
        """Retire the entry; who waits for it gets a new one, before all who came later."""
        self.room.send_ahead(entry.waiters)
        entry.waiters.clear()
        self._retire(entry, "lifetime" if entry.backend.usable else "lost", now, effects)

    def _join(self, entry: Entry, waiter: Waiter, now: float, effects: Effects) -> None:
        waiter.warm = entry.backend is not None
        entry.waiters.append(waiter)
        if entry.state == "idle" and now - entry.idle_since >= self.config.check_after:
            del self.idle[entry]
            entry.apply("check")
            entry.preparing, entry.began = True, now
            effects.append(Connect(entry))
        else:
            self._serve(entry, now, effects)

    def _make_room(self, waiter: Waiter, now: float, effects: Effects) -> Limit | None:
        """Start a new entry for the waiter, at the cost of idle ones if need be. Returns the limit that forbids it."""
        leaving, forbidden = self._leaving(waiter.group, effects)
        if forbidden is not None:
            return forbidden
        self.room.remove(waiter)
        entry = Entry(waiter.identity, waiter.config, waiter.override, now, pooled=waiter.pooled, group=waiter.group)
        entry.preparing = True
        entry.waiters.append(waiter)
        self._displace(entry, leaving, now, effects)
        self.groups.add(entry)
        if waiter.pooled:
            self.entries[waiter.identity] = entry
            self._gather(entry)
        else:
            self.outside.add(entry)
        effects.append(Connect(entry, tuple(close.backend for close in leaving)))
        return None

    def _leaving(self, group: str | None, effects: Effects) -> tuple[list[Close], Limit | None]:
        """Return whose place one more of the group can have, or the limit that forbids it.

        Backends that are to be closed anyway come first, then those that were idle for longest: of the same group if
        it is the group that is full.
        """
        closes = [effect for effect in effects if isinstance(effect, Close)]
        leaving, forbidden = self.groups.make_way(group, self.config, closes)
        if leaving or forbidden is not None or self.total < self.config.max_backends:
            return leaving, forbidden
        if closes:
            return closes[:1], None
        victim = next((entry for entry in self.idle if not says_busy(entry.backend)), None)
        return ([], "max_backends") if victim is None else ([Close(victim, victim.backend)], None)

    def _displace(self, entry: Entry, leaving: list[Close], now: float, effects: Effects) -> None:
        """Have the new entry close these first. It stands for one of them; the others count until they are gone."""
        for close in leaving:
            if close.entry.state == "closed":
                effects[:] = [effect for effect in effects if effect is not close]
                self.groups.count_closing(close.entry.group, -1)
            else:
                self.counters.tell("evicted", close.entry, "lru", now - close.entry.idle_since, effects)
                self._drop(close.entry)
        self.groups.displace(entry, [close.entry.group for close in leaving])

    def made_way(self, entry: Entry, now: float, effects: Effects) -> None:
        """What an entry had to close before it may connect is gone."""
        if entry.displaced:
            self.groups.made_way(entry)
            self._fill_room(now, effects)

    def _gather(self, entry: Entry) -> None:
        """Who waits for room for this very backend needs none of its own any more."""
        entry.waiters.extend(
            self.room.take(lambda w: w.pooled and w.identity == entry.identity and w.config == entry.config)
        )

    def give_up(self, waiter: Waiter, phase_timeout: float | None, now: float, effects: Effects) -> Entry | None:
        """Stop waiting. Returns the entry if it was granted in the meantime, else raises.

        *phase_timeout* is the number of seconds that were waited, or None for a cancelled caller: then nothing is
        raised, and an entry that was granted meanwhile is released.
        """
        if waiter.entry is not None:
            entry = waiter.entry
            if phase_timeout is None:
                waiter.entry = None  # a caller can go away twice: its loop is closed, then its coroutine is collected
                self.release(entry, now, effects)
            return entry
        if waiter.error is not None:
            if phase_timeout is None:
                return None
            raise waiter.error
        phase = self._remove(waiter)
        if phase_timeout is None:
            return None
        limit = self.groups.full(waiter.group, self.config) or f"max_backends={self.config.max_backends}"
        raise came_too_late(waiter, phase, phase_timeout, limit, self.counts)

    def _remove(self, waiter: Waiter) -> str:
        if waiter in self.room:
            self.room.remove(waiter)
            return "room"
        for entry in (self.entries.get(waiter.identity), *self.outside):
            if entry is not None and waiter in entry.waiters:
                entry.waiters.remove(waiter)
                return "connect" if entry.preparing else "turn"
        return "turn"

    # -- release and service

    def release_warm(self, entry: Entry, now: float) -> bool:
        """One user is done, and nothing follows from it; False: `release` then sees to what does. The hot path."""
        if entry.state != "busy" or not entry.pooled or now >= entry.expires or self.shut:
            return False
        if entry.waiters or self.room.lines:
            return False
        entry.users -= 1
        if entry.users:
            entry.history.append("release")
            return True
        entry.state = "idle"  # by `TRANSITIONS`, as above
        entry.history.append("last_release")
        entry.idle_since = now
        self.idle[entry] = None
        return True

    def release(self, entry: Entry, now: float, effects: Effects) -> None:
        """One user is done. An entry without users becomes idle, serves who waits, or is closed."""
        if self.release_warm(entry, now):
            return
        entry.users -= 1
        if entry.state == "closed":  # it was closed under its user
            return
        entry.apply("release" if entry.users else "last_release")
        if entry.state == "idle":
            entry.idle_since = now
            self.idle[entry] = None
        if entry.waiters and entry.state != "retired" and not entry.backend.usable:
            self._send_on(entry, now, effects)
        self._settle(entry, now, effects)

    def _settle(self, entry: Entry, now: float, effects: Effects) -> None:
        """After a release or a connect: serve the entry's waiters, close it if it is finished, then fill the room."""
        self._serve(entry, now, effects)
        if not entry.users and not entry.waiters and entry.state != "closed":
            if entry.state == "retired":
                self._close(entry, entry.ending, now, effects)
            elif not entry.pooled or self.shut:
                self._close(entry, "shutdown" if self.shut else "released", now, effects)
            elif now >= entry.expires or not entry.backend.usable:
                self._retire(entry, "lifetime" if entry.backend.usable else "lost", now, effects)
        self._fill_room(now, effects)

    def _serve(self, entry: Entry, now: float, effects: Effects) -> None:
        if entry.preparing:
            return
        while entry.waiters and (entry.max_users is None or entry.users < entry.max_users):
            waiter = entry.waiters.pop(0)
            if entry.state == "idle":
                del self.idle[entry]
                entry.busy_since = now
            entry.apply("acquire")
            entry.users += 1
            entry.uses += 1
            waiter.entry = entry
            self.counters.hits += waiter.warm
            effects.append(Wake(waiter))

    def _fill_room(self, now: float, effects: Effects) -> None:
        """Let waiters in, first come first served, until there is no place for the next one.

        A waiter that a limit of its group keeps out is passed by those of other groups and of none, not by its own
        group. A waiter that ``max_backends`` keeps out is passed by nobody. Each is tried before all who came later,
        every time something changes, so nobody starves behind newcomers.
        """
        passing: set[str | None] = set()
        while self.room.lines and (waiter := self.room.first(passing)) is not None:
            entry = self.entries.get(waiter.identity) if waiter.pooled else None
            if entry is not None and self._stale(entry, waiter, now, effects):
                continue  # whoever was sent on by that comes first
            if entry is not None:
                self.room.remove(waiter)
                self._join(entry, waiter, now, effects)
            elif (forbidden := self._make_room(waiter, now, effects)) == "max_backends":
                return
            elif forbidden is not None:
                passing.add(waiter.group)

    # -- connecting

    def connected(self, entry: Entry, backend: Any, now: float, effects: Effects) -> None:
        """The entry's backend is ready: new, or checked and found alive."""
        self.made_way(entry, now, effects)
        entry.preparing = False
        if entry.state == "closed":  # the pool was closed meanwhile
            effects.append(Close(entry, backend))
            return
        if backend is not entry.backend:
            for waiter in entry.waiters:
                waiter.warm = False
            self.counters.tell_lost(entry, now, effects)
            entry.backend = backend
            entry.expires = now + self.config.lifetime(self._jitter())
            entry.max_users = backend.capabilities.max_users
            entry.born = now
            self.counters.tell("created", entry, "", now - entry.began, effects)
        self.failed.forget(entry.identity)
        entry.apply("connected")
        if entry.state == "idle":
            entry.idle_since = now
            self.idle[entry] = None
        self._settle(entry, now, effects)

    def connect_failed(self, entry: Entry, error: PoolError, now: float, effects: Effects) -> None:
        """Share the failure with all who wait for this entry, and remember it for a growing, jittered time."""
        self.made_way(entry, now, effects)
        entry.preparing = False
        if entry.state == "closed":
            if entry.backend is not None:  # its check was broken off
                effects.append(Close(entry, entry.backend))
            else:
                self.gone(entry, now, effects)
            return
        self._drop(entry, "failed")
        reason = error.reason if isinstance(error, BackendUnavailable) else type(error).__name__
        self.counters.tell_lost(entry, now, effects)
        self.counters.tell("failed", entry, reason, now - entry.began, effects)
        if entry.pooled and isinstance(error, BackendUnavailable):
            error = self.failed.remember(entry.identity, entry.config, error, now, self.config)
        for waiter in entry.waiters:
            waiter.error = for_each_waiter(error)
            effects.append(Wake(waiter))
        entry.waiters.clear()
        self._fill_room(now, effects)

    def check_failed(self, entry: Entry, now: float, effects: Effects) -> None:
        """An entry of a group lost its backend to a check. Who waits for it is first in line for a new one."""
        entry.preparing = False
        if entry.state == "closed":
            self.gone(entry, now, effects)
            return
        self._drop(entry, "failed")
        self.counters.tell_lost(entry, now, effects)
        self.room.send_ahead(entry.waiters)
        entry.waiters.clear()
        self._fill_room(now, effects)

    def configure(self, config: PoolConfig, now: float, effects: Effects) -> None:
        """Change the settings; a higher cap lets in who waits for room."""
        self.config = config
        self._fill_room(now, effects)

    # -- leaving the pool

    def _retire(self, entry: Entry, reason: str, now: float, effects: Effects) -> None:
        """Nobody new: close it now if nobody uses it, else at the last release."""
        self.counters.tell("retired", entry, reason, now - entry.born, effects)
        if entry.state == "idle":
            self._close(entry, reason, now, effects)
            return
        entry.ending = reason
        entry.apply("retire")
        if self.entries.get(entry.identity) is entry:
            del self.entries[entry.identity]
        self.outside.add(entry)

    def _drop(self, entry: Entry, event: Event = "close") -> None:
        """Take the entry out of every map; its backend is the caller's business now."""
        entry.apply(event)
        self.idle.pop(entry, None)
        self.outside.discard(entry)
        if self.entries.get(entry.identity) is entry:
            del self.entries[entry.identity]
        self.groups.discard(entry)

    def _close(self, entry: Entry, reason: str | None, now: float, effects: Effects) -> None:
        if reason is not None:  # else it was told already
            self.counters.tell("closed", entry, reason, now - entry.born, effects)
        self._drop(entry)
        self.groups.count_closing(entry.group, 1)
        if not entry.preparing:  # else `connected` or `connect_failed` will close what has come of it
            effects.append(Close(entry, entry.backend))

    def gone(self, entry: Entry, now: float, effects: Effects) -> None:
        """The backend of a closed entry is really gone: its place is free. Told twice, it counts once."""
        if not entry.gone:
            entry.gone = True
            self.groups.count_closing(entry.group, -1)
            self._fill_room(now, effects)

    def due(self, now: float) -> list[Entry]:
        """Idle entries past their idle timeout, and those over the cap, in the order of their release.

        Then those by which a group is over its count or its weight, group by group. Costs what it finds, and one look
        at each member of a group that has a limit of weight.
        """
        over = self.total - self.config.max_backends
        found: list[Entry] = []
        for entry in self.idle:
            if now - entry.idle_since < self.config.idle_timeout and len(found) >= over:
                break
            found.append(entry)
        return found + self.groups.over(self.config, found)

    def sweep(self, now: float, effects: Effects) -> list[Identity]:
        """Evict what is due and forget old failures; a backend that says it is busy is spared. Returns identities."""
        evicted = []
        for entry in self.due(now):
            if says_busy(entry.backend):
                self.touch(entry, now)
                continue
            idle = now - entry.idle_since
            self.counters.tell("evicted", entry, "idle" if idle >= self.config.idle_timeout else "lru", idle, effects)
            self._close(entry, None, now, effects)
            evicted.append(entry.identity)
        self.failed.prune(now, self.config.backoff_max)
        self._fill_room(now, effects)
        return evicted

    def touch(self, entry: Entry, now: float) -> None:
        """Mark an idle entry as just used."""
        if entry.state == "idle":
            entry.idle_since = now
            self.idle.move_to_end(entry)

    def close_key(self, primary: str, now: float, effects: Effects) -> tuple[list[Identity], list[Identity]]:
        """End all backends of one primary: ``(closed now, closed when their users are done)``."""
        closed: list[Identity] = []
        retired: list[Identity] = []
        for identity, entry in [(i, e) for i, e in self.entries.items() if i[0] == primary]:
            (closed if entry.state == "idle" else retired).append(identity)
            self._retire(entry, "key_closed", now, effects)
            self.failed.forget(identity)
        self._fill_room(now, effects)
        return closed, retired

    def expel(self, match: Callable[[str, Any], bool], now: float, effects: Effects) -> list[Identity]:
        """End every pooled backend that matches by primary and backend (None: not yet): users see `BackendClosed`."""
        gone = [entry for entry in self.live if entry.pooled and match(entry.identity[0], entry.backend)]
        waiting = self.room.take(lambda waiter: waiter.pooled and match(waiter.identity[0], None))
        for entry in gone:
            waiting.extend(entry.waiters)
            entry.waiters.clear()
            self._close(entry, "expelled", now, effects)
        send_away(waiting, "the backends of this key were closed", effects)
        self._fill_room(now, effects)
        return [entry.identity for entry in gone]

    def register(
        self,
        identity: Identity,
        config: dict[str, Any],
        backend: Any,
        now: float,
        effects: Effects,
        group: str | None = None,
    ) -> None:
        """Adopt a backend that somebody else connected; one that was there before is retired."""
        if self.shut:
            raise BackendClosed("the pool is closed")
        if (before := self.entries.get(identity)) is not None and before.backend is backend:
            self.touch(before, now)
            return
        if before is not None:
            self._retire(before, "replaced", now, effects)
        entry = Entry(identity, config, None, now, pooled=True, group=group)
        self.entries[identity] = entry
        self.groups.add(entry)
        self._gather(entry)
        self.connected(entry, backend, now, effects)

    def shutdown(self, now: float, effects: Effects) -> None:
        """Admit nobody, send every waiter away, close what is idle. Busy entries are left to `close_rest`."""
        self.shut = True
        waiting = [*self.room.take(), *(waiter for entry in self.live for waiter in entry.waiters)]
        send_away(waiting, "the pool is closed", effects)
        for entry in self.live:
            entry.waiters.clear()
            if not entry.users:
                self._close(entry, "shutdown", now, effects)

    def close_rest(self, now: float, effects: Effects) -> list[Entry]:
        """Close what is still in use. Returns those entries: their users will see `BackendClosed`."""
        rest = self.live
        for entry in rest:
            self._close(entry, "shutdown", now, effects)
        return rest

    # -- looking

    @property
    def live(self) -> list[Entry]:
        """Every entry that is not closed."""
        return [*self.entries.values(), *self.outside]

    @property
    def total(self) -> int:
        """Backends that are alive or being made: what ``max_backends`` caps."""
        return len(self.entries) + len(self.outside) + self.groups.closing

    @property
    def counts(self) -> dict[str, int]:
        """Counts for an error message."""
        return {
            "total": self.total,
            "busy": sum(1 for entry in self.live if entry.users),
            "idle": len(self.idle),
            "waiting": len(self.room) + sum(len(entry.waiters) for entry in self.live),
        }

    check_invariants = check
