"""What `pool.metrics` is made of: series that are cheap to count and are made into Prometheus' families by a scrape."""

import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from pool.errors import ConfigError

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

PREFIX = "backend_pool"

MAX_SERIES = 100
"""Series of one metric at most; the rest count as ``other``. Users' backends make up their own kinds and reasons."""

Labels = tuple[str, ...]


class Tally:
    """A histogram of seconds. The library's takes five times as long to observe, which a warm acquire would feel."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        self._lock = threading.Lock()

    def observe(self, seconds: float) -> None:
        """Count one; from any thread."""
        place = bisect_left(self._bounds, seconds)
        with self._lock:
            self._counts[place] += 1
            self._sum += seconds

    @property
    def count(self) -> int:
        """How many there were."""
        return sum(self._counts)

    def buckets(self) -> tuple[list[tuple[str, float]], float]:
        """Return ``(upper bound, how many up to it)`` for each bucket, and the sum of all."""
        with self._lock:
            counts, total = list(self._counts), self._sum
        names = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        return list(zip(names, map(float, accumulate(counts)), strict=True)), total


class Series(dict[Labels, Any]):
    """What *make* makes for each combination of label values; those in *known* are there from the start.

    A counter that first appears with a 1 has no rate: hence *known*.
    """

    def __init__(self, make: Callable[[Labels], Any], known: Iterable[Labels] = ()) -> None:
        super().__init__()
        self._make = make
        self._lock = threading.Lock()
        for values in known:
            _ = self[values]

    def __missing__(self, values: Labels) -> Any:
        values = tuple(value or "unknown" for value in values)
        with self._lock:
            if values not in self and len(self) >= MAX_SERIES:
                values = ("other",) * len(values)
            if values not in self:
                self[values] = self._make(values)
            return self[values]


class AtScrape:
    """A collector of families that each scrape makes anew.

    *families* is called with ``values=False`` to learn their names, when no snapshot may be taken yet.
    """

    def __init__(self, families: Callable[..., Iterable[Any]]) -> None:
        self._families = families

    def describe(self) -> list[Any]:
        return list(self._families(values=False))

    def collect(self) -> list[Any]:
        return list(self._families(values=True))


def gauge(name: str, meaning: str, value: Any, labels: tuple[str, ...] = ()) -> Any:
    """Make a gauge of a number, of numbers by label values, or of None: no sample."""
    from prometheus_client.core import GaugeMetricFamily

    family = GaugeMetricFamily(f"{PREFIX}_{name}", meaning, labels=labels)
    for values, number in value.items() if isinstance(value, Mapping) else [((), value)]:
        if number is not None:
            family.add_metric([text or "unknown" for text in values], float(number))
    return family


def counter(name: str, meaning: str, value: float) -> Any:
    """Make a counter without labels."""
    from prometheus_client.core import CounterMetricFamily

    return CounterMetricFamily(f"{PREFIX}_{name}", meaning, value=value)


def histogram(name: str, meaning: str, tallies: Mapping[Labels, Tally], labels: tuple[str, ...] = ()) -> Any:
    """Make a histogram of tallies by label values."""
    from prometheus_client.core import HistogramMetricFamily

    family = HistogramMetricFamily(f"{PREFIX}_{name}", meaning, labels=labels)
    for values, tally in list(tallies.items()):
        family.add_metric(values, *tally.buckets())
    return family


class _WithoutCreated:
    """A registry without the ``_created`` series, which Prometheus does not read in this format."""

    def __init__(self, registry: "CollectorRegistry") -> None:
        self._registry = registry

    def collect(self) -> Iterator[Any]:
        for family in self._registry.collect():
            family.samples = [sample for sample in family.samples if sample.name != f"{family.name}_created"]
            yield family


def render(registry: "CollectorRegistry") -> bytes:
    """Return a registry in Prometheus' text format."""
    text: bytes = client().generate_latest(_WithoutCreated(registry))
    return text


def merge(*texts: bytes) -> bytes:
    """Join what several registries have rendered; their metrics must have different names."""
    return b"".join(text if text.endswith(b"\n") else text + b"\n" for text in texts if text)


def client() -> Any:
    """Import prometheus_client. Raises `ConfigError` that says how to get it."""
    try:
        import prometheus_client
    except ImportError:
        raise ConfigError(
            "metrics need prometheus_client: pip install celery-warm-pool[metrics], or set POOL_METRICS_PORT=0"
        ) from None
    return prometheus_client
