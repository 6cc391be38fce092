"""A worker as the owner of shards that come and go: what the coordinator asks of it, and its thread."""

import asyncio
import contextlib
import logging
import os
import secrets
import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future
from typing import Any

from celery.worker import state
from redis.asyncio import Redis
from redis.exceptions import RedisError

from pool.config import Settings
from pool.errors import ConfigError
from pool.runtime import LoopThread
from pool.sharding.coordinator import Coordinator
from pool.sharding.lease import LeaseMachine, Terms
from pool.sharding.ownership import Ownership, now
from pool.sharding.redis_store import RedisStore, plain_url
from pool.worker.consumption import Consumption
from pool.worker.hub import HubCalls
from pool.worker.line import Line

logger = logging.getLogger(__name__)

CLEAR_CHECK = 0.005
"""Seconds between two looks at whether the backends are closed."""
STOP_CHECK = 0.01
"""Seconds between two looks at the hub's callbacks in a cold shutdown."""


class Tenant:
    """Implements `pool.sharding.coordinator.Worker` with the parts of *extension* (a `WarmPool`)."""

    def __init__(self, extension: Any, node: str) -> None:
        self.settings: Settings = extension.settings
        if self.settings.redis_url is None:
            raise ConfigError(
                "POOL_REDIS_URL is not set and the broker is no Redis: leases need one. Set it, or give each node"
                " shards of its own (POOL_NODE_SHARDS)"
            )
        self.ownership: Ownership = extension.ownership
        self.line: Line = extension.line
        self.tell = extension.steps.shards
        self.consumption: Consumption = extension.consumption
        self.calls: HubCalls = extension.calls
        self.takeover = extension.takeover
        self.node = node
        settings = self.settings
        self.terms = Terms(
            settings.lease_ttl, settings.lease_heartbeat, settings.handoff_timeout, grace=settings.lease_grace
        )
        self.machine = LeaseMachine(incarnation_of(node), node, self.settings.shards, self.terms)
        self.takeover.adopt(self.machine.incarnation)
        self._thread: LoopThread
        self._running: Future[None]
        self._finishing = False
        self.renewed: Callable[[], float | None] = lambda: None

    @property
    def lease_age(self) -> float | None:
        """Seconds since the leases were renewed; None: not yet. From any thread."""
        renewed = self.renewed()
        return None if renewed is None else round(now() - renewed, 3)

    # -- the life of the worker; on its main thread

    def start(self) -> None:
        """Join the other nodes. Raises `ConfigError` when this node must not; an unreachable store is waited for."""
        self._thread = LoopThread("pool-coordinator")
        try:
            self._thread.run(self._join())
        except BaseException:
            self._thread.stop()
            raise
        self.takeover.fenced = self._on_fenced
        self._running = self._thread.spawn(self.coordinator.run()).future
        self._running.add_done_callback(self._ended)

    def _on_fenced(self, incarnation: str) -> None:
        self._thread.loop.call_soon_threadsafe(self.coordinator.outlawed, incarnation)

    def _ended(self, running: Future[None]) -> None:
        """A node without its coordinator owns nothing any more; it must not pretend to take part."""
        error = running.exception()
        if error is not None and not self._finishing:
            logger.critical("the coordinator failed: this node stops", exc_info=error)
            state.should_stop = os.EX_SOFTWARE

    async def _join(self) -> None:
        self._client = Redis.from_url(plain_url(str(self.settings.redis_url)), decode_responses=True)
        store = RedisStore(self._client, self.settings.namespace, self.settings.shards, self.terms)
        self.coordinator = Coordinator(self.machine, store, self, self.ownership)
        self.coordinator.tell = self.tell
        self.renewed = lambda: self.coordinator.renewed
        try:
            async with asyncio.timeout(self.terms.ttl):
                await store.check()
            await self.coordinator.join()
        except (RedisError, OSError, TimeoutError) as error:
            logger.error("cannot reach the lease store yet (%s: %s)", type(error).__name__, error)

    def stop(self) -> None:
        """Hand everything over: idle shards at once, busy ones as their tasks finish. Then leave."""
        self._thread.loop.call_soon_threadsafe(self.coordinator.leave)
        self._running.add_done_callback(lambda _: self.calls.post(int))  # wakes the hub
        while not self._running.done():
            self.calls.turn()
        self._finish()

    def terminate(self) -> None:
        """Cold shutdown: let go of everything now."""
        self._thread.loop.call_soon_threadsafe(self.coordinator.quit)
        deadline = time.monotonic() + self.terms.margin
        while not self._running.done() and time.monotonic() < deadline:
            self.calls.run_everything()
            time.sleep(STOP_CHECK)
        self._finish()

    def _finish(self) -> None:
        self._finishing = True  # it may be cut short now
        self.calls.run_everything()
        with contextlib.suppress(Exception):
            self._thread.run(self._client.aclose())
        self._thread.stop()

    def drain(self, *, on: bool) -> None:
        """Hand everything over without stopping, or take part again; from any thread."""
        self._thread.loop.call_soon_threadsafe(lambda: self.coordinator.drain(on=on))

    # -- what the coordinator asks for; on its thread

    async def restore(self, dead: Iterable[str]) -> None:
        for incarnation in dead:
            count = await asyncio.to_thread(self.takeover.restore, incarnation)
            if count:
                logger.info("takeover: %d messages of the dead %s are back in their queues", count, incarnation)

    async def claimants(self) -> set[str]:
        return await asyncio.to_thread(self.takeover.claimants)

    async def consume(self, shards: Iterable[int]) -> None:
        await self.calls.call(lambda: self.consumption.add(shards))

    async def cancel(self, shards: Iterable[int]) -> None:
        count = await self.calls.call(lambda: self.consumption.cancel(shards))
        if count:
            logger.info("gave back %d messages that had not started", count)

    async def clear(self) -> None:
        dropped = self.ownership.dropped
        self.line.wake()
        while self.ownership.cleared < dropped and _alive(self.ownership.host):  # noqa: ASYNC110 - another process
            await asyncio.sleep(CLEAR_CHECK)

    def busy(self) -> Collection[int | None]:
        return self.consumption.busy()

    async def renew(self) -> str:
        incarnation = incarnation_of(self.node)
        self.takeover.adopt(incarnation)
        await self.calls.call(self.consumption.reconnect)
        return incarnation

    def refuse(self, error: ConfigError) -> None:
        logger.critical("this node must not take part: %s", error)
        state.should_stop = os.EX_CONFIG


def incarnation_of(node: str) -> str:
    """Return a name for one life of a node: `node` itself may come back."""
    return f"{node}/{secrets.token_hex(4)}"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return pid != 0
