"""Prometheus metrics, in two registries with no name in common.

`PoolMetrics` belongs to the process that has the backends, `NodeMetrics` to the worker's main process, which owns the
shards; with threads they are one process. Each renders its registry to text, `merge` joins the texts, and
`pool.metrics_server` serves them. docs/metrics.md describes every metric. No label ever holds a key: keys name people,
and there are many.
"""

import logging
import math
from asyncio import AbstractEventLoop
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from time import monotonic
from typing import TYPE_CHECKING, Any

from pool.metric_families import (
    PREFIX,
    AtScrape,
    Labels,
    Series,
    Tally,
    client,
    counter,
    gauge,
    histogram,
    merge,
    render,
)
from pool.metrics_server import MetricsServer
from pool.observer import Observer, Step

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

__all__ = ["LoopLag", "MetricsServer", "NodeMetrics", "PoolMetrics", "merge"]

logger = logging.getLogger(__name__)

LAG_EVERY = 0.5
"""Seconds between two looks at the event loop."""
LAG_WINDOW = 60.0
"""Seconds for which the worst of them is shown: longer than any sensible scrape interval."""

ACQUIRE_BUCKETS = (0.001, 0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
CONNECT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20)
EXEC_BUCKETS = (0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 900, 3600)
MOVE_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)

FAILURE_REASONS = ("resolve", "refused", "unreachable", "timeout", "host_key", "login", "sessions", "lost", "setup")
EVICTION_REASONS = ("idle", "lru")
RETIREMENT_REASONS = ("config", "lost", "lifetime", "key_closed", "replaced")

Snapshot = Callable[[], Mapping[str, Any]]


