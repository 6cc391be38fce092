"""Calls into the worker's main thread, where Celery's event loop (the hub) runs and consumers may be changed."""

import asyncio
import concurrent.futures
import contextlib
import os
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

R = TypeVar("R")


class HubCalls:
    """Functions that wait for the hub. They run in order, several at one go."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Callable[[], Any], concurrent.futures.Future[Any]]] = deque()
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)

    def attach(self, hub: Any) -> None:
        """Run them on this hub, until it is reset: Celery does that with each new connection."""
        hub.add_reader(self._read, self.run)

    def post(self, function: Callable[[], R]) -> concurrent.futures.Future[R]:
        """Have the hub call *function*; from any thread."""
        done: concurrent.futures.Future[R] = concurrent.futures.Future()
        self._waiting.append((function, done))
        with contextlib.suppress(BlockingIOError):  # the pipe is full of wake-ups
            os.write(self._write, b"!")
        return done

    async def call(self, function: Callable[[], R]) -> R:
        """`post`, awaited on any event loop."""
        return await asyncio.wrap_future(self.post(function))

    def run(self) -> None:
        """Run what waits; on the main thread."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._read, 4096)
        while self._waiting:
            function, done = self._waiting.popleft()
            if not done.set_running_or_notify_cancel():
                continue
            try:
                done.set_result(function())
            except Exception as error:
                done.set_exception(error)
