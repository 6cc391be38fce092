"""The lease table as somebody sees it who takes no part: read by one script that changes nothing."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Self

from pool.sharding.lease import Lease

LOOK = r"""
local meta, alive, members, leases, dead = unpack(KEYS)
local time = redis.call('TIME')
return {tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000), redis.call('HGETALL', meta),
        redis.call('ZRANGE', alive, 0, -1, 'WITHSCORES'), redis.call('HGETALL', members),
        redis.call('HGETALL', leases), redis.call('HGETALL', dead)}
"""
"""For the keys `KEYS` (`pool.sharding.redis_store` describes them)."""


class Seen(NamedTuple):
    """A member."""

    node: str
    state: str
    ends_in: float
    """Seconds until its membership ends unless it is renewed. 0 or less: it has, and no node has noticed yet."""

    @property
    def lives(self) -> bool:
        """Whether its leases count."""
        return self.ends_in > 0


class Table(NamedTuple):
    """All of it, as it was at one moment."""

    shards: int | None
    """None: no node has ever joined."""
    members: Mapping[str, Seen]
    """By incarnation."""
    leases: Mapping[int, Lease]
    """Their owners need not be members any more."""
    dead: Mapping[str, str]
    """Incarnations that ended without a farewell and whose messages were not put back yet -> their nodes."""
    settles_in: float
    """Seconds until the shards of a table that was lost or set back may be taken."""

    @classmethod
    def of(cls, answer: Any) -> Self:
        """Make it of what `LOOK` has answered.

        The lease clock is taken to have gone on as the server's since the last heartbeat of any node; by that, a
        membership may seem to end a little earlier than it does for the nodes.
        """
        real, *flat = answer
        meta, alive, members, leases, dead = (dict(zip(each[::2], each[1::2], strict=True)) for each in flat)
        clock = float(meta.get("clock", 0)) + max(0.0, real - float(meta.get("real", real)))
        seen = {}
        for incarnation, record in members.items():
            state, _, node = record.partition(" ")
            seen[incarnation] = Seen(node, state, (float(alive.get(incarnation, clock)) - clock) / 1000)
        held = {}
        for shard, lease in leases.items():
            epoch, _, owner = lease.partition(" ")
            held[int(shard)] = Lease(int(epoch), owner)
        settles_in = max(0.0, float(meta.get("quarantine", 0)) - clock) / 1000
        return cls(int(meta["shards"]) if "shards" in meta else None, seen, held, dead, settles_in)

    def owner(self, shard: int) -> Seen | None:
        """Return the member that owns *shard*; None: nobody does, or one whose membership has ended."""
        lease = self.leases.get(shard)
        seen = self.members.get(lease.owner) if lease is not None else None
        return seen if seen is not None and seen.lives else None

    @property
    def living(self) -> dict[str, Seen]:
        """The members whose leases count, by the name of their node."""
        return {seen.node: seen for seen in self.members.values() if seen.lives}


KEYS = ("meta", "alive", "members", "leases", "dead")
"""What `LOOK` reads, in this order."""
