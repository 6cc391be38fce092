"""A borrowed backend: what an acquire returns."""

from collections.abc import Callable
from typing import Any, Generic, Protocol, Self, TypeVar

from pool.backends.base import Backend
from pool.entry import Entry

B = TypeVar("B", bound=Backend)


class Pool(Protocol):
    """The side of the manager that a borrowed backend needs."""

    def _release(self, entry: Entry) -> None: ...


class Borrowed(Generic[B]):
    """A backend in use by one caller, until `release`. ``warm``: it was connected before the caller asked."""

    __slots__ = ("_entry", "_manager", "backend", "warm")

    def __init__(self, manager: Pool, entry: Entry, warm: bool) -> None:
        self._manager = manager
        self._entry: Entry | None = entry
        self.backend: B = entry.backend
        self.warm = warm

    def release(self) -> None:
        """Give the backend back. A second call does nothing."""
        entry, self._entry = self._entry, None
        if entry is not None:
            self._manager._release(entry)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Borrowing(Generic[B]):
    """``with pool.backend(key) as backend``: acquired on entry by ``acquire(*request)``, released on exit."""

    __slots__ = ("_acquire", "_borrowed", "_request")

    def __init__(self, acquire: Callable[..., Borrowed[B]], request: tuple[Any, ...]) -> None:
        self._acquire = acquire
        self._request = request

    def __enter__(self) -> B:
        self._borrowed = self._acquire(*self._request)
        return self._borrowed.backend

    def __exit__(self, *_: object) -> None:
        self._borrowed.release()
