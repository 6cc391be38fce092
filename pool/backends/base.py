"""What the pool asks of every backend: connect, say how you are, close."""

import asyncio
import inspect
import logging
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from time import monotonic
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

from pool.errors import BackendClosed, CommandFailed, TurnFailed
from pool.runtime import loop_thread, was_cancelled

if TYPE_CHECKING:
    from pool.manager import BackendPoolManager

T = TypeVar("T")

logger = logging.getLogger(__name__)

Trust = Callable[[], float | None]
"""Returns for how many seconds from now this process may work for its keys; None: for as long as it likes."""

CLOSE_TIMEOUT = 5.0
"""Seconds that one tracked resource gets to close."""


class BackendStatus(StrEnum):
    """Where a backend is in its life."""

    NEW = "new"
    CONNECTING = "connecting"
    CONNECTED = "connected"
    LOST = "lost"
    """The connection broke; the next use, or the next acquire from a pool, makes a new one."""
    CLOSED = "closed"
    """Destroyed, for good."""


_CONNECTED = BackendStatus.CONNECTED  # Python 3.11 takes 90 ns to find a member in its enum; every acquire asks


@dataclass(frozen=True)
class Capabilities:
    """What a kind of backend can do."""

    exec: bool = False
    files: bool = False
    max_users: int | None = None
    """How many callers may hold one backend at a time; None: any number."""


class Claim(NamedTuple):
    """Under which epoch this process owns a key. *owner_of*: what no two owners may have at a time."""

    owner_of: str
    epoch: int
    """It grows with each new owner; 0: not the owner any more, or nobody can say."""
    grace: float = 0.0
    """Seconds after the end of `Backend.trust` for which commands may go on that the host ends for a newer owner. More
    than 0 with epoch 0: this process may be the owner again, under a new epoch, before they are over."""


