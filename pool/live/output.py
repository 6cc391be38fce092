"""The writer of live output: one in each process that runs tasks, at work on the loop of the backend pool.

Nothing here makes a task or a command wait. What a task writes goes into a bounded buffer; one asyncio task empties all
buffers in batches, within its share of the loop's time. What does not fit is left out, which readers can tell.

A task that wrote nothing and ended within `SILENT` seconds leaves nothing in Redis, and costs it nothing.
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Mapping
from itertools import islice, starmap
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from pool.config import check_number
from pool.live.format import live_key
from pool.live.stopwatch import Stopwatch
from pool.live.task import LiveTask
from pool.runtime import loop_thread
from pool.sharding.redis_store import plain_url

logger = logging.getLogger(__name__)

ENTRY = 64 * 1024
"""Bytes of output in one entry at most: what a full pipe holds."""
PENDING = 1 << 20
"""Bytes of one task's output that may wait to be written; and about as much goes out in one batch, of all tasks."""
FLOOD = 128 * 1024
"""Bytes that go out of a task whose buffer has overflowed: nobody can read all of what it writes anyway."""
FLOOD_PAUSE = 0.25
"""Seconds until the next of them; its end is not kept waiting."""
BATCH = 64
"""Tasks in one batch at most: some five commands each."""
INTERVAL = 0.05
"""Seconds from the end of one batch to the next; after a longer pause output goes out at once."""
SHARE = 20
"""The next batch waits at least so many times as long as the last one has kept the loop's thread busy."""
SILENT = 1.0
"""Seconds after which a task is announced that writes nothing."""
RETRY = 1.0
"""Seconds until Redis is tried again after a second failure."""
ENDED = 1000
"""Tasks that have ended and may wait to be written, while Redis is away."""
ENDED_BYTES = 8 << 20
"""Bytes of output that may wait of all of them."""
CLOSE_PATIENCE = 2.0
"""Seconds that `LiveOutput.aclose` takes at most to write what waits."""
REPLY_TIMEOUT = 5.0
CONNECT_TIMEOUT = 3.0


