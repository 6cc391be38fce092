"""The coordinator over the fake lease store, with a worker that fails when it is told to."""

import asyncio
import contextlib
import time

import pytest

from pool.sharding import coordinator as module
from pool.sharding.coordinator import Coordinator
from pool.sharding.lease import LeaseMachine, Terms
from pool.sharding.ownership import Ownership
from tests.support.lease_store import FakeServer, FakeStore

LASTING = Terms(ttl=60.0, heartbeat=0.1, handoff_timeout=30.0, grace=0.0)
BRIEF = Terms(ttl=2.0, heartbeat=0.1, handoff_timeout=30.0, grace=0.0)
SHARDS = 4


class Store(FakeStore):
    """``down``: out of reach."""

    down = False

    async def beat(self, request):
        if self.down:
            raise ConnectionError("down")
        return self.execute(request)

    @contextlib.asynccontextmanager
    async def handed(self, incarnation):
        yield asyncio.Event().wait


class Worker:
    """``failures``: what the next calls of a name raise."""

    def __init__(self):
        self.refused, self.looks, self.failures = [], 0, {}

    def _may_fail(self, what):
        if self.failures.get(what):
            raise self.failures[what].pop()

    async def restore(self, dead):
        self._may_fail("restore")

    async def claimants(self):
        self._may_fail("claimants")
        self.looks += 1
        return set()

    async def consume(self, shards):
        pass

    async def cancel(self, shards):
        self._may_fail("cancel")

    async def clear(self):
        pass

    def busy(self):
        return set()

    def refuse(self, error):
        self.refused.append(str(error))


class Node:
    """A coordinator that runs, or has not begun yet."""

    def __init__(self, server, name, incarnation, terms=LASTING):
        self.machine = LeaseMachine(incarnation, name, SHARDS, terms)
        self.store, self.worker = Store(server, SHARDS, terms), Worker()
        self.coordinator = Coordinator(self.machine, self.store, self.worker, Ownership(SHARDS, terms.grace))
        self.running = None

    def run(self):
        self.running = asyncio.create_task(self.coordinator.run())

    async def join(self):
        await self.coordinator.join()
        self.run()
        return self

    def states(self):
        return [tenancy.state for tenancy in self.machine.tenancies.values()]

    async def serves(self, shards):
        await until(lambda: self.states() == ["serving"] * shards)

    def kill(self):
        for task in [self.running, *self.coordinator._jobs]:
            task.cancel()


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(module, "RETRY", 0.01)
    return FakeServer(lambda: time.time_ns() // 1000)


def test_a_node_that_came_back_before_the_store_waits_for_its_former_life_to_end(server):
    """While the store was away nobody's time ran: the former incarnation is a member still, and renews nothing."""

    async def main():
        first = await Node(server, "n", "n/1", BRIEF).join()
        await first.serves(SHARDS)
        first.kill()
        again = Node(server, "n", "n/2", BRIEF)
        again.store.down = True
        with pytest.raises(ConnectionError):
            await again.coordinator.join()
        again.run()
        again.store.down = False
        await again.serves(SHARDS)
        assert again.worker.refused == []

    asyncio.run(main())


def test_another_node_of_the_name_is_found_also_after_the_start(server):
    """It renews its membership: it lives."""

    async def main():
        first = await Node(server, "n", "n/1").join()
        other = Node(server, "n", "n/2")
        other.store.down = True
        with pytest.raises(ConnectionError):
            await other.coordinator.join()
        other.run()
        other.store.down = False
        await until(lambda: other.worker.refused)
        assert "another live node has the name 'n'" in other.worker.refused[0]
        await first.serves(SHARDS)

    asyncio.run(main())


def test_giving_back_is_tried_again(server):
    """The broker refuses: the shards move all the same, a moment later."""

    async def main():
        first = await Node(server, "n", "n/1").join()
        await first.serves(SHARDS)
        first.worker.failures["cancel"] = [RuntimeError("no memory")] * 2
        second = await Node(server, "o", "o/1").join()
        await second.serves(SHARDS // 2)
        first.worker.failures["cancel"] = [RuntimeError("no memory")]
        first.coordinator.leave()
        await second.serves(SHARDS)

    asyncio.run(main())


def test_a_broker_that_is_away_at_first_is_asked_again(server):
    """With whatever its library raises then: the dead are buried, and those looked for that the table has forgotten."""

    async def main():
        node = Node(server, "n", "n/1", BRIEF)
        await node.coordinator.join()
        server.table.dead["x/1"] = "x"
        node.worker.failures = {"restore": [RuntimeError("away")], "claimants": [RuntimeError("away")]}
        node.run()
        await node.serves(SHARDS)
        await until(lambda: not server.table.dead and node.worker.looks)

    asyncio.run(main())
