"""Read what a task writes while it runs, from any machine that reaches the Redis: `follow` and `afollow`.

A reader pulls at its own pace and costs the worker nothing. One that is slow, or comes late, is told how many bytes
were left out.
"""

import asyncio
import concurrent.futures
import contextlib
import logging
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from time import monotonic
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, RedisError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from pool.config import check_number
from pool.errors import BackendUnavailable, ConfigError, PoolError
from pool.live.format import FINAL, Piece, Transcript, live_key
from pool.runtime import loop_thread
from pool.sharding.redis_store import plain_url

__all__ = ["Piece", "afollow", "follow"]

logger = logging.getLogger(__name__)

BATCH = 16
"""Entries that are read at once: of 64 kB at most."""
FIRST_PAUSE = 0.1
"""Seconds without news until the task's state is looked at; then twice as long each time, up to `LONGEST_PAUSE`."""
LONGEST_PAUSE = 1.0
LATE = 0.25
"""Seconds that the output of a task which has already ended may take to arrive; `LONGEST_PAUSE` if there was some."""
STATE_PATIENCE = 2.0
"""Seconds for the result backend to tell a state, where nothing else is waited for."""
REPLY_TIMEOUT = 5.0
CONNECT_TIMEOUT = 3.0
RETRY_AFTER = 0.5
"""Seconds until a Redis that cannot be reached is tried again."""


def follow(
    task_id: str,
    *,
    app: Any = None,
    timeout: float | None = None,
    wait: bool = True,
    url: str | None = None,
    namespace: str | None = None,
) -> Iterator[Piece]:
    """Iterate over what a task has written and writes, until its last attempt has ended.

    It begins with what Redis still holds; a task that waits for a worker is waited for. An end that was not written
    down (the worker was killed, Redis lost it) is told by the task's state, where an app is known.

    *app*: None is the current Celery app. *timeout*: seconds without any news. ``wait=False``: only what there is; no
    piece at all means that nothing is known of the task. *url* and *namespace*: instead of the app's settings.

    Raises `ConfigError` where there is no live output, `TimeoutError`, and with ``wait=False`` `BackendUnavailable`
    when Redis cannot be reached, which is waited for otherwise.
    """
    return _iterate(_follower(task_id, app, timeout, wait, url, namespace).batches())


def afollow(
    task_id: str,
    *,
    app: Any = None,
    timeout: float | None = None,
    wait: bool = True,
    url: str | None = None,
    namespace: str | None = None,
) -> AsyncIterator[Piece]:
    """`follow` for any event loop."""
    return _aiterate(_follower(task_id, app, timeout, wait, url, namespace).batches())


def _iterate(batches: AsyncGenerator[list[Piece], None]) -> Iterator[Piece]:
    async def following() -> list[Piece] | None:
        return await anext(batches, None)

    async def close() -> None:
        await batches.aclose()

    thread = loop_thread()
    try:
        while (pieces := thread.run(following())) is not None:
            yield from pieces
    finally:
        with contextlib.suppress(PoolError):  # not waited for: at the end of the program nobody would answer
            thread.spawn(close())


async def _aiterate(batches: AsyncGenerator[list[Piece], None]) -> AsyncIterator[Piece]:
    async with contextlib.aclosing(batches):
        async for pieces in batches:
            for piece in pieces:
                yield piece


def _follower(
    task_id: str, app: Any, timeout: float | None, wait: bool, url: str | None, namespace: str | None
) -> "_Follower":
    if timeout is not None:
        check_number("timeout", timeout, "must be more than 0, or None for no limit")
    if url is None:
        from celery import current_app

        app = current_app if app is None else app
        settings = getattr(getattr(app, "warm_pool", None), "settings", None)
        if settings is None:
            raise ConfigError("live output: this app has no pool: call pool.install(app), or give url and namespace")
        if not settings.live_output_mb:
            raise ConfigError("live output is off: POOL_LIVE_OUTPUT_MB is 0")
        if settings.redis_url is None:
            raise ConfigError("live output needs a Redis: set POOL_REDIS_URL")
        url, namespace = settings.redis_url, namespace or settings.namespace
    return _Follower(plain_url(url), live_key(namespace or "pool", task_id), task_id, app, timeout, wait=wait)


class _Follower:
    """Reads one stream, once."""

    def __init__(self, url: str, key: str, task_id: str, app: Any, timeout: float | None, *, wait: bool) -> None:
        self._url = url
        self._key = key
        self._task_id = task_id
        self._look = _Look(app, task_id)
        self._timeout = timeout
        self._wait = wait
        self._transcript = Transcript()
        self._position = b"0-0"
        self._news = 0.0  # when there were some
        self._trouble: Exception | None = None

    async def batches(self) -> AsyncGenerator[list[Piece], None]:
        """What each read has told."""
        self._news = monotonic()
        client = Redis.from_url(
            self._url,
            socket_timeout=REPLY_TIMEOUT,
            socket_connect_timeout=CONNECT_TIMEOUT,
            retry=Retry(NoBackoff(), 0),
        )
        try:
            async for pieces in self._batches(client):
                if pieces:
                    yield pieces
        finally:
            await client.aclose()

    async def _batches(self, client: Redis) -> AsyncGenerator[list[Piece], None]:
        pause = FIRST_PAUSE
        state: str | None = None  # that of a task which has ended, although no end was read
        while True:
            late = LONGEST_PAUSE if self._transcript.running else LATE
            block = 0.0 if self._transcript.over or not self._wait else late if state else pause
            entries = await self._read(client, block)
            if entries is None:
                continue
            if entries:
                self._news = monotonic()
                pause, state = FIRST_PAUSE, None
                yield [piece for _, fields in entries for piece in self._transcript.add(fields)]
                continue
            if self._transcript.over:
                return
            if state or not self._wait:
                state = state or await self._look.state()
                if state:
                    yield [Piece("", b"", 0, 0, "end", {"state": state, "exit_code": None})]
                return
            state = self._look.done()
            pause = min(2 * pause, LONGEST_PAUSE)
            if not state:
                self._check_time()
                self._look.begin()

    async def _read(self, client: Redis, block: float) -> list[tuple[bytes, dict[bytes, bytes]]] | None:
        """Return the next entries, none after *block* seconds without any; None: Redis is out of reach."""
        if self._timeout is not None:
            block = min(block, max(0.001, self._news + self._timeout - monotonic())) if block else block
        milliseconds = max(1, int(1000 * block)) if block else None
        try:
            reply: Any = await client.xread({self._key: self._position}, count=BATCH, block=milliseconds)
            if not reply and block >= LONGEST_PAUSE:
                await self._find_again(client)
        except AuthenticationError as error:
            raise ConfigError(f"live output: POOL_REDIS_URL: {error}") from error
        except (RedisConnectionError, RedisTimeoutError, OSError) as error:
            await self._out_of_reach(error)
            return None
        except (ResponseError, RedisError) as error:
            raise PoolError(f"live output of task {self._task_id}: {error}") from error
        self._trouble = None
        if not reply:
            return []
        found = next(iter(reply.values()))[0] if isinstance(reply, dict) else reply[0][1]
        entries: list[tuple[bytes, dict[bytes, bytes]]] = list(found)
        self._position = entries[-1][0]
        return entries

    async def _find_again(self, client: Redis) -> None:
        """Read from the start if the stream is another one than before, whose ids may be lower: a clock went back."""
        last: Any = await client.xrevrange(self._key, count=1)
        if not last or _order(last[0][0]) < _order(self._position):
            self._position = b"0-0"

    async def _out_of_reach(self, error: Exception) -> None:
        if not self._wait:
            raise BackendUnavailable(f"live output: {error}", "store", RETRY_AFTER) from error
        self._trouble = error
        self._check_time()
        await asyncio.sleep(RETRY_AFTER)

    def _check_time(self) -> None:
        if self._timeout is None or monotonic() - self._news < self._timeout:
            return
        message = f"no news of task {self._task_id} for {self._timeout:g} s"
        if self._trouble is not None:
            raise TimeoutError(f"{message}: Redis cannot be reached: {self._trouble}") from self._trouble
        why = "it runs and is silent" if self._transcript.running else "it waits for a worker, or there is none"
        raise TimeoutError(f"{message}: {why}")


def _order(entry_id: bytes) -> tuple[int, ...]:
    return tuple(map(int, entry_id.split(b"-")))


class _Look:
    """Looks at a task's Celery state in a thread: a result backend may retry for ever."""

    def __init__(self, app: Any, task_id: str) -> None:
        self._app = app
        self._task_id = task_id
        self._backend: Any = None
        self._answer: concurrent.futures.Future[str] | None = None

    def begin(self) -> None:
        """Look, unless a look is under way."""
        if self._app is None or self._answer is not None:
            return
        self._answer = concurrent.futures.Future()
        threading.Thread(target=self._ask, args=(self._answer,), name="live-state", daemon=True).start()

    def _ask(self, answer: "concurrent.futures.Future[str]") -> None:
        try:
            self._backend = self._backend or self._app.backend  # each thread would get one of its own, and connect
            answer.set_result(str(self._app.AsyncResult(self._task_id, backend=self._backend).state))
        except Exception as error:  # no result backend, or none that answers
            logger.debug("no state of task %s: %s", self._task_id, error)
            answer.set_result("")

    def done(self) -> str | None:
        """Return the state if the task was found to have ended, and forget what was found."""
        if self._answer is None or not self._answer.done():
            return None
        state = self._answer.result()
        self._answer = None
        return state if state in FINAL else None

    async def state(self) -> str | None:
        """Return the state of a task that has ended; waits `STATE_PATIENCE` at most."""
        self.begin()
        if self._answer is not None:
            await asyncio.wait({asyncio.wrap_future(self._answer)}, timeout=STATE_PATIENCE)
        return self.done()