class LiveOutput:
    """Writes to the Redis of *url*, *keep_bytes* of each task at most, until *ttl* seconds after its last output."""

    def __init__(self, url: str, namespace: str, *, keep_bytes: int, ttl: float) -> None:
        """Connects nothing yet. Raises `ConfigError`."""
        check_number("keep_bytes", keep_bytes, "must be more than 0", unit="bytes")
        check_number("ttl", ttl, "must be more than 0")
        self.namespace = namespace
        self.keep_bytes = int(keep_bytes)
        self.ttl = ttl
        self.entry_limit = max(1, min(ENTRY, self.keep_bytes // 4))
        self.pending_limit = max(2 * self.entry_limit, min(PENDING, self.keep_bytes // 2))
        self._url = plain_url(url)
        self._client: Redis | None = None
        self._writer: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._closing = asyncio.Event()
        self._open: set[LiveTask] = set()
        self._ticking = False
        self._ready: deque[LiveTask] = deque()
        self._ended: set[LiveTask] = set()
        self._held = 0
        self._failures = 0

    # -- from any thread

    def open(self, task_id: str, facts: Mapping[str, Any], attempt: str | None = None) -> LiveTask:
        """Return the writer of one attempt; *facts* (JSON) are what its begin says. No IO.

        *attempt*: an id for all attempts that write the same output, from its first byte; None: this one has its own.
        Raises `ConfigError` for an id that is none.
        """
        task = LiveTask(self, live_key(self.namespace, task_id), facts, attempt)
        self._open.add(task)
        if not self._ticking:
            self._ticking = True
            self._post(self._start_ticking)
        return task

    def ended(self, task: LiveTask) -> None:
        """Have the end of *task* written, if there is anything of it in Redis."""
        self._open.discard(task)
        if task.touched:  # looked at after `end` was set, as `_tick` and `_flush` do it the other way round
            self._post(self._hold, task)

    def close(self) -> None:
        """`aclose` from any thread but the loop's."""
        loop_thread().run(self.aclose())

    def _post(self, function: Any, *args: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process ends
            loop_thread().loop.call_soon_threadsafe(function, *args)

    # -- on the loop's thread

    def queue(self, task: LiveTask) -> None:
        """There is something to write of *task*."""
        if task.queued or self._closing.is_set():
            return
        task.queued = task.touched = True
        self._ready.append(task)
        self._wake.set()
        if self._writer is None:
            self._writer = asyncio.get_running_loop().create_task(self._write())

    def _hold(self, task: LiveTask) -> None:
        """Queue a task that has ended, within what may wait of all such tasks."""
        if task.done:
            return
        if len(self._ended) >= ENDED:
            task.pending.shrink(0)
            with contextlib.suppress(ValueError):
                self._ready.remove(task)
            return
        flying = sum(chunk.size for chunk in task.flying)
        room = ENDED_BYTES - self._held - flying
        if room < 0:
            task.flying, flying = [], 0
        task.pending.shrink(max(0, room))
        task.held = flying + task.pending.size
        self._held += task.held
        self._ended.add(task)
        self._resume(task)
        self.queue(task)

    def _start_ticking(self) -> None:
        asyncio.get_running_loop().call_later(SILENT, self._tick)

    def _tick(self) -> None:
        """Announce tasks that run and are silent; keep the streams of silent ones from expiring."""
        now = time.monotonic()
        for task in list(self._open):
            since = task.wrote if task.touched else task.opened
            if now - since >= (self.ttl / 3 if task.touched else SILENT):
                self.queue(task)
        self._ticking = False
        if self._open and not self._ticking and not self._closing.is_set():
            self._ticking = True
            self._start_ticking()

    async def _write(self) -> None:
        """Write batch after batch, until everything is written and it is asked to end."""
        due = 0.0
        while not self._closing.is_set() or self._ready:
            await self._wake.wait()
            await self._pause(due - time.monotonic())
            watch = Stopwatch(self._attempt())
            if await watch:
                due = time.monotonic() + max(INTERVAL, SHARE * watch.seconds)
            else:  # the first failure may be that of a connection which nobody had used for long
                due = time.monotonic() + (RETRY if self._failures > 1 else 0.0)
                if self._closing.is_set() and self._failures > 1:
                    return
            if not self._ready and not self._closing.is_set():
                self._wake.clear()

    async def _pause(self, seconds: float) -> None:
        if seconds > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._closing.wait()

    async def _attempt(self) -> bool:
        """Write one batch; False: something was in the way."""
        try:
            refused = await self._flush()
        except Exception as error:  # whatever it is: a build must not feel it
            self._failed(error)
            return False
        if refused is not None:
            self._failed(refused)
            return False
        if self._failures > 1:
            logger.info("live output is written again")
        self._failures = 0
        return True

    def _failed(self, error: Exception) -> None:
        self._failures += 1
        if self._failures == 2:
            logger.warning("live output cannot be written, and is left out until it can: %s", error)

    async def _flush(self) -> Exception | None:
        """Write a batch in one round trip; return what Redis has refused. Raises when it cannot be reached."""
        batch = self._batch()
        if not batch:
            return None
        jobs = list(starmap(_commands, batch))
        try:
            async with self._redis().pipeline(transaction=False) as pipe:
                for commands in jobs:
                    for command in commands:
                        pipe.execute_command(*command)
                replies = await pipe.execute(raise_on_error=False)
        except BaseException:
            for task, _ in batch:
                task.tape.forget()
                self._ready.append(task)
            raise
        refused = None
        answers = iter(replies)
        for (task, end), commands in zip(batch, jobs, strict=True):
            try:
                arrived = task.tape.written(list(islice(answers, len(commands))))
            except Exception as error:
                refused = error
                task.flying = []  # the next ones may be taken
                arrived = True
            self._went(task, end, arrived=arrived)
        return refused

    def _batch(self) -> list[tuple[LiveTask, Mapping[str, Any] | None]]:
        """Take from each task that has something, in turn, until the batch is full; with the end, where it is due."""
        batch: list[tuple[LiveTask, Mapping[str, Any] | None]] = []
        room = PENDING
        each = max(self.entry_limit, PENDING // max(1, len(self._ready)))
        while self._ready and room > 0 and len(batch) < BATCH:
            task = self._ready.popleft()
            end = task.end_facts()  # before its output is taken: what comes later is after the end
            if not task.flying:
                task.flooding = task.pending.overflowed and end is None
                task.flying = task.pending.take(min(each, FLOOD) if task.flooding else each)
            room -= sum(chunk.size for chunk in task.flying)
            batch.append((task, None if task.pending else end))
        return batch

    def _went(self, task: LiveTask, end: Mapping[str, Any] | None, *, arrived: bool) -> None:
        """A task's part of a batch was answered."""
        task.wrote = time.monotonic()
        if arrived:
            task.flying = []
            task.done = task.done or end is not None
        more = not task.done and (not arrived or task.pending or task.end is not None)
        if more and task.flooding and arrived and task.end is None:
            task.paused = True
            asyncio.get_running_loop().call_later(FLOOD_PAUSE, self._resume, task)
        elif more or (arrived and task.tape.excess):
            self._ready.append(task)
        else:
            task.queued = False
            if task in self._ended:
                self._ended.discard(task)
                self._held -= task.held

    def _resume(self, task: LiveTask) -> None:
        """Queue a task that floods."""
        if task.paused:
            task.paused = False
            self._ready.append(task)
            self._wake.set()

    def _redis(self) -> Redis:
        if self._client is None:
            self._client = Redis.from_url(
                self._url,
                socket_timeout=REPLY_TIMEOUT,
                socket_connect_timeout=CONNECT_TIMEOUT,
                retry=Retry(NoBackoff(), 0),  # it would not know which entries have arrived
            )
        return self._client

    async def aclose(self) -> None:
        """Write what waits, in `CLOSE_PATIENCE` seconds at most, and disconnect; nothing is taken any more."""
        for task in list(self._open):
            self._resume(task)
        self._closing.set()
        self._wake.set()
        if self._writer is not None:
            await asyncio.wait({self._writer}, timeout=CLOSE_PATIENCE)
            self._writer.cancel()
            await asyncio.wait({self._writer})
        if self._client is not None:
            with contextlib.suppress(Exception):
                await self._client.aclose()


def _commands(task: LiveTask, end: Mapping[str, Any] | None) -> list[tuple[Any, ...]]:
    return task.tape.commands(task.flying, end)
