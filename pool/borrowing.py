"""A borrowed backend: what an acquire returns."""

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

from pool.backends.base import Backend
from pool.entry import Entry

B = TypeVar("B", bound=Backend)


class Pool(Protocol[B]):
    """The side of the manager that a borrowed backend needs."""

    def acquire_backend(
        self, key: str | None, agent: str | None = None, config: Mapping[str, Any] | None = None
    ) -> "Borrowed[B]":
        """See `BackendPoolManager.acquire_backend`."""

    def _release(self, entry: Entry) -> None: ...


class Borrowed(Generic[B]):
    """A backend in use by one caller, until `release`. ``warm``: it was connected before the caller asked."""

    __slots__ = ("_entry", "_manager", "backend", "warm")

    def __init__(self, manager: "Pool[B]", entry: Entry, warm: bool) -> None:
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
    """``with pool.backend(key) as backend``: acquired on entry, released on exit."""

    __slots__ = ("_borrowed", "_manager", "_request")

    def __init__(self, manager: "Pool[B]", request: tuple[Any, ...]) -> None:
        self._manager = manager
        self._request = request

    def __enter__(self) -> B:
        self._borrowed = self._manager.acquire_backend(*self._request)
        return self._borrowed.backend

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._borrowed.release()
