"""One entry of a pool, who waits for it, and what the driver is told to do. Data only.

The state machine is a table; an event that a state does not know raises, and shows the entry's recent history.
"""

from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import count
from typing import Any, Literal, NamedTuple

from pool.errors import PoolError
from pool.observer import StepName

Identity = tuple[str, str]
"""``(primary, agent)``: whom a backend belongs to, and which of that key's backends it is."""

State = Literal["connecting", "idle", "busy", "retired", "closed"]
Event = Literal["connected", "failed", "acquire", "release", "last_release", "check", "retire", "close"]

TRANSITIONS: Mapping[State, Mapping[Event, State]] = {
    "connecting": {"connected": "idle", "failed": "closed", "retire": "retired", "close": "closed"},
    "idle": {"acquire": "busy", "check": "connecting", "close": "closed"},
    "busy": {
        "acquire": "busy",
        "release": "busy",
        "last_release": "idle",
        "retire": "retired",
        "close": "closed",
    },
    # A retired entry takes nobody new; whoever was already waiting for it is still served.
    "retired": {
        "connected": "retired",
        "failed": "closed",
        "acquire": "retired",
        "release": "retired",
        "last_release": "retired",
        "close": "closed",
    },
    "closed": {},
}

_serials = count(1)


class IllegalTransition(RuntimeError):
    """A bug in this package: an event that the state does not know, with the entry's recent history."""


class Entry:
    """One backend of the pool, from the decision to connect it until it is closed."""

    __slots__ = (
        "backend",
        "began",
        "born",
        "busy_since",
        "config",
        "displaced",
        "ending",
        "expires",
        "gone",
        "group",
        "history",
        "identity",
        "idle_since",
        "max_users",
        "override",
        "pooled",
        "preparing",
        "serial",
        "state",
        "users",
        "uses",
        "waiters",
    )

    def __init__(
        self,
        identity: Identity,
        config: dict[str, Any],
        override: dict[str, Any] | None,
        now: float,
        *,
        pooled: bool,
        group: str | None = None,
    ) -> None:
        self.identity = identity
        self.group = group
        self.config = config  # effective: what the backend is made from
        self.override = override  # the caller's part of it: compared first, because it is nearly always None
        self.pooled = pooled  # False: keyless, closed at release
        self.serial = next(_serials)
        self.state: State = "connecting"
        self.preparing = False  # a `Connect` is under way: the driver has the backend in hand
        self.displaced: tuple[str | None, ...] = ()  # groups of the backends that must be gone before it may connect
        self.backend: Any = None
        self.users = 0
        self.uses = 0  # how often it was acquired
        self.began = now  # when the present connect, or check, was asked for
        self.born = now  # when it was connected
        self.ending = ""  # why it is retired
        self.gone = False  # its place was given back
        self.max_users: int | None = None
        self.waiters: list[Waiter] = []  # of a pool's idle backends nearly all: an empty deque takes 0.8 KB
        self.expires = float("inf")
        self.idle_since = now
        self.busy_since = now
        self.history: deque[str] = deque(maxlen=12)

    def apply(self, event: Event) -> None:
        """Follow the table; raise `IllegalTransition` with the history when it has no such step."""
        try:
            self.state = TRANSITIONS[self.state][event]
        except KeyError:
            raise IllegalTransition(
                f"{event!r} in state {self.state!r} of {self!r}; before: {' '.join(self.history) or 'nothing'}"
            ) from None
        self.history.append(event)

    def __repr__(self) -> str:
        return f"<Entry #{self.serial} {self.identity[0]!r}/{self.identity[1]} {self.state} users={self.users}>"


class Waiter:
    """Somebody who waits for a backend: granted an entry or given an error exactly once, then woken."""

    __slots__ = ("config", "entry", "error", "group", "identity", "override", "pooled", "ticket", "wake", "warm")

    def __init__(
        self,
        identity: Identity,
        config: dict[str, Any],
        override: dict[str, Any] | None,
        wake: Callable[[], Any],
        *,
        pooled: bool,
        group: str | None = None,
    ) -> None:
        self.identity = identity
        self.group = group
        self.config = config
        self.override = override
        self.pooled = pooled
        self.wake = wake
        self.ticket: int | None = None  # its place among those who wait for room, if it is one of them
        self.warm = False  # the backend it gets was connected before it asked
        self.entry: Entry | None = None
        self.error: PoolError | None = None


class Connect(NamedTuple):
    """Make the entry's backend ready: check the one it has, or connect a new one.

    When *first_close* is gone, and before it connects, the driver says so: `Lifecycle.made_way`.
    """

    entry: Entry
    first_close: tuple[Any, ...] = ()  # backends that must be gone before: the cap counts live ones


class Close(NamedTuple):
    """Close a backend that has left the pool."""

    entry: Entry
    backend: Any


class Wake(NamedTuple):
    """Tell a waiter that it has been served."""

    waiter: Waiter


class Tell(NamedTuple):
    """Tell who observes the pool of a step; see `pool.observer.Step`."""

    what: StepName
    identity: Identity
    pooled: bool
    backend: Any
    reason: str
    seconds: float


Effects = list[Connect | Close | Wake | Tell]


def says_busy(backend: Any) -> bool:
    """Whether the backend says that it works although nobody holds it."""
    with suppress(Exception):  # a backend that cannot even say so is not spared
        return bool(backend.is_busy())
    return False
