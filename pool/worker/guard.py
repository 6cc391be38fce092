"""The guard: closes backends of shards that this node does not own (any more), in the process that has them.

The coordinator drops a shard from the `Ownership` board and wakes the guard. With prefork that is another process,
which also acts on its own: when the time for which the leases were trusted is over, everything ends that no host ends
for a newer owner (`Backend.fenced`); when the grace after it is over, everything does.
"""

import asyncio
import contextlib
import logging
import os
from typing import Any

from pool.backends.base import Backend
from pool.manager import BackendPoolManager
from pool.runtime import Call, loop_thread
from pool.sharding.hashing import shard_of
from pool.sharding.ownership import Ownership, now

logger = logging.getLogger(__name__)

LOOK = 0.5
"""Seconds between two looks at the board, where nobody rings."""


class Guard:
    """Looks after *pool*, in the process that has it."""

    def __init__(self, ownership: Ownership, pool: BackendPoolManager[Any]) -> None:
        self.ownership = ownership
        self._pool = pool
        self._bell = asyncio.Event()

    def watch(self) -> Call[None]:
        """Begin, in this process."""
        self.ownership.host = os.getpid()
        return loop_thread().spawn(self._watch())

    def look(self) -> None:
        """Look at the board now; on the event loop."""
        self._bell.set()

    async def _watch(self) -> None:
        while True:
            self._bell.clear()
            allowed = self._allowed()
            await self._clear()
            while not self._bell.is_set() and (present := self._allowed()) >= allowed:
                allowed = present
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._until_the_next_end()):
                        await self._bell.wait()

    def _allowed(self) -> tuple[bool, bool]:
        """What is in its time: everything, or what has a grace. Nobody tells when that is renewed, or begins."""
        trusted, moment = self.ownership.trusted_until, now()
        return moment < trusted, moment < trusted + self.ownership.grace

    def _until_the_next_end(self) -> float:
        """Seconds until trust, or the grace after it, ends, if nothing changes before; a look's pause at most."""
        trusted, grace = self.ownership.trusted_until, self.ownership.grace
        return min([LOOK, *(end - now() for end in (trusted, trusted + grace) if end > now())])

    def _must_end(self, key: str, backend: Backend | None) -> bool:
        shard = shard_of(key, self.ownership.shards)
        if self.ownership.owns(shard):
            return False
        return backend is None or not backend.fenced or not self.ownership.may_go_on(shard)

    async def _clear(self) -> None:
        """Close what must not be there; then say up to which drop that is true."""
        dropped = self.ownership.dropped
        try:
            gone = await self._pool.aexpel(self._must_end)
        except Exception:  # the next wake-up tries again
            logger.exception("closing backends of lost shards failed")
            return
        if gone:
            logger.info("closed %d backends of shards that are not this node's", len(gone))
        self.ownership.cleared = dropped
