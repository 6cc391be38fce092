"""The guard: closes backends of shards that this node does not own (any more), in the process that has them.

The coordinator drops a shard from the `Ownership` board and wakes the guard. With prefork that is another process,
which also acts on its own: when the time for which the leases were trusted is over, everything ends.
"""

import asyncio
import contextlib
import logging
import os
from typing import Any

from pool.manager import BackendPoolManager
from pool.runtime import Call, loop_thread
from pool.sharding.hashing import shard_of
from pool.sharding.ownership import FOREVER, Ownership, now

logger = logging.getLogger(__name__)


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
            await self._clear()
            remaining = self.ownership.trusted_until - now()
            wait = None if self.ownership.trusted_until == FOREVER or remaining <= 0 else remaining
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._bell.wait()

    async def _clear(self) -> None:
        """Close what must not be there; then say up to which drop that is true."""
        dropped = self.ownership.dropped
        try:
            gone = await self._pool.aexpel(lambda key: not self.ownership.owns(shard_of(key, self.ownership.shards)))
        except Exception:  # the next wake-up tries again
            logger.exception("closing backends of lost shards failed")
            return
        if gone:
            logger.info("closed %d backends of shards that are not this node's", len(gone))
        self.ownership.cleared = dropped
