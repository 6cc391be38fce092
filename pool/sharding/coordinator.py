"""The coordinator: drives one node's `LeaseMachine` in a thread of its own, off the worker's hub.

It talks to the store at each heartbeat, tells the machine what time it is, and has the worker carry out what the
machine asks for. What a worker must be able to do is `Worker`, below; `pool.worker.tenant` is the real one.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection, Coroutine, Iterable
from typing import Any, Literal, NamedTuple, Protocol

from redis.exceptions import RedisError

from pool.errors import ConfigError
from pool.sharding.handoff import (
    Abandon,
    Beat,
    Close,
    Instruction,
    Rejoin,
    Restore,
    Serve,
    Stop,
    Suspend,
    Tenancy,
)
from pool.sharding.lease import NEVER, Answer, LeaseMachine, Request
from pool.sharding.ownership import Ownership, now

logger = logging.getLogger(__name__)

IDLE_CHECK = 0.02
"""Seconds between two looks at whether the tasks of a draining shard are done."""
RETRY = 0.5
"""Seconds before something that failed on the way to the broker is tried again."""


class Store(Protocol):
    """Where the lease table is: `RedisStore`."""

    async def beat(self, request: Request) -> Answer: ...
    def handed(
        self, incarnation: str
    ) -> contextlib.AbstractAsyncContextManager[Callable[[], Coroutine[Any, Any, None]]]: ...


class Worker(Protocol):
    """What the coordinator asks of the node. Each coroutine returns when it is done; shards are numbers."""

    async def restore(self, dead: Iterable[str]) -> None:
        """Put back what dead incarnations had taken from the broker and not settled. May raise; is then repeated."""

    async def claimants(self) -> set[str]:
        """Incarnations that may hold messages, as the broker says. May raise."""

    async def consume(self, shards: Iterable[int]) -> None:
        """Consume these shards' queues."""

    async def cancel(self, shards: Iterable[int]) -> None:
        """Consume them no more, and give back what has not started."""

    async def clear(self) -> None:
        """Close the backends of all shards that are dropped from the `Ownership` by now.

        Of suspended ones: those that must not go on.
        """

    def busy(self) -> Collection[int | None]:
        """Shards of which a task is running."""

    async def renew(self) -> str:
        """Return a new incarnation for a node that was taken for dead."""

    def refuse(self, error: ConfigError) -> None:
        """End the worker: it must not take part."""


class ShardStep(NamedTuple):
    """Some shards came to this node or left it."""

    what: Literal["taken", "received", "takeover", "resumed", "handoff", "suspended", "lost"]
    """``taken``: nobody had them; ``received`` from a node that lives; ``takeover`` from a dead one; ``handoff``: given
    to others; ``lost``: the leases ended, or may have; ``suspended``: they may have, and running commands go on;
    ``resumed``: they had not."""
    shards: tuple[int, ...]
    epoch: int
    """The highest of theirs."""
    source: str
    """The node they came from; "": nobody had them, or they went."""
    seconds: float
    """Since the leases came, or, on the way out, since that began."""


