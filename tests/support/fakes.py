"""A backend whose connects, checks and closes a test holds, fails and counts."""

import asyncio
import threading
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from pool.backends.base import Backend, Capabilities
from pool.errors import BackendClosed
from tests.support.waiting import wait_until


class Gate:
    """A door that coroutines of any loop wait at. Open at first."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._open.set()

    def shut(self) -> None:
        """Let nobody through from now on."""
        self._open.clear()

    def open(self) -> None:
        """Let everybody through."""
        self._open.set()

    @property
    def is_open(self) -> bool:
        """Whether anybody may pass."""
        return self._open.is_set()

    async def passed(self) -> None:
        """Return when the gate is open."""
        while not self._open.is_set():
            await asyncio.sleep(0.001)


class Farm:
    """Makes `FakeBackend`s: a factory for `BackendPoolManager`, and the account of all that it made.

    ``connects``, ``checks`` and ``closes`` are gates. An exception in ``connect_error``, ``check_error`` or
    ``close_error`` is raised by the next such call, after its gate.
    """

    def __init__(self, *, max_users: int | None = None) -> None:
        self.max_users = max_users
        self.made: list[FakeBackend] = []
        self.connects, self.checks, self.closes = Gate(), Gate(), Gate()
        self.connect_error: BaseException | None = None
        self.check_error: BaseException | None = None
        self.close_error: BaseException | None = None
        self.connect_calls = 0
        self.check_calls = 0
        self.ticks = 0
        self.open_now = 0
        self.most_open = 0
        self._lock = threading.Lock()

    def __call__(self, **config: Any) -> "FakeBackend":
        backend = FakeBackend(self, config)
        with self._lock:
            self.made.append(backend)
        return backend

    def count(self, step: int) -> None:
        """Count a backend that begins to exist, or has ceased to."""
        with self._lock:
            self.open_now += step
            self.most_open = max(self.most_open, self.open_now)

    def wait_for_connects(self, number: int) -> None:
        """Return when *number* connects have begun since the farm was made."""
        wait_until(lambda: self.connect_calls >= number, f"{number} connects have begun")

    @property
    def leaked(self) -> "list[FakeBackend]":
        """Backends that were opened, if only by half, and never closed."""
        return [backend for backend in self.made if backend.opened and not backend.closed]


class FakeBackend(Backend):
    """See `Farm`."""

    kind = "fake"

    def __init__(self, farm: Farm, config: dict[str, Any]) -> None:
        super().__init__()
        self.capabilities = Capabilities(max_users=farm.max_users)
        self.farm = farm
        self.config = config
        self.opened = False
        self.closed = False
        self.close_calls = 0
        self.working = False

    async def open(self) -> None:
        self.opened = True
        self.farm.count(1)
        self.farm.connect_calls += 1
        await self.farm.connects.passed()
        if self.farm.connect_error is not None:
            raise self.farm.connect_error

    async def check(self) -> None:
        self.farm.check_calls += 1
        await self.farm.checks.passed()
        if self.farm.check_error is not None:
            raise self.farm.check_error

    async def close(self) -> None:
        self.close_calls += 1
        await self.farm.closes.passed()
        if self.farm.close_error is not None:
            raise self.farm.close_error
        if self.opened and not self.closed:
            self.farm.count(-1)
        self.closed = True

    def is_busy(self) -> bool:
        return self.working

    def work(self) -> str:
        """Stands in for what task code does."""
        if self.closed or self.status == "closed":
            raise BackendClosed("closed")
        return "worked"


class TickingBackend(FakeBackend):
    """Looks after itself in each sweep."""

    async def tick_health(self, now: float) -> None:
        self.farm.ticks += 1
        assert not self.closed, "looked after although it is closed"


class TickingFarm(Farm):
    """Makes `TickingBackend`s."""

    def __call__(self, **config: Any) -> TickingBackend:
        backend = TickingBackend(self, config)
        self.made.append(backend)
        return backend


class CountedBackend(FakeBackend):
    """Counts, for its kind (``kind`` of its config), how many are open and how many of them are in `open`."""

    async def open(self) -> None:
        book = self.farm.books[self.config["kind"]]
        book.alive += 1
        book.opening += 1
        book.most_alive = max(book.most_alive, book.alive)
        book.most_opening = max(book.most_opening, book.opening)
        try:
            await super().open()
            await asyncio.sleep(0.001)
        finally:
            book.opening -= 1

    async def close(self) -> None:
        await asyncio.sleep(0.001)
        before = self.closed
        await super().close()
        if self.opened and not before:
            self.farm.books[self.config["kind"]].alive -= 1


@dataclass
class Book:
    """What `CountedBackend`s of one kind count."""

    alive: int = 0
    opening: int = 0
    most_alive: int = 0
    most_opening: int = 0


class CountingFarm(Farm):
    """Makes `CountedBackend`s."""

    def __init__(self) -> None:
        super().__init__()
        self.books: dict[str, Book] = defaultdict(Book)

    def __call__(self, **config: Any) -> CountedBackend:
        backend = CountedBackend(self, config)
        self.made.append(backend)
        return backend
