"""Making, checking and closing backends: the IO of a pool, on its event loop, each step with a time limit."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, Generic

from pool.backends.base import Backend, Claim, Trust
from pool.borrowing import B
from pool.config import PoolConfig
from pool.entry import Entry
from pool.errors import BackendUnavailable, PoolError
from pool.keys import SHARED
from pool.runtime import was_cancelled

if TYPE_CHECKING:
    from pool.manager import BackendPoolManager

logger = logging.getLogger(__name__)


class CheckFailed(PoolError):
    """The entry's backend did not pass its check and was closed; whether another may start is not for us to say."""


class Connector(Generic[B]):
    """Knows how to make a backend from a config, and no pool. *settings* returns the pool's present ones.

    *trust*, *claim_for* and the *pool* that it is for are handed to each backend before it connects.
    """

    def __init__(
        self,
        make: Callable[..., B],
        settings: Callable[[], PoolConfig],
        trust: Trust | None = None,
        pool: "BackendPoolManager[B] | None" = None,
        claim_for: Callable[[str], Claim | None] | None = None,
    ) -> None:
        self._make = make
        self._settings = settings
        self._trust = trust
        self._pool = pool
        self._claim_for = claim_for
        self._watched: set[B] = set()  # backends that look after themselves

    async def make_way(self, victims: tuple[B, ...]) -> None:
        """Close what must be gone before another may connect; all of it, also when that one is given up."""

        async def close() -> None:
            for victim in victims:
                await self.destroy(victim)

        await _to_the_end(close())

    async def ready(self, entry: Entry) -> B | None:
        """Return the entry's own backend if it is alive, else a new, connected one.

        None: the entry was closed meanwhile. Raises `PoolError`; `CheckFailed` for an entry of a group.
        """
        try:
            if entry.state == "closed":
                return None
            if entry.backend is not None:
                backend = await self._checked(entry)
                if backend is not None:
                    return backend
                if entry.group is not None:
                    raise CheckFailed("its own backend is gone")  # noqa: TRY301 - past the handler that maps errors
            return await self._connected(entry)
        except (PoolError, asyncio.CancelledError):
            raise
        except Exception as error:
            what = f"backend {entry.identity[1]!r} of key {entry.identity[0]!r}: {type(error).__name__}: {error}"
            raise BackendUnavailable(what, "setup", 0.0) from error

    async def _checked(self, entry: Entry) -> B | None:
        """Return the entry's own backend if it is alive; close it if it is not."""
        backend: B | None = entry.backend
        if backend is None:
            return None
        try:
            async with asyncio.timeout(self._settings().connect_timeout):
                await backend.check()
            if backend.usable:
                return backend
        except Exception as error:
            logger.info("backend %r of key %r failed its check: %s", entry.identity[1], entry.identity[0], error)
        await _to_the_end(self.destroy(backend))
        return None

    async def _connected(self, entry: Entry) -> B:
        backend = self._make(**entry.config)
        if self._trust is not None:
            backend.trust = self._trust
        if self._pool is not None:
            backend.pool = self._pool
        backend.pool_key = entry.identity[0]
        if self._claim_for is not None and entry.pooled and entry.identity[0] != SHARED:
            backend.claim = partial(self._claim_for, entry.identity[0])
        limit = self._settings().connect_timeout if backend.open_timeout is None else backend.open_timeout
        try:
            async with asyncio.timeout(limit) as clock:
                backend.open_clock = clock
                await backend.connect()
        except BaseException as error:
            await _to_the_end(self.destroy(backend))  # whoever opened it half closes it
            if isinstance(error, TimeoutError) and clock.expired():
                raise BackendUnavailable(f"no connection within {limit:g} s", "timeout", 0.0) from error
            raise
        finally:
            backend.open_clock = None
        self.watch(backend)
        return backend

    async def destroy(self, backend: B) -> None:
        """Close one backend; log what goes wrong, for nobody is there to catch it."""
        self._watched.discard(backend)
        try:
            async with asyncio.timeout(self._settings().close_timeout):
                await backend.adestroy()
        except asyncio.CancelledError:
            if was_cancelled():
                raise
            logger.exception("closing %r failed", backend)
        except Exception:
            logger.exception("closing %r failed", backend)

    def watch(self, backend: B) -> None:
        """Have `tick_health` look after the backend, if its kind wants that, until it is destroyed."""
        if type(backend).tick_health is not Backend.tick_health:
            self._watched.add(backend)

    @property
    def watches(self) -> bool:
        """Whether there is anything for `tick_health` to do."""
        return bool(self._watched)

    async def tick_health(self) -> None:
        """Let each backend that wants to look after itself do so, side by side."""
        now = monotonic()

        async def tick(backend: B) -> None:
            try:
                async with asyncio.timeout(self._settings().connect_timeout):
                    await backend.tick_health(now)
            except Exception:
                logger.exception("health check of %r failed", backend)

        await asyncio.gather(*(tick(backend) for backend in list(self._watched)))


async def _to_the_end(cleanup: Coroutine[Any, Any, None]) -> None:
    """Await a bounded clean-up; a cancellation of the caller waits for it."""
    task = asyncio.ensure_future(cleanup)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise
