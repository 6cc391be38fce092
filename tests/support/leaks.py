"""What a test may not leave behind in this process: file descriptors, threads, child processes."""

import asyncio
import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import psutil

from pool.runtime import loop_thread
from tests.support.waiting import wait_until

_EXECUTOR_THREADS = 40  # more than asyncio's default executor ever starts


@dataclass(frozen=True)
class Holdings:
    """What this process holds."""

    fds: int
    threads: int
    children: frozenset[int]

    @classmethod
    def now(cls) -> Self:
        gc.collect()  # a traceback in a cycle may keep a socket
        me = psutil.Process()
        return cls(me.num_fds(), threading.active_count(), frozenset(child.pid for child in me.children()))

    def beyond(self, before: "Holdings") -> str:
        """Say what is there that was not there before; empty when nothing."""
        found = []
        if self.fds > before.fds:
            found.append(f"{self.fds - before.fds} file descriptors")
        if self.threads > before.threads:
            found.append(f"{self.threads - before.threads} threads")
        if children := self.children - before.children:
            found.append(f"child processes {sorted(children)}")
        return ", ".join(found)


def warm_up() -> None:
    """Start everything that lives as long as the process: the pool's loop and all threads of its executor."""

    async def fill_executor() -> None:
        loop = asyncio.get_running_loop()
        await asyncio.to_thread(lambda: None)
        workers = min(loop._default_executor._max_workers, _EXECUTOR_THREADS)
        barrier = threading.Barrier(workers)
        await asyncio.gather(*(asyncio.to_thread(barrier.wait, 30) for _ in range(workers)))

    loop_thread().run(fill_executor())


@contextmanager
def no_leaks(timeout: float = 15.0) -> Iterator[None]:
    """Fail unless, *timeout* seconds after the block at the latest, this process holds no more than before it."""
    warm_up()
    before = Holdings.now()
    yield
    left = [""]

    def clean() -> bool:
        left[0] = Holdings.now().beyond(before)
        return not left[0]

    try:
        wait_until(clean, "nothing is left behind", timeout)
    except AssertionError:
        raise AssertionError(f"left behind after {timeout} s: {left[0]}") from None