class Backend(ABC):
    """Something warm. Subclasses write `open` and `close`; the pool calls `connect`, `check` and `destroy`.

    ``open``, ``close``, ``check`` and ``tick_health`` run on the pool's event loop and must not block it
    (``await asyncio.to_thread(...)`` for what does). The constructor gets the key's config and connects nothing.
    """

    kind: ClassVar[str] = "backend"
    capabilities: Capabilities = Capabilities()
    trust: Trust | None = None
    """Set by a pool that has one, before it connects. A kind whose work outlives a frozen process uses it in `open`."""
    pool: "BackendPoolManager[Any] | None" = None
    """Set by a pool before it connects. A kind that is built on another backend of its key borrows it there in `open`
    (``await self.pool.aacquire_backend(...)``), and releases it in `close`."""
    claim: Callable[[], "Claim | None"] | None = None
    """Set by a pool that has ``claim_for``, before it connects. A kind whose host can refuse older owners tells it."""
    pool_key: str = ""
    """The key that a pool connects it for, set by the pool before it connects; empty for one without a key."""
    open_clock: asyncio.Timeout | None = None
    """The pool's time limit of the `open` that is under way; see `unhurried`."""
    open_timeout: float | None = None
    """Seconds for `open`; None: the pool's ``connect_timeout``."""
    weight: int = 0
    """Bytes of memory that its processes on this machine hold, as last measured; refreshed by its own `tick_health`."""

    def __init__(self) -> None:
        self._status = BackendStatus.NEW
        self._listeners: list[Callable[[BackendStatus], object]] = []
        self._closeables: list[Any] = []

    # -- written by a kind of backend

    @abstractmethod
    async def open(self) -> None:
        """Make the connection. Raise `pool.errors.BackendUnavailable` with a ``reason`` when that fails."""

    @abstractmethod
    async def close(self) -> None:
        """End the connection and everything that `open` started; also after half an `open`. Can be called again."""

    async def check(self) -> None:
        """Raise if the connection is dead. Called before a borrow after a long idle time."""

    async def tick_health(self, now: float) -> None:
        """Look after itself, once in every sweep of the pool. *now*: seconds, monotonic."""

    def is_busy(self) -> bool:
        """Say that it works although nobody holds it; then no sweep evicts it. Must not block."""
        return False

    @property
    def fenced(self) -> bool:
        """Whether its host ends what runs here before a newer owner of the key begins; see `Claim.grace`."""
        return False

    @property
    def mode(self) -> str:
        """How it works, for a kind that has more than one way: a word to count by, and after ``": "`` the reason."""
        return ""

    # -- called by the pool and by users

    @property
    def status(self) -> BackendStatus:
        """Where it is in its life."""
        return self._status

    @property
    def usable(self) -> bool:
        """Whether the pool may hand it out."""
        return self._status is _CONNECTED

    def on_status_change(self, listener: Callable[[BackendStatus], object]) -> Callable[[], None]:
        """Call *listener* with each new status, on the event loop's thread; returns a function that ends it."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener) if listener in self._listeners else None

    def mark_lost(self) -> None:
        """Say that the connection broke: the pool replaces this backend at the next acquire. For subclasses."""
        if self.usable:
            self._set_status(BackendStatus.LOST)

    def _set_status(self, status: BackendStatus) -> None:
        if status is self._status or self._status is BackendStatus.CLOSED:
            return
        self._status = status
        for listener in list(self._listeners):
            try:
                listener(status)
            except Exception:
                logger.exception("a status listener of %r failed", self)

    async def connect(self) -> None:
        """`open`, with the status kept."""
        if self._status is BackendStatus.CLOSED:
            raise BackendClosed(f"{self!r} is closed")
        self._set_status(BackendStatus.CONNECTING)
        try:
            await self.open()
        except BaseException:
            self._set_status(BackendStatus.LOST)
            raise
        if self.status is BackendStatus.CLOSED:  # destroyed meanwhile, when there was nothing to close yet
            await asyncio.shield(self.close())
            raise BackendClosed(f"{self!r} was closed while it connected")
        self._set_status(BackendStatus.CONNECTED)

    @contextmanager
    def unhurried(self) -> Iterator[None]:
        """For a part of `open` that waits for other backends and not for its own host: the pool's limit stands still.

        Whoever uses it limits that part itself.
        """
        clock = self.open_clock
        if clock is None or clock.expired() or (limit := clock.when()) is None:
            yield
            return
        now = asyncio.get_running_loop().time
        left = limit - now()
        clock.reschedule(None)
        try:
            yield
        finally:
            clock.reschedule(now() + left)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Tell the pool's observer how long a command, or a turn, took, and how it ended."""
        if self.pool is None:
            yield
            return
        started, outcome = monotonic(), "ok"
        try:
            yield
        except BaseException as error:
            outcome = "failed" if isinstance(error, CommandFailed | TurnFailed) else type(error).__name__
            raise
        finally:
            self.pool.say_executed(self.kind, monotonic() - started, outcome)

    def track_closeable(self, resource: T) -> T:
        """Close *resource* when this backend is destroyed, last tracked first; returns it.

        It needs an ``aclose()`` or ``close()`` (plain or async), or be an async context manager that was entered by
        `enter_context`. Raises `BackendClosed` after `destroy`, and leaves *resource* to the caller.
        """
        if self._status is BackendStatus.CLOSED:
            raise BackendClosed(f"{self!r} is closed: it would never close {resource!r}")
        if not (hasattr(resource, "aclose") or hasattr(resource, "close")):
            raise TypeError(f"{resource!r} has neither aclose() nor close(): nothing could close it")
        self._closeables.append(resource)
        return resource

    def enter_context(self, manager: AbstractAsyncContextManager[T]) -> T:
        """Enter an async context manager on the event loop; it is left when this backend is destroyed."""
        return loop_thread().run(self.aenter_context(manager))

    async def aenter_context(self, manager: AbstractAsyncContextManager[T]) -> T:
        """`enter_context` for any event loop."""
        return await loop_thread().arun(self._enter(manager))

    async def _enter(self, manager: AbstractAsyncContextManager[T]) -> T:
        if self._status is BackendStatus.CLOSED:
            raise BackendClosed(f"{self!r} is closed")
        keeper = _ContextKeeper(manager)
        value: T = await keeper.enter()
        try:
            self.track_closeable(keeper)
        except BackendClosed:  # destroyed meanwhile
            await _close_resource(keeper)
            raise
        return value

    def run_sync(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine of this backend on the event loop and wait for it: the sync door of a method of your own.

        An exception that arrives in the waiting thread cancels it. Raises `PoolError` on the loop's own thread.
        """
        return loop_thread().run(coroutine)

    def destroy(self) -> None:
        """Close it and what it tracks. Can be repeated. Users that are still at work see `BackendClosed`."""
        loop_thread().run(self._destroy())

    async def adestroy(self) -> None:
        """`destroy` for any event loop."""
        await loop_thread().arun(self._destroy())

    async def _destroy(self) -> None:
        if self._status is BackendStatus.CLOSED:
            return
        self._set_status(BackendStatus.CLOSED)
        closeables, self._closeables = self._closeables, []
        try:
            for resource in reversed(closeables):
                await _close_resource(resource)
        finally:
            await self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._status}>"


class _ContextKeeper:
    """Enters and leaves an async context manager in one and the same task.

    anyio's cancel scopes (the ``mcp`` client is full of them) must be left by the task that entered them.
    """

    def __init__(self, manager: AbstractAsyncContextManager[Any]) -> None:
        self._manager = manager
        self._entered: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._leave = asyncio.Event()
        self._task = asyncio.create_task(self._keep())

    async def _keep(self) -> None:
        try:
            async with self._manager as value:
                self._entered.set_result(value)
                await self._leave.wait()
        except BaseException as error:
            if self._entered.done():
                raise
            self._entered.set_exception(error)

    async def enter(self) -> Any:
        try:
            return await asyncio.shield(self._entered)
        except asyncio.CancelledError:
            self._task.cancel()
            await asyncio.wait({self._task})
            raise

    async def aclose(self) -> None:
        self._leave.set()
        try:
            await asyncio.shield(self._task)
        except asyncio.CancelledError:  # out of patience with it
            self._task.cancel()
            raise


async def _close_resource(resource: Any) -> None:
    """Close one tracked resource, bounded; a failure is logged, so that the others are closed too."""
    close: Callable[[], Awaitable[None] | None] = getattr(resource, "aclose", None) or resource.close
    try:
        async with asyncio.timeout(CLOSE_TIMEOUT):
            if inspect.iscoroutinefunction(close):
                await close()
            else:  # a plain close() may block
                result = await asyncio.to_thread(close)
                if inspect.isawaitable(result):
                    await result
    except asyncio.CancelledError:
        if was_cancelled():
            raise
        logger.exception("closing %r, which a backend tracked, failed", resource)
    except Exception:
        logger.exception("closing %r, which a backend tracked, failed", resource)
