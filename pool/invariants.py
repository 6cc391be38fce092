"""What holds of a `Lifecycle` between any two events."""

from typing import TYPE_CHECKING

from pool.entry import says_busy

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
    for waiter in life.room:
        found = life.entries.get(waiter.identity) if waiter.pooled else None
        assert found is None or found.config != waiter.config, f"{found} needs no room, yet somebody waits for it"
    ages = [entry.idle_since for entry in life.idle]
    assert ages == sorted(ages), "idle map is not ordered by time of release"
    assert life.closing >= 0
    spare = [entry for entry in life.idle if not says_busy(entry.backend)]
    assert not (life.room and spare and life.total <= life.config.max_backends), "room waiter beside idle"
