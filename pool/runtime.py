"""The event loop of this process: one daemon thread, started on first use, and the sync door to it.

Backends do their IO on this loop. Task code calls plain functions: `LoopThread.run` hands a coroutine over and waits.
One hop costs some 45 us, so nothing that needs no IO comes through here.
"""

import asyncio
import concurrent.futures
import contextlib
import os
import threading
from collections.abc import Coroutine
from contextvars import Context
from typing import Any, Generic, TypeVar

from pool.errors import PoolError
from pool.interrupt import interruptible

T = TypeVar("T")

CLEANUP_TIMEOUT = 15.0
"""Seconds that an interrupted caller waits for its coroutine to clean up after itself."""

_fork_count = 0
"""How many forks lie between the start of the program and this process."""


def fork_count() -> int:
    """Return a number that differs between a process and its forked children."""
    return _fork_count


def _after_fork_in_child() -> None:
    global _fork_count, _current, _start_lock
    _fork_count += 1
    _current = None  # the thread of the parent's loop does not exist here
    _start_lock = threading.Lock()  # the parent's may have been held


def was_cancelled() -> bool:
    """Say whether a CancelledError just caught was meant for this task, and not let out by what it awaited."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class LoopThread:
    """An event loop in a thread of its own."""

    def __init__(self, name: str = "backend-pool") -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._main, name=f"{name}-loop", daemon=True)
        self.thread.start()

    def _main(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
        finally:
            self.loop.run_until_complete(self._wind_up())
            self.loop.close()

    @staticmethod
    async def _wind_up() -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CLEANUP_TIMEOUT)
        loop = asyncio.get_running_loop()
        await loop.shutdown_asyncgens()
        await loop.shutdown_default_executor()

    def spawn(self, coroutine: Coroutine[Any, Any, T]) -> "Call[T]":
        """Start the coroutine on the loop; from any thread."""
        call = Call(self, coroutine)
        call.begin()
        return call

    def spawn_apart(self, coroutine: Coroutine[Any, Any, T]) -> "Call[T]":
        """`spawn` of what is nobody's: apart from the interrupt and the output of the task that happens to begin it."""
        return Context().run(self.spawn, coroutine)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run the coroutine on the loop and wait for its result.

        An exception that arrives in the calling thread meanwhile (KeyboardInterrupt, a soft time limit) cancels the
        coroutine and waits for its clean-up before it goes on. Raises `PoolError` on the loop's own thread, where
        waiting would be a deadlock.
        """
        try:
            self.refuse_here()
        except PoolError:
            coroutine.close()
            raise
        return Errand(self, coroutine).wait()

    def refuse_here(self) -> None:
        """Raise `PoolError` on the loop's own thread: what is about to wait for the loop would wait for ever."""
        if threading.current_thread() is self.thread:
            raise PoolError("a blocking call on the event loop's thread would wait for itself: await the a... method")

    async def arun(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Await the coroutine, on this loop, from any event loop."""
        if asyncio.get_running_loop() is self.loop:
            return await coroutine
        call = self.spawn(coroutine)
        done = asyncio.wrap_future(call.future)
        try:
            with interruptible(call.cancel):
                return await asyncio.shield(done)
        except asyncio.CancelledError:
            call.cancel()
            await asyncio.wait({done}, timeout=CLEANUP_TIMEOUT)
            if done.done():
                done.exception()  # fetched, so that nobody complains that it never was
            raise

    def stop(self) -> None:
        """Cancel what still runs, wait for it (bounded), end the thread."""
        if self.loop.is_closed():
            return
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(2 * CLEANUP_TIMEOUT)


class Errand(Generic[T]):
    """A coroutine under way on the loop, for a thread that waits for it. ``done``: it has ended, or will not begin."""

    def __init__(self, owner: LoopThread, coroutine: Coroutine[Any, Any, T]) -> None:
        self.owner = owner
        self.done = False
        self._coroutine = coroutine
        self._task: asyncio.Task[T] | None = None
        self._begun = False
        self._result: T
        self._error: BaseException | None = None
        # Who waits in a thread passes through this lock, which is let go of at the end. A concurrent.futures.Future
        # costs 20 us more: it wakes the waiter while it has its lock, so that the two threads take turns.
        self._gate = threading.Lock()
        self._gate.acquire()

    def begin(self) -> None:
        """Hand the coroutine over to the loop; once."""
        self._begun = True
        try:
            self.owner.loop.call_soon_threadsafe(self._start)
        except RuntimeError:
            self._never_started("the event loop of the pool is closed")
            raise PoolError("the event loop of the pool is closed") from None

    def _start(self) -> None:
        if self.done:  # cancelled before
            return
        self._task = self.owner.loop.create_task(self._coroutine)
        self._task.add_done_callback(self._done)

    def _never_started(self, why: str) -> None:
        self._coroutine.close()
        self._end(PoolError(why))

    def _done(self, task: asyncio.Task[T]) -> None:
        if task.cancelled():
            self._end(PoolError("cancelled: the event loop of the pool was stopped"))
        elif (error := task.exception()) is not None:
            self._end(error)
        else:
            self._result = task.result()
            self._end(None)

    def _end(self, error: BaseException | None) -> None:
        self._error = error
        self.done = True
        self._gate.release()

    def _outcome(self) -> T:
        try:
            if self._error is not None:
                raise self._error
            return self._result
        finally:
            del self  # as in `wait`

    def cancel(self) -> None:
        """Ask the coroutine to stop; it is done when it has cleaned up."""

        def cancel() -> None:  # runs after `_start`, if that was handed over
            if self._task is not None:
                self._task.cancel()
            elif not self.done:
                self._never_started("cancelled before it began")

        with contextlib.suppress(RuntimeError):  # a closed loop has cancelled everything already
            self.owner.loop.call_soon_threadsafe(cancel)

    def abandon(self) -> None:
        """Cancel, and wait in this thread for the clean-up (bounded)."""
        if not self.done:
            self.cancel()
            if self._gate.acquire(timeout=CLEANUP_TIMEOUT):
                self._gate.release()

    def wait(self) -> T:
        """Wait in this thread; see `LoopThread.run`. Raises what the task is interrupted with."""
        try:
            with interruptible(self.cancel):
                if not self._begun:
                    self.begin()
                with self._gate:
                    pass
                return self._outcome()
        except BaseException:
            self.abandon()
            raise
        finally:
            del self  # an exception's traceback would keep this call, and the exception itself, alive in a cycle


class Call(Errand[T]):
    """One whose end others can hear of, too: by ``future``."""

    def __init__(self, owner: LoopThread, coroutine: Coroutine[Any, Any, T]) -> None:
        super().__init__(owner, coroutine)
        self.future: concurrent.futures.Future[T] = concurrent.futures.Future()

    def _end(self, error: BaseException | None) -> None:
        super()._end(error)
        if error is None:
            self.future.set_result(self._result)
        else:
            self.future.set_exception(error)


_current: LoopThread | None = None
_start_lock = threading.Lock()
os.register_at_fork(after_in_child=_after_fork_in_child)


def loop_thread() -> LoopThread:
    """Return the loop thread of this process, started on first use."""
    global _current
    current = _current
    if current is None or not current.thread.is_alive():
        with _start_lock:
            if _current is None or not _current.thread.is_alive():
                _current = LoopThread()
            current = _current
    return current
