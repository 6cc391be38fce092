"""OpenTelemetry spans of what a task does with its backend, made when it is over, as children of the current span.

With opentelemetry-instrumentation-celery the current span is the task's, so they join its trace, and the producer's.
"""

from importlib.util import find_spec
from time import time_ns
from typing import TYPE_CHECKING, Any

from pool.errors import ConfigError
from pool.observer import Observer

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

SCOPE = "celery-warm-pool"
"""The name of the tracer."""


class TracingObserver(Observer):
    """Makes ``backend_pool.acquire``, ``backend_pool.connect`` and ``backend_pool.exec``; only inside of a trace.

    Attributes: ``backend_pool.agent``, ``.kind``, ``.warm``, ``.outcome`` and, unless *with_key* is off, ``.key``,
    which often is the id of a user. ``error.type`` is the class of what was raised, or a connect's reason; such a span
    has the status ERROR. A command's exit code is an outcome and no error.

    *provider*: None: the process's own, which may be set later. Raises `ConfigError` without opentelemetry-api.
    """

    def __init__(self, *, with_key: bool = True, provider: "TracerProvider | None" = None) -> None:
        try:
            from opentelemetry import trace
        except ImportError:
            raise ConfigError("traces need opentelemetry-api: pip install celery-warm-pool[tracing]") from None
        self._trace: Any = trace
        self._tracer = trace.get_tracer(SCOPE, tracer_provider=provider)
        self._with_key = with_key

    def step(self, step: Any) -> None:
        """Not of any task."""

    def acquired(self, key: str, agent: str, seconds: float, *, warm: bool, error: str = "") -> None:
        if self._traced():
            self._span("acquire", seconds, error, {**self._whose(key, agent), "backend_pool.warm": warm})

    def connected(self, key: str, agent: str, kind: str, seconds: float, error: str = "") -> None:
        if self._traced():
            self._span("connect", seconds, error, {**self._whose(key, agent), "backend_pool.kind": kind})

    def executed(self, kind: str, seconds: float, outcome: str) -> None:
        if self._traced():
            error = "" if outcome in ("ok", "failed") else outcome
            self._span("exec", seconds, error, {"backend_pool.kind": kind, "backend_pool.outcome": outcome})

    def _traced(self) -> bool:
        """Whether there is a span to belong to: a trace of one span tells nothing, and mostly nobody traces at all."""
        current = self._trace.get_current_span()
        return current is not self._trace.INVALID_SPAN and bool(current.get_span_context().is_valid)

    def _whose(self, key: str, agent: str) -> dict[str, Any]:
        return {"backend_pool.agent": agent, **({"backend_pool.key": key} if self._with_key else {})}

    def _span(self, name: str, seconds: float, error: str, attributes: dict[str, Any]) -> None:
        end = time_ns()
        start = end - int(seconds * 1e9)
        if error:
            attributes["error.type"] = error
        span = self._tracer.start_span(f"backend_pool.{name}", start_time=start, attributes=attributes)
        if error:
            span.set_status(self._trace.StatusCode.ERROR, error)
        span.end(end)


def tracing_observer(*, with_key: bool = True) -> TracingObserver | None:
    """Return a `TracingObserver`; None where OpenTelemetry is not installed."""
    return TracingObserver(with_key=with_key) if _installed() else None


def _installed() -> bool:
    try:
        return find_spec("opentelemetry.trace") is not None
    except ImportError:  # its parent is missing
        return False
