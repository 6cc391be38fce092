"""The guard: closes backends of shards that this node does not own (any more), in the process that has them.

The coordinator drops a shard from the `Ownership` board and wakes the guard. With prefork that is another process,
which also acts on its own: when the time for which the leases were trusted is over, everything ends.
"""

import asyncio
import contextlib
import logging
import os
import socket
from typing import Any

from pool.manager import BackendPoolManager
from pool.runtime import Call, loop_thread
from pool.sharding.hashing import shard_of
from pool.sharding.ownership import FOREVER, Ownership, now

logger = logging.getLogger(__name__)


class Guard:
    """Made before worker processes are forked; `watch` runs in the one that has the backends, `wake` in the other."""

    def __init__(self, ownership: Ownership) -> None:
        self.ownership = ownership
        self._bell, self._rope = socket.socketpair()
        self._bell.setblocking(False)
        self._rope.setblocking(False)

    def wake(self) -> None:
        """Have the guard look at the board."""
        with contextlib.suppress(BlockingIOError):  # it has enough to wake up for
            self._rope.send(b"!")

    def close(self) -> None:
        """Nobody needs to be woken any more."""
        self._bell.close()
        self._rope.close()

    def watch(self, pool: BackendPoolManager[Any]) -> Call[None]:
        """Look after *pool* from now on, in this process."""
        self.ownership.host = os.getpid()
        return loop_thread().spawn(self._watch(pool))

    async def _watch(self, pool: BackendPoolManager[Any]) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._clear(pool)
            remaining = self.ownership.trusted_until - now()
            wait = None if self.ownership.trusted_until == FOREVER or remaining <= 0 else remaining
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await loop.sock_recv(self._bell, 4096)

    async def _clear(self, pool: BackendPoolManager[Any]) -> None:
        """Close what must not be there; then say up to which drop that is true."""
        dropped = self.ownership.dropped
        try:
            gone = await pool.aexpel(lambda key: not self.ownership.owns(shard_of(key, self.ownership.shards)))
        except Exception:  # the next wake-up tries again
            logger.exception("closing backends of lost shards failed")
            return
        if gone:
            logger.info("closed %d backends of shards that are not this node's", len(gone))
        self.ownership.cleared = dropped
