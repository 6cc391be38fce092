"""`BackendPoolManager`: one warm backend for each key, borrowed by any thread or event loop.

The decisions are `pool.lifecycle`'s, taken under one lock; what they ask for (connect, close, wake) is done outside
of it, on the process's event loop. Borrowing and giving back a warm backend never leaves the calling thread.
"""

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from time import monotonic
from typing import Any, Generic, TypeVar

from pool.backends.base import Claim, Trust
from pool.borrowing import B, Borrowed, Borrowing
from pool.config import PoolConfig
from pool.connector import CheckFailed, Connector
from pool.entry import Close, Connect, Effects, Entry, Identity, Tell, Waiter
from pool.errors import ConfigError, PoolError
from pool.interrupt import check_interrupt, interruptible
from pool.keys import SHARED, check_key, shown
from pool.lifecycle import Lifecycle
from pool.observer import Observer
from pool.runtime import Call, fork_count, loop_thread
from pool.snapshot import BackendInfo, idle_keys_of, infos_of, stats_of, step_of
from pool.stats import PoolStats

R = TypeVar("R")

logger = logging.getLogger(__name__)

DEFAULT_AGENT = "default"
"""The agent of an acquire that names none."""


class BackendPoolManager(Generic[B]):
    """A keyed pool of warm backends. All times in seconds; `PoolConfig` says what each one means.

    *backend_class* (or any function) is called with a key's effective config as keyword arguments:
    *default_config*, overlaid by *config_for* ``(primary, agent)`` if given, overlaid by the ``config`` of the acquire.

    *group_for* ``(primary, agent)`` names the group of a backend before it exists, or returns None: its limits are in
    ``groups`` of the settings. It is called by each acquire that finds no warm backend.

    *trust*, called often and from the event loop, returns for how many seconds from now this process may work for its
    keys; None, and no function at all: without limit. A remote host ends, by itself, what a process that is frozen or
    cut off has running there when that time is over (``pool/backends/pulse.py``).

    *claim_for* a key returns under which epoch this process owns it, or None: a host that can refuses older ones.
    *observer* hears of what happens; None: the steps in the lives of backends go to the log.
    One pool belongs to one process. Raises `ConfigError` for settings that break a rule.
    """

    def __init__(
        self,
        backend_class: Callable[..., B],
        default_config: Mapping[str, Any] | None = None,
        *,
        idle_timeout: float | None = None,
        max_backends: int | None = None,
        cleanup_interval: float | None = None,
        enable_periodic_cleanup: bool = True,
        acquire_timeout: float | None = None,
        max_lifetime: float | None = None,
        config_for: Callable[[str, str], Mapping[str, Any]] | None = None,
        settings: PoolConfig | None = None,
        trust: Trust | None = None,
        group_for: Callable[[str, str], str | None] | None = None,
        observer: Observer | None = None,
        claim_for: Callable[[str], Claim | None] | None = None,
    ) -> None:
        if not callable(backend_class):
            raise ConfigError(f"backend_class={backend_class!r}: must be a class or function that makes a backend")
        self._default_config = dict(default_config or {})
        self._config_for = config_for
        self._group_for = group_for
        given = {
            "idle_timeout": idle_timeout,
            "max_backends": max_backends,
            "cleanup_interval": cleanup_interval,
            "acquire_timeout": acquire_timeout,
            "max_lifetime": max_lifetime,
        }
        changes = {name: value for name, value in given.items() if value is not None}
        self._life = Lifecycle((settings or PoolConfig()).changed(**changes))
        self.observer = observer or Observer()
        self._hears_acquires = type(self.observer).acquired is not Observer.acquired
        self._connector = Connector(backend_class, lambda: self._life.config, trust, self, claim_for)
        self._lock = threading.Lock()
        self._fork = fork_count()
        self._periodic_cleanup = enable_periodic_cleanup
        self._reaper: Any = None
        self._preparing: dict[Entry, asyncio.Task[None]] = {}
        self._quiet = threading.Condition(self._lock)  # notified when a pool that shuts down loses an entry

    # -- borrowing

    def acquire_backend(
        self, key: str | None, agent: str | None = None, config: Mapping[str, Any] | None = None
    ) -> Borrowed[B]:
        """Borrow the key's backend, connecting it if there is none. ``key=None``: a fresh one, closed at release.

        Waits at most ``acquire_timeout``. Raises `PoolExhausted`, `AcquireTimeout`, `BackendUnavailable` (with
        ``retry_after``), `BackendClosed` (the pool is closed), `InvalidKey`, `ConfigError`.
        """
        override = dict(config) if config else None
        if (entry := self._warm(key, agent, override)) is not None:
            return Borrowed(self, entry, True)
        loop_thread().refuse_here()
        done = threading.Event()
        waiter = self._waiter(key, agent, override, done.set)
        with self._waiting(waiter) as timeout:
            with interruptible(done.set):
                done.wait(min(timeout, threading.TIMEOUT_MAX))
            return self._collect(waiter, timeout)

    async def aacquire_backend(
        self, key: str | None, agent: str | None = None, config: Mapping[str, Any] | None = None
    ) -> Borrowed[B]:
        """`acquire_backend` for any event loop."""
        override = dict(config) if config else None
        if (entry := self._warm(key, agent, override)) is not None:
            return Borrowed(self, entry, True)
        loop = asyncio.get_running_loop()
        done = asyncio.Event()
        waiter = self._waiter(key, agent, override, lambda: loop.call_soon_threadsafe(done.set))
        with self._waiting(waiter) as timeout:
            with interruptible(waiter.wake), contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):  # wait_for of Python 3.11 can swallow a cancellation
                    await done.wait()
            return self._collect(waiter, timeout)

    def _warm(self, key: str | None, agent: str | None, override: dict[str, Any] | None) -> Entry | None:
        """Take an entry that is ready, if there is one; without leaving the calling thread."""
        self._refuse_fork()
        if not isinstance(key, str):
            return None
        with self._lock:
            entry = self._life.acquire_warm((key, agent or DEFAULT_AGENT), override, monotonic())
        if entry is not None and self._hears_acquires:
            try:  # as `_say`, which costs as much as a listener does
                self.observer.acquired(key, entry.identity[1], 0.0, warm=True)
            except Exception:
                logger.exception("an observer of the pool failed")
        return entry

    def backend(
        self, key: str | None, agent: str | None = None, config: Mapping[str, Any] | None = None
    ) -> contextlib.AbstractContextManager[B]:
        """``with pool.backend(key) as backend:``: `acquire_backend`, released at the end of the block."""
        return Borrowing(self.acquire_backend, (key, agent, config))

    @contextlib.asynccontextmanager
    async def abackend(
        self, key: str | None, agent: str | None = None, config: Mapping[str, Any] | None = None
    ) -> AsyncIterator[B]:
        """``async with pool.abackend(key) as backend:``; use the backend's ``a...`` methods inside."""
        borrowed = await self.aacquire_backend(key, agent, config)
        try:
            yield borrowed.backend
        finally:
            borrowed.release()

    def with_backend(self, key: str | None, fn: Callable[[B], R], config: Mapping[str, Any] | None = None) -> R:
        """Call ``fn(backend)`` with the key's backend and return its result."""
        with self.backend(key, config=config) as backend:
            return fn(backend)

    def _waiter(
        self, key: str | None, agent: str | None, override: dict[str, Any] | None, wake: Callable[[], Any]
    ) -> Waiter:
        primary = "" if key is None else key if key == SHARED else check_key(key)
        identity: Identity = (primary, agent or DEFAULT_AGENT)
        config = self._effective(identity, override)
        return Waiter(identity, config, override, wake, pooled=key is not None, group=self._group(identity))

    @contextlib.contextmanager
    def _waiting(self, waiter: Waiter) -> Iterator[float]:
        """Queue a waiter for what the warm path could not give; how long it may wait. It may stop at any moment."""
        started, error = monotonic(), ""
        try:
            with self._deciding() as (now, effects):
                self._life.acquire(waiter, now, effects)
            if self._periodic_cleanup and self._reaper is None:
                self.start_reaper()
            yield self._life.config.acquire_timeout
        except BaseException as caught:
            error = type(caught).__name__
            self._abandon(waiter)
            raise
        finally:
            self._tell_acquired(waiter, monotonic() - started, error)

    def _tell_acquired(self, waiter: Waiter, seconds: float, error: str) -> None:
        key, agent = shown(waiter.identity[0], pooled=waiter.pooled), waiter.identity[1]
        if (entry := waiter.entry) is not None and not waiter.warm:
            self._say(self.observer.connected, key, agent, entry.backend.kind, entry.born - entry.began)
        self._say(self.observer.acquired, key, agent, seconds, warm=waiter.warm, error=error)

    def _effective(self, identity: Identity, override: dict[str, Any] | None) -> dict[str, Any]:
        specific = self._config_for(*identity) if self._config_for is not None else {}
        return {**self._default_config, **specific, **(override or {})}

    def _group(self, identity: Identity) -> str | None:
        return None if self._group_for is None else self._group_for(*identity)

    def _collect(self, waiter: Waiter, timeout: float) -> Borrowed[B]:
        if waiter.entry is None:
            if waiter.error is not None:
                raise waiter.error
            check_interrupt()
            with self._deciding() as (now, effects):
                self._life.give_up(waiter, timeout, now, effects)
        assert waiter.entry is not None
        return Borrowed(self, waiter.entry, waiter.warm)

    def _abandon(self, waiter: Waiter) -> None:
        with self._deciding() as (now, effects):
            self._life.give_up(waiter, None, now, effects)

    def _release(self, entry: Entry) -> None:
        if self._fork != fork_count():
            return  # the parent, which is still using it, will give it back
        with self._lock:
            if self._life.release_warm(entry, monotonic()):
                return
        with self._deciding() as (now, effects):
            self._life.release(entry, now, effects)
            if self._life.shut:
                self._quiet.notify_all()

    # -- carrying decisions out

    @contextlib.contextmanager
    def _deciding(self) -> Any:
        """Hold the lock for a decision, then do what it asks for."""
        self._refuse_fork()
        effects: Effects = []
        try:
            with self._lock:
                yield monotonic(), effects
        finally:
            try:
                self._carry_out(effects)
            except BaseException:  # from a signal's handler, between any two steps: the loop, which gets none, goes on
                loop_thread().loop.call_soon_threadsafe(self._carry_out, effects)
                raise

    def _carry_out(self, effects: Effects) -> None:
        while effects:
            if isinstance(effect := effects[0], Connect):
                loop_thread().spawn_apart(self._prepare(effect.entry, effect.first_close))
            elif isinstance(effect, Close):
                loop_thread().spawn_apart(self._close(effect))
            elif isinstance(effect, Tell):
                self._say(self.observer.step, step_of(effect))
            else:
                try:
                    effect.waiter.wake()
                except RuntimeError:  # its event loop is closed: nobody is there any more
                    self._abandon(effect.waiter)
            del effects[0]

    def say_executed(self, kind: str, seconds: float, outcome: str) -> None:
        """A backend of this pool ran a command; for the observer."""
        self._say(self.observer.executed, kind, seconds, outcome)

    def _say(self, method: Callable[..., None], *what: Any, **more: Any) -> None:
        """Tell the observer; what it makes of that is its own affair."""
        try:
            method(*what, **more)
        except Exception:
            logger.exception("an observer of the pool failed")

    async def _prepare(self, entry: Entry, first_close: tuple[Any, ...]) -> None:
        """Have the connector make the entry ready, then tell the lifecycle how it went."""
        error: PoolError | None = None
        backend: B | None = None
        check_failed = False
        if (task := asyncio.current_task()) is None or entry in self._preparing or not entry.preparing:
            return  # it was asked for twice: see `_deciding`
        self._preparing[entry] = task
        try:
            if first_close:
                await self._connector.make_way(first_close)
                with self._deciding() as (now, effects):
                    self._life.made_way(entry, now, effects)
            backend = await self._connector.ready(entry)
        except CheckFailed:
            check_failed = True
        except PoolError as caught:
            error = caught
        finally:
            del self._preparing[entry]
            with self._deciding() as (now, effects):
                if backend is not None:
                    self._life.connected(entry, backend, now, effects)
                elif check_failed:
                    self._life.check_failed(entry, now, effects)
                else:
                    error = error or PoolError("interrupted")
                    self._life.connect_failed(entry, error, now, effects)
                self._quiet.notify_all()

    async def _close(self, close: Close) -> None:
        try:
            await self._connector.destroy(close.backend)
        finally:
            with self._deciding() as (now, effects):
                self._life.gone(close.entry, now, effects)
                self._quiet.notify_all()

    def _refuse_fork(self) -> None:
        if self._fork != fork_count():
            raise PoolError("this pool belongs to the parent process: make a pool of its own in each forked child")

    # -- looking after the pool

    def get_stats(self) -> PoolStats:
        """Return a consistent snapshot; waits for no backend."""
        self._refuse_fork()
        with self._lock:
            return stats_of(self._life, monotonic())

    def get_backends(self, key: str | None = None) -> list[BackendInfo]:
        """Describe each live backend, of one key or of all, as it is at this moment; waits for none."""
        self._refuse_fork()
        with self._lock:
            return infos_of(self._life, monotonic(), key)

    def get(self, primary: str, agent: str = DEFAULT_AGENT) -> B | None:
        """Return the pooled backend and mark it as just used; None if there is none. Borrows nothing."""
        return self._look(primary, agent, touch=True)

    def peek(self, primary: str, agent: str = DEFAULT_AGENT) -> B | None:
        """`get` without marking it as used."""
        return self._look(primary, agent, touch=False)

    def touch(self, primary: str, agent: str = DEFAULT_AGENT) -> None:
        """Mark the backend as just used; nothing happens if it is not pooled."""
        self._look(primary, agent, touch=True)

    def _look(self, primary: str, agent: str, *, touch: bool) -> B | None:
        self._refuse_fork()
        with self._lock:
            entry = self._life.entries.get((primary, agent))
            if entry is None:
                return None
            if touch:
                self._life.touch(entry, monotonic())
            backend: B | None = entry.backend
            return backend

    def register(self, primary: str, agent: str, backend: B) -> None:
        """Adopt a backend that is connected already. One that was pooled under this identity is retired."""
        identity = (primary if primary == SHARED else check_key(primary), agent)
        with self._deciding() as (now, effects):
            self._life.register(identity, self._effective(identity, None), backend, now, effects, self._group(identity))
            self._connector.watch(backend)

    def health(self) -> dict[str, int]:
        """``{"size": live backends, "busy": those in use}``."""
        self._refuse_fork()
        with self._lock:
            counts = self._life.counts
        return {"size": counts["total"], "busy": counts["busy"]}

    def configure(self, **changes: Any) -> None:
        """Change settings (fields of `PoolConfig`) of a living pool. Raises `ConfigError`."""
        with self._deciding() as (now, effects):
            self._life.configure(self._life.config.changed(**changes), now, effects)

    # -- closing

    def sweep(self, now: float | None = None) -> list[Identity]:
        """Evict what is idle for too long and what exceeds the cap; return whom, when they are closed.

        *now*: seconds on the monotonic clock, for tests. Costs what it evicts, however many backends are idle.
        """
        self._refuse_fork()
        loop_thread().refuse_here()
        if self._connector.watches:
            loop_thread().run(self._connector.tick_health())
        evicted, effects = self._decide_sweep(now)
        if closing := self._carry_out_all(effects):  # else there is nothing to leave this thread for
            loop_thread().run(self._gone(closing))
        return evicted

    async def asweep(self, now: float | None = None) -> list[Identity]:
        """`sweep` for any event loop."""
        self._refuse_fork()
        await loop_thread().arun(self._connector.tick_health())
        evicted, effects = self._decide_sweep(now)
        await self._gone(self._carry_out_all(effects))
        return evicted

    def _decide_sweep(self, now: float | None) -> tuple[list[Identity], Effects]:
        effects: Effects = []
        with self._lock:
            return self._life.sweep(monotonic() if now is None else now, effects), effects

    def _carry_out_all(self, effects: Effects) -> list[Call[None]]:
        """Carry out; return what is being closed, for `_gone`. Whoever waits for that may be interrupted."""
        closing = [loop_thread().spawn_apart(self._close(each)) for each in effects if isinstance(each, Close)]
        self._carry_out([effect for effect in effects if not isinstance(effect, Close)])
        return closing

    async def _gone(self, calls: list[Call[None]]) -> None:
        # Shielded: a caller that is cancelled stops waiting; what has left the pool is closed all the same.
        await asyncio.gather(*(asyncio.shield(asyncio.wrap_future(call.future)) for call in calls))

    def close_key(self, primary: str) -> dict[str, list[str]]:
        """End all backends of a key: idle ones now, busy ones when their users are done.

        Returns ``{"closed": [agents], "retired": [agents]}``; closed ones are gone when it returns.
        """
        self._refuse_fork()
        return loop_thread().run(self.aclose_key(primary))

    async def aclose_key(self, primary: str) -> dict[str, list[str]]:
        """`close_key` for any event loop."""
        self._refuse_fork()
        effects: Effects = []
        with self._lock:
            closed, retired = self._life.close_key(primary, monotonic(), effects)
        await self._gone(self._carry_out_all(effects))
        return {"closed": [agent for _, agent in closed], "retired": [agent for _, agent in retired]}

    async def aexpel(self, match: Callable[[str, B | None], bool]) -> list[Identity]:
        """End the backends that match by key and backend (None: not made yet), in use or not; return whose, when gone.

        Their users see `BackendClosed`. For keys that this process must not work for any more.
        """
        self._refuse_fork()
        effects: Effects = []
        with self._lock:
            gone = self._life.expel(lambda key, backend: key != SHARED and match(key, backend), monotonic(), effects)
        given_up = [task for entry, task in self._preparing.items() if entry.state == "closed" and task.cancel()]
        await self._gone(self._carry_out_all(effects))
        if given_up:
            await asyncio.wait(given_up)
        return gone

    def idle_keys(self, idle_for: float) -> list[str]:
        """Return the keys all of whose backends have been idle for *idle_for* seconds."""
        self._refuse_fork()
        with self._lock:
            return [key for key in idle_keys_of(self._life, monotonic() - idle_for) if key != SHARED]

    def start_reaper(self) -> None:
        """Sweep every ``cleanup_interval`` seconds. Called by the first acquire unless periodic cleanup is off."""
        self._refuse_fork()
        with self._lock:
            if self._reaper is None and not self._life.shut:
                self._reaper = loop_thread().spawn_apart(self._reap())

    def stop_reaper(self) -> None:
        """Stop sweeping, until `start_reaper` is called."""
        self._periodic_cleanup = False
        with self._lock:
            reaper, self._reaper = self._reaper, None
        if reaper is not None:
            reaper.cancel()

    async def _reap(self) -> None:
        while True:
            await asyncio.sleep(self._life.config.cleanup_interval)
            try:
                await self.asweep()
            except Exception:  # one failing sweep must not be the last
                logger.exception("sweep failed")

    def destroy_all(self, grace: float = 10.0) -> None:
        """Close the pool for good: nobody new, *grace* seconds for those in use to be released, then close the rest.

        Users of a backend that is closed under them see `BackendClosed`. Returns when everything is gone, what the
        backends track included, or when ``close_timeout`` has passed for it. Can be repeated.
        """
        self._refuse_fork()
        loop_thread().refuse_here()
        with self._deciding() as (now, effects):
            self._life.shutdown(now, effects)
        self.stop_reaper()
        deadline = monotonic() + grace
        with self._lock:
            left = min(max(0.0, deadline - monotonic()), threading.TIMEOUT_MAX)
            self._quiet.wait_for(lambda: not any(entry.users for entry in self._life.live), left)
            effects = []
            rest = self._life.close_rest(monotonic(), effects)
        if busy := [entry for entry in rest if entry.users]:
            logger.warning("closing %d backends that are still in use after %g s", len(busy), grace)
        loop_thread().loop.call_soon_threadsafe(lambda: [task.cancel() for task in self._preparing.values()])
        self._carry_out(effects)
        with self._lock:
            self._quiet.wait_for(lambda: not self._life.groups.closing, self._life.config.close_timeout + 1)

    def dispose(self) -> None:
        """`destroy_all` without grace."""
        self.destroy_all(grace=0.0)

    def __repr__(self) -> str:
        counts = ", ".join(f"{n} {what}" for what, n in self._life.counts.items())
        return f"<BackendPoolManager {counts}>"
