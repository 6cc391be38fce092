"""The watch for turns that somebody wants cancelled: one look at the store for all turns of this process."""

import asyncio
import logging
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

from pool.backends.agent import AgentBackend
from pool.runtime import loop_thread

logger = logging.getLogger(__name__)

INTERVAL = 0.2
"""Seconds between two looks, while any turn runs."""


class CancelWatch:
    """*cancelled*: says which of some turns were asked to be cancelled; it may block."""

    def __init__(self, cancelled: Callable[[Collection[str]], set[str]]) -> None:
        self._cancelled = cancelled
        self._lock = threading.Lock()
        self._turns: dict[str, AgentBackend] = {}
        self._looking = False

    @contextmanager
    def watching(self, turn: str, backend: AgentBackend) -> Iterator[None]:
        """Cancel the turn of *backend* when that is asked for, inside of the block."""
        with self._lock:
            self._turns[turn] = backend
            start, self._looking = not self._looking, True
        if start:
            loop_thread().spawn(self._look())
        try:
            yield
        finally:
            with self._lock:
                self._turns.pop(turn, None)

    async def _cancel(self, turn: str) -> None:
        """Before the prompt has begun there is nothing to cancel: the next look asks again."""
        with self._lock:
            backend = self._turns.get(turn)  # None: it ended during the look, and its agent may have the next one
        if backend is not None:
            await backend.acancel()

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(INTERVAL)  # first: a short turn costs no look
            with self._lock:
                turns = dict(self._turns)
                if not turns:
                    self._looking = False
                    return
            try:
                asked = await asyncio.to_thread(self._cancelled, list(turns))
                for turn in asked:
                    await self._cancel(turn)
            except Exception as error:
                logger.warning("looking for turns to cancel: %s", error)
