"""The lease table as somebody sees it who takes no part (`pool.sharding.redis_store` describes its keys)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from pool.sharding.redis_store import keys_of


class Seat(NamedTuple):
    """One incarnation of a node, as the table has it."""

    node: str
    state: str
    left: float
    """Seconds until its membership ends, by the clock of the table continued to now. Below 0: nobody has noticed."""


@dataclass(frozen=True)
class LeaseTable:
    """One look at it."""

    shards: int | None
    """None: no node has ever joined."""
    members: Mapping[str, Seat]
    """By incarnation."""
    owners: Mapping[int, str]
    """Shard -> incarnation, which need not be a member any more."""
    quarantined: bool
    """The table was lost or set back lately: nobody takes anything from it yet."""

    @classmethod
    def read(cls, client: Any, namespace: str) -> Self:
        """Read it at once. *client*: with ``decode_responses=True``. Raises what redis-py raises."""
        meta, alive, members, leases = keys_of(namespace, "meta", "alive", "members", "leases")
        with client.pipeline(transaction=True) as pipe:
            pipe.time().hgetall(meta).zrange(alive, 0, -1, withscores=True).hgetall(members).hgetall(leases)
            (seconds, micros), told, ends, records, held = pipe.execute()
        passed = max(0.0, seconds * 1000 + micros / 1000 - float(told.get("real", 0)))
        clock = float(told.get("clock", 0)) + passed
        until = dict(ends)
        seats = {}
        for incarnation, record in records.items():
            state, _, node = record.partition(" ")
            seats[incarnation] = Seat(node, state, (until.get(incarnation, clock) - clock) / 1000)
        return cls(
            int(told["shards"]) if "shards" in told else None,
            seats,
            {int(shard): lease.partition(" ")[2] for shard, lease in held.items()},
            clock < float(told.get("quarantine", 0)),
        )

    @property
    def nodes(self) -> dict[str, Seat]:
        """The nodes that live, by name."""
        return {seat.node: seat for seat in self.members.values() if seat.left > 0}

    def owner(self, shard: int) -> str | None:
        """The node that owns a shard and lives."""
        seat = self.members.get(self.owners.get(shard, ""))
        return seat.node if seat is not None and seat.left > 0 else None
