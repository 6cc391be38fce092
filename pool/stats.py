"""What a pool counts, and a snapshot of it."""

from dataclasses import dataclass, field

from pool.entry import Effects, Entry, Tell
from pool.observer import StepName


@dataclass
class Counters:
    """Totals since the pool was made."""

    hits: int = 0
    connects: int = 0
    connect_failures: int = 0
    evicted_idle: int = 0
    evicted_lru: int = 0
    retired: int = 0
    closed: int = 0
    failures: dict[str, int] = field(default_factory=dict)

    def tell(self, what: StepName, entry: Entry, reason: str, seconds: float, effects: Effects) -> None:
        """A backend takes a step: count it, and have the driver tell of it."""
        self._count(what, reason)
        effects.append(Tell(what, entry.identity, entry.pooled, entry.backend, reason, seconds))

    def tell_lost(self, entry: Entry, now: float, effects: Effects) -> None:
        """The backend of an entry, if it had one, did not pass its check."""
        if entry.backend is not None:
            self.tell("closed", entry, "lost", now - entry.born, effects)

    def _count(self, what: StepName, reason: str) -> None:
        if what == "created":
            self.connects += 1
        elif what == "failed":
            self.connect_failures += 1
            self.failures[reason] = self.failures.get(reason, 0) + 1
        elif what == "evicted":
            self.evicted_idle += reason == "idle"
            self.evicted_lru += reason == "lru"
        elif what == "retired":
            self.retired += 1
        else:
            self.closed += 1


@dataclass(frozen=True)
class PoolStats:
    """What a pool holds at one moment, and what it did so far. A documented interface: names stay."""

    total_backends: int = 0
    """Live backends: connecting, idle, busy, retired, and closed ones that are not gone yet."""
    active_backends: int = 0
    """... in use by at least one task."""
    idle_backends: int = 0
    """... connected, unused and ready."""
    backends_by_key: dict[str, int] = field(default_factory=dict)
    """Backends of each key (primary) that can be acquired; keyless and retired ones are not in it."""
    modes: dict[str, int] = field(default_factory=dict)
    """Connected backends of kinds that have more than one way to work, by the first word of their `Backend.mode`."""
    connecting: int = 0
    retired: int = 0
    """Backends that take nobody new and are closed at their last release."""
    waiting: int = 0
    """Callers that wait for a connect, a turn or room."""
    hits: int = 0
    """Acquires that got a backend which was connected before they asked, since the pool was made."""
    connects: int = 0
    connect_failures: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    """Failed connects by reason."""
    evicted_idle: int = 0
    """Closed because nobody used them for ``idle_timeout``."""
    evicted_lru: int = 0
    """Closed, least recently used first, because the pool was full."""
    retired_total: int = 0
    """Ended because their config changed, their connection was lost, their lifetime ended or their key was closed."""
    oldest_busy: float = 0.0
    """Seconds since the longest busy backend was last idle."""
    groups: dict[str, dict[str, int]] = field(default_factory=dict)
    """For each group that has limits or backends: ``total`` (closing ones included), ``busy``, ``idle``, ``starting``
    (they have no connection yet) and ``weight`` (bytes, as last measured)."""
