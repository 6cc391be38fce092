"""What holds of a `Lifecycle` between any two events."""

from typing import TYPE_CHECKING

from pool.entry import Entry, says_busy

if TYPE_CHECKING:
    from pool.lifecycle import Lifecycle


def check(life: "Lifecycle") -> None:
    """Raise AssertionError when the state contradicts itself."""
    for identity, entry in life.entries.items():
        assert entry.identity == identity
        assert entry.state in ("connecting", "idle", "busy"), entry
        assert (entry.state == "idle") == (entry in life.idle), entry
        assert entry not in life.outside, entry
    for entry in life.outside:
        assert entry.state == "retired" or not entry.pooled, entry
    for entry in life.live:
        assert entry.users >= 0, entry
        assert (entry.state == "busy") <= (entry.users > 0), entry
        assert (entry.state == "idle") <= (entry.users == 0), entry
        assert entry.max_users is None or entry.users <= entry.max_users, entry
        served = entry.max_users is not None and entry.users >= entry.max_users
        assert not entry.waiters or entry.preparing or served, entry
        assert entry.preparing or entry.backend is not None, entry
        assert not entry.preparing or not entry.users, entry
        assert (entry.state == "connecting") <= entry.preparing, entry
        assert entry.state != "retired" or entry.users or entry.preparing, entry
    for entry in life.idle:
        assert entry.state == "idle", entry
    ages = [entry.idle_since for entry in life.idle]
    assert ages == sorted(ages), "idle map is not ordered by time of release"
    assert life.groups.closing >= 0
    _check_groups(life)
    _check_room(life)


def _check_groups(life: "Lifecycle") -> None:
    grouped: dict[str, set[Entry]] = {}
    for entry in life.live:
        assert not entry.displaced or entry.preparing, entry
        if entry.group is not None:
            grouped.setdefault(entry.group, set()).add(entry)
    for name, group in life.groups.items():
        assert set(group.members) == grouped.pop(name, set()), f"members of group {name!r}"
        assert group.closing >= 0, f"group {name!r}: {group.closing} closing"
        assert group.total, f"group {name!r} is empty"
    assert not grouped, f"groups that are not counted: {grouped}"


def _check_room(life: "Lifecycle") -> None:
    for waiter in life.room:
        found = life.entries.get(waiter.identity) if waiter.pooled else None
        assert found is None or found.config != waiter.config, f"{found} needs no room, yet somebody waits for it"
    spare = [entry for entry in life.idle if not says_busy(entry.backend)]
    for group, line in life.room.lines.items():
        tickets = [waiter.ticket or 0 for waiter in line]
        assert tickets == sorted(set(tickets)), f"line of group {group!r} is out of order: {tickets}"
        assert {waiter.group for waiter in line} == {group}
        if not life.groups.full(group, life.config):
            assert life.total >= life.config.max_backends, f"{line[0].identity} waits although there is room"
            assert not spare or life.total > life.config.max_backends, "room waiter beside idle"
