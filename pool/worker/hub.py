"""Calls into the worker's main thread, where Celery's event loop (the hub) runs and consumers may be changed."""

import asyncio
import concurrent.futures
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

R = TypeVar("R")

logger = logging.getLogger(__name__)

PAUSE = 0.01
"""Seconds between two turns of a hub whose connection to the broker is lost."""


class HubCalls:
    """Functions that the hub is to call: in order, which the hub's own set of callbacks does not keep."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Callable[[], Any], concurrent.futures.Future[Any]]] = deque()
        self._hub: Any = None
        self._lost = False  # the connection to the broker, while `turn` stood in for the worker's loop

    def attach(self, hub: Any) -> None:
        """Have this hub call them."""
        self._hub = hub
        self.remind()

    def remind(self) -> None:
        """Have the hub call what still waits: it forgets its callbacks when one fails, as on a lost connection."""
        if self._hub is not None:
            self._hub.call_soon(self.run)

    def post(self, function: Callable[[], R]) -> concurrent.futures.Future[R]:
        """Have the hub call *function*; from any thread."""
        done: concurrent.futures.Future[R] = concurrent.futures.Future()
        self._waiting.append((function, done))
        self.remind()
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

    def turn(self) -> None:
        """Run the hub until something has happened, after Celery has left its loop and with the consumers cancelled.

        So acknowledgements go out, results of prefork children come in, and the broker hears heartbeats, for as long
        as running tasks take. A lost connection is for nobody to repair any more.
        """
        if self._lost:
            self.run_everything()
            time.sleep(PAUSE)
            return
        try:
            self._hub.run_once()
        except Exception as error:
            logger.warning("lost the broker while tasks still run: they will run again (%s)", error)
            self._lost = True
