"""A `Lifecycle` in a world of its own, driven by hand."""

from typing import Any

from pool.backends.base import Capabilities
from pool.config import PoolConfig
from pool.entry import Close, Connect, Entry, Waiter
from pool.errors import BackendUnavailable
from pool.lifecycle import Lifecycle


class Thing:
    """As much of a backend as the lifecycle looks at."""

    def __init__(self, name: str = "", max_users: int | None = None, weight: int = 0) -> None:
        self.name = name
        self.capabilities = Capabilities(max_users=max_users)
        self.usable = True
        self.working = False
        self.weight = weight

    def is_busy(self) -> bool:
        return self.working

    def __repr__(self) -> str:
        return f"<Thing {self.name}>"


class World:
    """A lifecycle, a clock that a test moves, and the driver's duties done by hand.

    An agent that has the name of a group belongs to it.
    """

    def __init__(self, **settings: Any) -> None:
        self.dice = 0.0
        self.life = Lifecycle(PoolConfig(**settings), jitter=lambda: self.dice)
        self.now = 1000.0
        self.effects: list[Any] = []
        self.woken: list[Waiter] = []

    def ask(self, key: str | None = "a", config: dict[str, Any] | None = None, agent: str = "x") -> Waiter:
        """Acquire, and queue where that has to wait."""
        identity = (key or "", agent)
        group = agent if agent in self.life.config.groups else None
        waiter = Waiter(identity, config or {}, config, lambda: None, pooled=key is not None, group=group)
        try:
            self.life.acquire(waiter, self.now, self.effects)
        finally:
            self.life.check_invariants()
        return waiter

    def take(self, kind: type) -> list[Any]:
        """Return the effects of one kind since the last time, and forget them."""
        found = [effect for effect in self.effects if isinstance(effect, kind)]
        self.effects = [effect for effect in self.effects if not isinstance(effect, kind)]
        self.life.check_invariants()
        return found

    def connect(self, *things: Thing) -> list[Entry]:
        """Finish every connect that was asked for."""
        entries = [effect.entry for effect in self.take(Connect)]
        given = list(things)
        for entry in entries:
            thing = given.pop(0) if given else Thing(entry.identity[0])
            self.life.connected(entry, thing, self.now, self.effects)
            self.life.check_invariants()
        return entries

    def fail(self, error: Exception | None = None) -> None:
        """Fail every connect that was asked for."""
        for effect in self.take(Connect):
            error = error or BackendUnavailable("refused", "refused", 0.0)
            self.life.connect_failed(effect.entry, error, self.now, self.effects)
            self.life.check_invariants()

    def hold(self, key: str | None = "a", thing: Thing | None = None, **rest: Any) -> Entry:
        """Acquire and connect; the entry is in use."""
        waiter = self.ask(key, **rest)
        if waiter.entry is None:
            self.connect(*([thing] if thing else []))
        assert waiter.entry is not None
        return waiter.entry

    def rest(self, key: str = "a", thing: Thing | None = None, **rest: Any) -> Entry:
        """Acquire, connect and release: the entry is idle."""
        return self.release(self.hold(key, thing, **rest))

    def release(self, entry: Entry) -> Entry:
        self.life.release(entry, self.now, self.effects)
        self.life.check_invariants()
        return entry

    def closed(self) -> list[Any]:
        """Finish every close that was asked for; returns the backends."""
        closes = self.take(Close)
        for close in closes:
            self.life.gone(close.entry, self.now, self.effects)
            self.life.check_invariants()
        return [effect.backend for effect in closes]

    def made_way(self, connect: Connect) -> None:
        """Finish what a connect has to close first."""
        self.life.made_way(connect.entry, self.now, self.effects)
        self.life.check_invariants()

    def warm(self, key: str = "a", config: dict[str, Any] | None = None) -> Entry | None:
        entry = self.life.acquire_warm((key, "x"), config, self.now)
        self.life.check_invariants()
        return entry

    def sweep(self) -> list[Any]:
        evicted = self.life.sweep(self.now, self.effects)
        self.life.check_invariants()
        return evicted