class PoolMetrics(Observer):
    """What a pool does. Make it in the process that has the pool: after a fork its locks may be held for ever.

    *snapshot* is called by each scrape, on any thread, and must wait for nothing. Of what it returns are read
    ``backends`` (a mapping of ``(state, kind)`` to a count), ``waiting`` and ``oldest_busy_s``.
    Raises `ConfigError` without prometheus_client.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self.registry: CollectorRegistry = client().CollectorRegistry()
        self.lag: LoopLag | None = None
        self._snapshot = snapshot
        self._seen: set[Labels] = set()
        self._warm, self._cold = Tally(ACQUIRE_BUCKETS), Tally(ACQUIRE_BUCKETS)
        self._connect = Series(lambda _: Tally(CONNECT_BUCKETS))
        self._exec = Series(lambda _: Tally(EXEC_BUCKETS))
        self._errors = self._counter("acquire_errors", "Acquires that got none, by class of error.", "error")
        self._created = self._counter("creations", "Backends that were connected.", "kind")
        self._failed = self._counter("connect_failures", "Connects that failed.", "reason", FAILURE_REASONS)
        self._evicted = self._counter("evictions", "Idle backends that had to go.", "reason", EVICTION_REASONS)
        self._retired = self._counter(
            "retirements", "Backends that take nobody new any more.", "reason", RETIREMENT_REASONS
        )
        self._closed = self._counter("closes", "Backends that are gone.", "reason")
        self.registry.register(AtScrape(self._families))

    def _counter(self, name: str, meaning: str, label: str, known: tuple[str, ...] = ()) -> Series:
        made = client().Counter(name, meaning, [label], namespace=PREFIX, registry=self.registry)
        return Series(lambda values: made.labels(*values), [(value,) for value in known])

    def watch_loop(self, loop: AbstractEventLoop) -> None:
        """From here on, measure how late the pool's event loop is."""
        self.lag = LoopLag(loop)
        self.lag.start()

    def close(self) -> None:
        """Measure the event loop no longer."""
        if self.lag is not None:
            self.lag.stop()

    def step(self, step: Step) -> None:
        # A connect is counted here and not by `connected`, which each of those hears who waited for the same one.
        if step.what == "created":
            self._created[step.kind,].inc()
            self._connect[step.kind,].observe(step.seconds)
        elif step.what == "failed":
            self._failed[step.reason,].inc()
        elif step.what == "evicted":
            self._evicted[step.reason,].inc()
        elif step.what == "retired":
            self._retired[step.reason,].inc()
        else:
            self._closed[step.reason,].inc()

    def acquired(self, key: str, agent: str, seconds: float, *, warm: bool, error: str = "") -> None:  # noqa: ARG002
        if error:
            self._errors[error,].inc()
        else:
            (self._warm if warm else self._cold).observe(seconds)

    def executed(self, kind: str, seconds: float, outcome: str) -> None:
        self._exec[kind, outcome].observe(seconds)

    def render(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return render(self.registry)

    def _families(self, *, values: bool) -> Iterator[Any]:
        now = _taken(self._snapshot) if values else {}
        waits: dict[Labels, Tally] = {("true",): self._warm, ("false",): self._cold}
        yield histogram("acquire_seconds", "Wait for a backend that was got.", waits, ("warm",))
        yield counter("warm_hits", "Acquires that got a backend which was connected before.", self._warm.count)
        yield counter("warm_misses", "Acquires that waited for their backend to connect.", self._cold.count)
        yield histogram("connect_seconds", "Connects that succeeded.", self._connect, ("kind",))
        yield histogram("exec_seconds", "Commands, and turns of agents.", self._exec, ("kind", "outcome"))
        counts: Mapping[Labels, int] | None = now.get("backends")
        if counts is not None:
            self._seen |= set(counts)
            counts = {**dict.fromkeys(self._seen, 0), **counts}  # or the last of a kind would never be seen to go
        yield gauge("backends", "Live backends now.", counts, ("state", "kind"))
        yield gauge("waiters", "Callers that wait for a backend now.", now.get("waiting"))
        yield gauge("oldest_busy_seconds", "Since the longest busy backend was last idle.", now.get("oldest_busy_s"))
        lag = self.lag.worst() if self.lag is not None and values else None
        yield gauge("loop_lag_seconds", "Worst delay of the event loop within the last minute.", lag)


class NodeMetrics:
    """What a node owns. *snapshot*, called by each scrape as that of `PoolMetrics`, returns a ``pool_stats``.

    Of it are read ``shards``, ``shards_total``, ``lease_age_s`` (None: no leases, or none yet) and ``draining``.
    *lease_ttl*: seconds; None with static placement. Raises `ConfigError` without prometheus_client.
    """

    def __init__(self, snapshot: Snapshot, lease_ttl: float | None = None) -> None:
        self.registry: CollectorRegistry = client().CollectorRegistry()
        self._snapshot = snapshot
        self._lease_ttl = lease_ttl
        self._handoff, self._takeover = Tally(MOVE_BUCKETS), Tally(MOVE_BUCKETS)
        self.registry.register(AtScrape(self._families))

    def handed_over(self, seconds: float) -> None:
        """A shard of this node was released to another one."""
        self._handoff.observe(seconds)

    def took_over(self, seconds: float) -> None:
        """A shard of a dead node is served here."""
        self._takeover.observe(seconds)

    def render(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return render(self.registry)

    def _families(self, *, values: bool) -> Iterator[Any]:
        now = _taken(self._snapshot) if values else {}
        yield histogram("handoff_seconds", "Handing a shard over, until it is released.", {(): self._handoff})
        yield histogram("takeover_seconds", "Taking a dead node's shard, until it is served.", {(): self._takeover})
        yield gauge("shards_owned", "Shards that this node owns.", now.get("shards"))
        suspended = "Shards that it may own, where the lease store does not say: nothing starts for them."
        yield gauge("shards_suspended", suspended, now.get("shards_suspended"))
        yield gauge("shards", "Shards that there are.", now.get("shards_total"))
        yield gauge("lease_age_seconds", "Since the leases were last renewed.", now.get("lease_age_s"))
        yield gauge("lease_ttl_seconds", "The setting POOL_LEASE_TTL.", self._lease_ttl)
        yield gauge("draining", "1 while the node hands everything over.", now.get("draining"))


class LoopLag:
    """How late an event loop runs what is due: what waits for a blocked loop are all backends of the process."""

    def __init__(self, loop: AbstractEventLoop) -> None:
        self._loop = loop
        self._late: deque[tuple[float, float]] = deque(maxlen=math.ceil(LAG_WINDOW / LAG_EVERY))
        self._due = math.inf
        self._stopped = False

    def start(self) -> None:
        """Look from here on; from any thread."""
        self._loop.call_soon_threadsafe(self._arm)

    def stop(self) -> None:
        """Look no more; from any thread."""
        self._stopped = True
        self._due = math.inf

    def worst(self) -> float:
        """Seconds: the worst delay within `LAG_WINDOW`, one that is not over yet included; from any thread."""
        now = monotonic()
        past = max((lag for when, lag in tuple(self._late) if now - when <= LAG_WINDOW), default=0.0)
        return max(past, now - self._due)

    def _arm(self) -> None:
        if not self._stopped:
            self._due = monotonic() + LAG_EVERY
            self._loop.call_later(LAG_EVERY, self._look)

    def _look(self) -> None:
        now = monotonic()
        self._late.append((now, max(0.0, now - self._due)))
        self._arm()


def _taken(snapshot: Snapshot) -> Mapping[str, Any]:
    """Take the snapshot; without one, a scrape shows what it has."""
    try:
        return snapshot()
    except Exception:
        logger.exception("no snapshot for the metrics")
        return {}
