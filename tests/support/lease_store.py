"""The lease table in plain Python: what the script of `redis_store.py` does, over a clock that a test can turn.

`FakeServer` is the Redis, `FakeStore` a node's client. Both pass the same conformance suite as the real ones.
"""

import itertools
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from math import ceil

from pool.sharding.lease import Answer, Lease, Member, Request, Terms

NOBODY = Lease(0, "")


@dataclass
class Table:
    """All keys of a namespace. Times in milliseconds of the lease clock."""

    born: str = ""
    run_id: str = ""
    version: int = 0
    members_version: int = 0
    clock: int = 0
    real: int = 0
    epoch: int = 0
    quarantine: int = 0
    shards: int = 0
    alive: dict[str, int] = field(default_factory=dict)
    members: dict[str, Member] = field(default_factory=dict)
    leases: dict[int, Lease] = field(default_factory=dict)
    changes: dict[int, int] = field(default_factory=dict)
    dead: dict[str, str] = field(default_factory=dict)


class FakeServer:
    """One server and its table. *micros*: the server's wall clock in microseconds."""

    def __init__(self, micros: Callable[[], int]) -> None:
        self.micros = micros
        self.table = Table()
        self.calls = 0
        self.publish: Callable[[str], None] = lambda incarnation: None
        """Called with the successor of each handover."""
        self._runs = itertools.count(1)
        self.run_id = ""
        self.restart()

    def restart(self) -> None:
        """The process is another one; the data is all there."""
        self.run_id = f"run{next(self._runs)}"

    def flush(self) -> None:
        self.table = Table()

    def forget_meta(self) -> None:
        """DEL of the meta key alone."""
        old, self.table = self.table, Table()
        for name in ("alive", "members", "leases", "changes", "dead"):
            setattr(self.table, name, getattr(old, name))

    def snapshot(self) -> Table:
        """What a replica has at this moment."""
        return deepcopy(self.table)

    def fail_over(self, replica: Table) -> None:
        """The replica takes over; what was written since its snapshot is lost."""
        self.table = replica
        self.restart()


class FakeStore:
    """As `RedisStore`, without the waiting."""

    def __init__(self, server: FakeServer, shards: int, terms: Terms) -> None:
        self.server = server
        self.shards = shards
        self.ttl = _milliseconds(terms.ttl)
        self.margin = _milliseconds(terms.margin)
        self.settle = _milliseconds(1.2 * terms.heartbeat)

    async def beat(self, request: Request) -> Answer:
        return self.execute(request)

    def execute(self, request: Request) -> Answer:
        """One run of the script."""
        self.server.calls += 1
        return _Run(self, request).answer()


class _Run:
    """The local variables of the script."""

    def __init__(self, store: FakeStore, request: Request) -> None:
        self.store = store
        self.server = store.server
        self.table = store.server.table
        self.request = request
        self.me = request.incarnation
        self.micros = self.server.micros()
        self.bumped = False

    def answer(self) -> Answer:
        request, table = self.request, self.table
        self._tell_the_time()
        self._expire()
        member = self.me in table.members
        if self.me in table.dead or (not member and request.born == table.born):
            return Answer("dead")
        if not member and (refused := self._refuses()):
            return refused
        table.epoch = max(table.epoch, request.floor)
        handed = self._release()
        if request.state == "bye":
            table.alive.pop(self.me, None)
            if table.members.pop(self.me, None):
                self._members_changed()
        else:
            self._renew()
        for dead in request.buried:
            table.dead.pop(dead, None)
        for successor in sorted(handed):  # so that a seed says everything
            self.server.publish(successor)
        return self._read_back()

    def _tell_the_time(self) -> None:
        table, request, store = self.table, self.request, self.store
        real = self.micros // 1000
        if table.born:
            step = max(0, min(real - table.real, store.ttl / 2))
            if request.incarnation in table.alive:
                own = table.alive[request.incarnation] - store.ttl + _milliseconds(request.elapsed)
                table.clock = max(table.clock, min(table.clock + step, own))
            else:
                table.clock += min(step, store.margin)
        if not table.born or table.run_id != self.server.run_id:
            wait = store.ttl
            if not table.born:
                for lost in (table.alive, table.members, table.leases, table.changes):
                    lost.clear()
                if not request.born:
                    wait = store.settle
            table.run_id = self.server.run_id
            table.born = f"{table.run_id}:{self.micros}"
            table.quarantine = table.clock + wait
        table.real = real
        if request.born not in ("", table.born) and self.me not in table.members:
            table.quarantine = max(table.quarantine, table.clock + store.ttl)

    def _bump(self) -> int:
        if not self.bumped:
            self.bumped = True
            self.table.version += 1
        return self.table.version

    def _members_changed(self) -> None:
        self.table.members_version = self._bump()

    def _expire(self) -> None:
        table = self.table
        for gone in [incarnation for incarnation, end in table.alive.items() if end <= table.clock]:
            del table.alive[gone]
            table.dead[gone] = table.members.pop(gone).node
            self._members_changed()

    def _refuses(self) -> Answer | None:
        table = self.table
        for incarnation, member in table.members.items():
            if member.node == self.request.node:
                return Answer("name", f"{incarnation} {table.alive[incarnation]}")
        if table.shards != self.store.shards:
            if table.members:
                return Answer("shards", f"{table.shards} {next(iter(table.members.values())).node}")
            table.leases.clear()
            table.changes.clear()
            table.shards = self.store.shards
        return None

    def _give(self, shard: int, owner: str, epoch: int) -> None:
        self.table.leases[shard] = Lease(epoch, owner)
        self.table.changes[shard] = self._bump()

    def _next_epoch(self) -> int:
        self.table.epoch = max(self.table.epoch + 1, self.micros)
        return self.table.epoch

    def _release(self) -> set[str]:
        handed = set()
        for shard, epoch, successor in self.request.releases:
            if self.table.leases.get(shard) != (epoch, self.me):
                continue
            if successor not in self.table.alive:
                self._give(shard, "", epoch)
            elif self.table.clock >= self.table.quarantine:
                self._give(shard, successor, self._next_epoch())
                handed.add(successor)
        return handed

    def _renew(self) -> None:
        table, request = self.table, self.request
        table.alive[self.me] = table.clock + self.store.ttl
        record = Member(request.node, request.state)
        if table.members.get(self.me) != record:
            table.members[self.me] = record
            self._members_changed()
        for shard, claimed in request.asserts:
            epoch, owner = table.leases.get(shard, NOBODY)
            if epoch < claimed or (epoch == claimed and not owner):
                self._give(shard, self.me, claimed)
            table.epoch = max(table.epoch, claimed)
        if table.clock >= table.quarantine:
            for shard in request.takes:
                if table.leases.get(shard, NOBODY).owner not in table.alive:
                    self._give(shard, self.me, self._next_epoch())

    def _read_back(self) -> Answer:
        table = self.table
        seen = self.request.seen if self.request.born == table.born else -1
        leases = members = None
        if table.version > seen:
            leases = {s: table.leases.get(s, NOBODY) for s, version in table.changes.items() if version > seen} or None
        if table.members_version > seen:
            members = dict(table.members)
        settles_in = max(0, table.quarantine - table.clock) / 1000
        return Answer("ok", "", table.born, table.version, settles_in, members, leases, tuple(sorted(table.dead)))


def _milliseconds(seconds: float) -> int:
    return ceil(1000 * seconds)
