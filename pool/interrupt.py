"""Interrupts: how a task is ended from outside while it waits for its backend.

Threads cannot be killed, and need not be: what takes long in a task is waiting at one of the pool's doors, for a
backend, a command, a file or an agent's turn. A door that is interrupted cancels what it waits for (which kills the
command's process group, as every cancel does) and raises the interrupt's error in the waiting thread.
"""

import contextlib
import threading
from collections.abc import Callable
from contextvars import ContextVar
from types import TracebackType
from typing import Self

_CURRENT: ContextVar["Interrupt | None"] = ContextVar("pool_interrupt", default=None)


class Interrupt:
    """``with interrupt:`` makes it the one of this thread, and of the coroutines that are run from it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._once = False
        self._waits: list[Callable[[], object]] = []

    def set(self, error: BaseException, *, once: bool = False) -> None:
        """Raise *error* at the door where the task waits, and at each one that it comes to afterwards; any thread.

        *once*: only at the first of them, so that the task can clean up. It does not take the place of one that stays.
        """
        with self._lock:
            if self._error is not None and (once or not self._once):
                return
            self._error, self._once = error, once
            waits = list(self._waits)
        for wake in waits:
            with contextlib.suppress(RuntimeError):  # the event loop of one that waits is closed: it waits no more
                wake()

    @property
    def is_set(self) -> bool:
        """Whether an error waits to be raised."""
        return self._error is not None

    def check(self) -> None:
        """Raise the error, if there is one."""
        with self._lock:
            error = self._error
            if error is None:
                return
            if self._once:
                self._error = None
        raise error

    def begin_wait(self, wake: Callable[[], object]) -> None:
        """Have *wake* called, at most once, by an interrupt that comes until `end_wait`."""
        self.check()
        with self._lock:
            self._waits.append(wake)
            late = self._error is not None
        if late:
            wake()

    def end_wait(self, wake: Callable[[], object]) -> None:
        """The wait is over."""
        with self._lock:
            self._waits.remove(wake)

    def __enter__(self) -> Self:
        self._token = _CURRENT.set(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        _CURRENT.reset(self._token)


class _Door:
    """A wait that an interrupt ends. No generator: every command and every file operation comes through here."""

    __slots__ = ("_interrupt", "_wake")

    def __init__(self, interrupt: Interrupt, wake: Callable[[], object]) -> None:
        self._interrupt = interrupt
        self._wake = wake

    def __enter__(self) -> None:
        self._interrupt.begin_wait(self._wake)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._interrupt.end_wait(self._wake)
        if isinstance(error, Exception):
            try:
                self._interrupt.check()
            except BaseException as interrupted:
                if interrupted is not error:
                    raise interrupted from error


_OPEN = contextlib.nullcontext()


def interruptible(wake: Callable[[], object]) -> contextlib.AbstractContextManager[None]:
    """Wait inside of this block: an interrupt of the current task calls *wake*, and is raised at the end of the block.

    What *wake* made the block raise gives way to the interrupt's error; a result that came all the same is kept, and
    the next door raises.
    """
    interrupt = _CURRENT.get()
    return _OPEN if interrupt is None else _Door(interrupt, wake)


def check_interrupt() -> None:
    """Raise what the current task was interrupted with."""
    if (interrupt := _CURRENT.get()) is not None:
        interrupt.check()