class Coordinator:
    """One node's part in sharing out the shards. Its methods run on one event loop; the thread-safe ones say so."""

    def __init__(self, machine: LeaseMachine, store: Store, worker: Worker, ownership: Ownership) -> None:
        self.machine = machine
        self.store = store
        self.worker = worker
        self.ownership = ownership
        self._wake = asyncio.Event()
        self._jobs: set[asyncio.Task[None]] = set()
        self._talking: asyncio.Task[None] | None = None
        self._listener: asyncio.Task[None]
        self._told_outage = False
        self._namesake = ""  # what the store told last of another member of our name
        self.tell: Callable[[ShardStep], object] = lambda _: None
        """Called with each step, on the loop; must not block."""
        self.renewed: float | None = None
        """When the leases were renewed last, as `pool.sharding.ownership.now`; None: not yet."""

    # -- the main line

    async def run(self) -> None:
        """Take part until the machine has left."""
        self._listener = asyncio.create_task(self._listen())
        registry = asyncio.create_task(self._look_for_forgotten())
        try:
            while not self.machine.finished:
                self._wake.clear()
                self._carry_out(self.machine.tick(now()))
                if self._talking is None and now() >= self.machine.next_request:
                    self._talking = asyncio.create_task(self._talk(self.machine.request(now())))
                await self._pause()
        finally:
            self._listener.cancel()
            registry.cancel()
            self.ownership.trust(NEVER)

    async def _pause(self) -> None:
        """Until something happens, or is due."""
        due = self.machine.deadline
        if self._talking is not None:  # its end wakes us; what may come before is the end of our trust
            due = self.machine.trusted_until if self.machine.trusts(now()) else float("inf")
        if self._look_for_idle():
            due = min(due, now() + IDLE_CHECK)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None if due == float("inf") else max(0.0, due - now())):
                await self._wake.wait()

    def _look_for_idle(self) -> bool:
        """Tell the machine of shards without a running task; return whether there are any that it wants to hear of."""
        ending = {"draining", "suspended"} if self.machine.leaving else {"draining"}
        watched = [tenancy for tenancy in self.machine.tenancies.values() if tenancy.state in ending]
        if not watched:
            return False
        busy = self.worker.busy()
        idle = [tenancy for tenancy in watched if tenancy.shard not in busy]
        if idle:
            self._happened("idle", idle)
        return True

    # -- the store

    async def join(self) -> None:
        """Make the first request; wait for the name to be free. Raises `ConfigError` when it must not take part."""
        seen = ""
        while True:
            request = self.machine.request(now())
            answer = await self._ask(request)
            if answer.verdict == "shards":
                raise self._refusal(answer)
            if answer.verdict != "name":
                self._hear(request, answer)
                return
            if seen not in ("", answer.detail):  # it renews its membership: it lives
                raise self._refusal(answer)
            if not seen:
                logger.info("waiting for the lease of a former node %r to end", self.machine.node)
            seen = answer.detail
            await asyncio.sleep(self.machine.terms.heartbeat)

    def _refusal(self, answer: Answer) -> ConfigError:
        if answer.verdict == "name":
            return ConfigError(f"another live node has the name {self.machine.node!r}: start this one with another -n")
        theirs, _, node = answer.detail.partition(" ")
        return ConfigError(
            f"POOL_SHARDS={self.machine.shards} here, but {theirs} at node {node!r}: all nodes and producers must"
            " agree. To change it, stop all nodes first"
        )

    async def _ask(self, request: Request) -> Answer:
        async with asyncio.timeout(self.machine.terms.ttl / 2):
            return await self.store.beat(request)

    async def _talk(self, request: Request) -> None:
        try:
            answer = await self._ask(request)
        except (RedisError, OSError, TimeoutError) as error:
            if not self._told_outage:
                logger.warning("the lease store does not answer (%s: %s)", type(error).__name__, error)
                self._told_outage = True
            if self.machine.leaving and not self.machine.tenancies:
                self.machine.finished = True  # nothing is held any more; the membership ends by itself
        else:
            if self._told_outage:
                logger.info("the lease store answers again")
                self._told_outage = False
            self._hear(request, answer)
        finally:
            self._talking = None
            self._wake.set()

    def _hear(self, request: Request, answer: Answer) -> None:
        # What has ended is dropped before trust is renewed.
        self._carry_out(self.machine.answered(request, answer, now()))
        self.ownership.trust(self.machine.trusted_until)
        self.renewed = now()
        # A member of our name may be our former life, which ends by itself while another takes part again and again.
        before, self._namesake = self._namesake, answer.detail if answer.verdict == "name" else ""
        if answer.verdict == "shards" or (answer.verdict == "name" and before not in ("", answer.detail)):
            self.worker.refuse(self._refusal(answer))

    async def _listen(self) -> None:
        """Hear at once when another node has handed over a shard."""
        while True:
            try:
                async with self.store.handed(self.machine.incarnation) as following:
                    while True:
                        await following()
                        self._beat()
            except (RedisError, OSError):
                await asyncio.sleep(self.machine.terms.heartbeat)

    async def _look_for_forgotten(self) -> None:
        """Have the machine know who has messages at the broker, for the case that the table has forgotten them."""
        while True:
            await asyncio.sleep(self.machine.terms.ttl)
            with contextlib.suppress(Exception):  # it can be asked again
                self.machine.registered(await self.worker.claimants())

    # -- instructions

    def _carry_out(self, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            if isinstance(instruction, Restore):
                self._start(self._restore(*instruction))
            elif isinstance(instruction, Rejoin):
                self._start(self._rejoin())
            elif isinstance(instruction, Beat):
                self._beat()
            elif isinstance(instruction, Serve):
                self.ownership.hold(instruction.tenancy.shard, instruction.tenancy.epoch)
            elif isinstance(instruction, Suspend):  # from this moment on nobody begins to work for it
                self.ownership.suspend(instruction.tenancy.shard)
            elif isinstance(instruction, Close | Abandon):
                self.ownership.drop(instruction.tenancy.shard)
        # What changes consumers goes to the hub in batches.
        for kind, carry_out in (
            (Serve, self._serve),
            (Stop, self._stop),
            (Close, self._close),
            (Suspend, self._suspend),
            (Abandon, self._abandon),
        ):
            tenancies = [instruction.tenancy for instruction in instructions if isinstance(instruction, kind)]
            if tenancies:
                self._start(carry_out(tenancies))

    def _beat(self) -> None:
        self.machine.next_request = min(self.machine.next_request, now())
        if self._talking is None:
            self._wake.set()

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        job = asyncio.create_task(coroutine)
        self._jobs.add(job)
        job.add_done_callback(self._ended)

    def _ended(self, job: asyncio.Task[None]) -> None:
        self._jobs.discard(job)
        if not job.cancelled() and (error := job.exception()) is not None:
            logger.error("carrying out an instruction failed", exc_info=error)

    def _happened(self, event: Any, tenancies: Iterable[Tenancy]) -> None:
        self._carry_out(self.machine.happened(event, tenancies, now()))
        self._wake.set()

    async def _restore(self, tenancies: tuple[Tenancy, ...], dead: tuple[str, ...]) -> None:
        while dead:
            try:
                await self.worker.restore(dead)
                break
            except Exception as error:
                logger.warning("the messages of %s are not restored yet: %s", ", ".join(dead), error)
                await asyncio.sleep(RETRY)
        self.machine.bury(dead)
        self._happened("restored", tenancies)

    async def _serve(self, tenancies: list[Tenancy]) -> None:
        logger.info("serving %s", _named(tenancies))
        await self.worker.consume([tenancy.shard for tenancy in tenancies])
        for source in sorted({tenancy.source for tenancy in tenancies}):
            came = [tenancy for tenancy in tenancies if tenancy.source == source]
            self._tell(_ARRIVALS[source.how], came, now() - min(t.born for t in came), source=source.node)

    async def _cancel(self, tenancies: list[Tenancy]) -> None:
        """Give back what has not started; again, should that fail, as long as these are what we have of the shards."""
        while here := [tenancy for tenancy in tenancies if self.machine.tenancies.get(tenancy.shard) is tenancy]:
            try:
                await self.worker.cancel([tenancy.shard for tenancy in here])
                return
            except Exception:
                logger.exception("giving back %s failed", _named(here))
                await asyncio.sleep(RETRY)

    async def _stop(self, tenancies: list[Tenancy]) -> None:
        await self._cancel(tenancies)
        self._happened("stopped", tenancies)

    async def _close(self, tenancies: list[Tenancy]) -> None:
        await self.worker.clear()
        await self._see_the_end([tenancy for tenancy in tenancies if "overdue" in tenancy.history])
        logger.info("handed over %s", _named(tenancies))
        self._tell("handoff", tenancies, now() - min(tenancy.moved for tenancy in tenancies), source="")
        self._happened("closed", tenancies)

    async def _see_the_end(self, overdue: list[Tenancy]) -> None:
        """Wait until ended tasks have given their messages back, and their commands are gone from the host."""
        if overdue:
            logger.warning("handing over %s while tasks run: they will run again", _named(overdue))
            await asyncio.sleep(self.machine.terms.margin)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.machine.terms.ttl):
                    while not {tenancy.shard for tenancy in overdue}.isdisjoint(self.worker.busy()):  # noqa: ASYNC110
                        await asyncio.sleep(IDLE_CHECK)

    async def _suspend(self, tenancies: list[Tenancy]) -> None:
        named, grace = _named(tenancies), self.machine.terms.grace
        logger.warning("cannot renew the leases of %s: nothing starts, fenced commands go on for %g s", named, grace)
        self._tell("suspended", tenancies, now() - min(tenancy.since for tenancy in tenancies), source="")
        await asyncio.gather(self.worker.clear(), self.worker.cancel([tenancy.shard for tenancy in tenancies]))

    async def _abandon(self, tenancies: list[Tenancy]) -> None:
        logger.warning("lost the leases of %s: ending what runs under them", _named(tenancies))
        await asyncio.gather(self.worker.clear(), self._cancel(tenancies))
        self._tell("lost", tenancies, now() - min(tenancy.since for tenancy in tenancies), source="")
        self._happened("abandoned", tenancies)

    def _tell(self, what: Any, tenancies: list[Tenancy], seconds: float, *, source: str) -> None:
        shards = tuple(sorted(tenancy.shard for tenancy in tenancies))
        epoch = max(tenancy.epoch for tenancy in tenancies)
        self.tell(ShardStep(what, shards, epoch, source, seconds))

    async def _rejoin(self) -> None:
        logger.warning("this node was taken for dead: it joins again")
        self.machine.rejoin(await self.worker.renew())
        self._listener.cancel()
        self._listener = asyncio.create_task(self._listen())
        self._beat()

    # -- from outside, on the loop

    def leave(self) -> None:
        """Hand everything over; `run` ends when that is done."""
        self._carry_out(self.machine.leave(now()))
        self._wake.set()

    def outlawed(self, incarnation: str) -> None:
        """The broker takes an incarnation for dead; a former one is no news."""
        if incarnation != self.machine.incarnation:
            return
        self._carry_out(self.machine.outlawed(now()))
        self.ownership.trust(self.machine.trusted_until)
        self._wake.set()

    def quit(self) -> None:
        """End everything at once, and say goodbye if the store still hears it."""
        self.machine.leave(now())
        self.machine.trusted_until = NEVER
        self.ownership.trust(NEVER)
        self._wake.set()

    def drain(self, *, on: bool) -> None:
        """Hand everything over and take nothing, or take part again."""
        self._carry_out(self.machine.drain(now()) if on else self.machine.undrain(now()))
        self._wake.set()


_ARRIVALS = {"": "taken", "handed": "received", "dead": "takeover", "kept": "resumed"}


def _named(tenancies: list[Tenancy]) -> str:
    shards = sorted(tenancy.shard for tenancy in tenancies)
    if len(shards) > 8:
        return f"{len(shards)} shards ({shards[0]} to {shards[-1]})"
    return f"shard{'s' if len(shards) > 1 else ''} {', '.join(map(str, shards))}"
