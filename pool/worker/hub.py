"""Calls into the worker's main thread, where Celery's event loop (the hub) runs and consumers may be changed."""

import asyncio
import concurrent.futures
import logging
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

R = TypeVar("R")


class HubCalls:
    """Functions that the hub is to call: in order, which the hub's own set of callbacks does not keep."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Callable[[], Any], concurrent.futures.Future[Any]]] = deque()
        self._hub: Any = None

    def attach(self, hub: Any) -> None:
        """Have this hub call them."""
        self._hub = hub
        hub.call_soon(self.run)

    def post(self, function: Callable[[], R]) -> concurrent.futures.Future[R]:
        """Have the hub call *function*; from any thread."""
        done: concurrent.futures.Future[R] = concurrent.futures.Future()
        self._waiting.append((function, done))
        if self._hub is not None:
            self._hub.call_soon(self.run)
        return done

    async def call(self, function: Callable[[], R]) -> R:
        """`post`, awaited on any event loop."""
        return await asyncio.wrap_future(self.post(function))

    def run(self) -> None:
        """Call what waits; on the main thread."""
        while self._waiting:
            function, done = self._waiting.popleft()
            if not done.set_running_or_notify_cancel():
                continue
            try:
                done.set_result(function())
            except Exception as error:
                done.set_exception(error)

    def run_everything(self) -> None:
        """Stand in for a hub that does not run any more: acknowledgements wait there, too."""
        self.run()
        for callback in self._hub._pop_ready():
            try:
                callback()
            except Exception:  # one message that cannot be acknowledged must not keep the others
                logger.exception("a callback of the event loop failed")
