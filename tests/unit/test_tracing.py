"""Spans of what a task does with its backend, read from the SDK's exporter in memory."""

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode, Tracer

from pool.observer import Step
from pool.runtime import LoopThread
from pool.tracing import TracingObserver, tracing_observer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def provider(exporter: InMemorySpanExporter) -> TracerProvider:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return provider


@pytest.fixture
def tracer(provider: TracerProvider) -> Tracer:
    return provider.get_tracer("test")


@pytest.fixture
def observer(provider: TracerProvider) -> TracingObserver:
    return TracingObserver(provider=provider)


def spans(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in exporter.get_finished_spans()}


def test_spans_are_children_of_the_current_one(
    observer: TracingObserver, tracer: Tracer, exporter: InMemorySpanExporter
) -> None:
    """Each of the three, in the trace of the task, with what is known about it."""
    with tracer.start_as_current_span("task"):
        observer.connected("user-1", "default", "ssh", 0.25)
        observer.acquired("user-1", "default", 0.5, warm=False)
        observer.executed("ssh", 2.0, "ok")
    found = spans(exporter)
    task = found.pop("task")
    assert {name: dict(span.attributes) for name, span in found.items()} == {
        "backend_pool.connect": {
            "backend_pool.agent": "default",
            "backend_pool.key": "user-1",
            "backend_pool.kind": "ssh",
        },
        "backend_pool.acquire": {
            "backend_pool.agent": "default",
            "backend_pool.key": "user-1",
            "backend_pool.warm": False,
        },
        "backend_pool.exec": {"backend_pool.kind": "ssh", "backend_pool.outcome": "ok"},
    }
    for span in found.values():
        assert span.parent.span_id == task.context.span_id
        assert span.context.trace_id == task.context.trace_id
        assert span.status.status_code is StatusCode.UNSET


def test_a_span_lasts_as_long_as_what_it_tells_of(
    observer: TracingObserver, tracer: Tracer, exporter: InMemorySpanExporter
) -> None:
    """It ends now, and began that much earlier."""
    with tracer.start_as_current_span("task"):
        observer.executed("ssh", 2.5, "ok")
    span, task = spans(exporter)["backend_pool.exec"], spans(exporter)["task"]
    assert span.end_time - span.start_time == 2_500_000_000
    assert task.start_time <= span.end_time <= task.end_time


@pytest.mark.parametrize(
    ("tell", "error"),
    [
        (lambda o: o.acquired("k", "a", 30.0, warm=False, error="AcquireTimeout"), "AcquireTimeout"),
        (lambda o: o.connected("k", "a", "ssh", 1.0, "refused"), "refused"),
        (lambda o: o.executed("ssh", 1.0, "CommandTimeout"), "CommandTimeout"),
    ],
)
def test_an_error_is_told(
    observer: TracingObserver, tracer: Tracer, exporter: InMemorySpanExporter, tell: Any, error: str
) -> None:
    """As the status of the span, and by its class or reason."""
    with tracer.start_as_current_span("task"):
        tell(observer)
    span = exporter.get_finished_spans()[0]
    assert span.status.status_code is StatusCode.ERROR
    assert span.attributes["error.type"] == error


def test_an_exit_code_is_no_error(observer: TracingObserver, tracer: Tracer, exporter: InMemorySpanExporter) -> None:
    """A build that fails is an ordinary answer."""
    with tracer.start_as_current_span("task"):
        observer.executed("ssh", 1.0, "failed")
    span = exporter.get_finished_spans()[0]
    assert span.status.status_code is StatusCode.UNSET
    assert span.attributes["backend_pool.outcome"] == "failed"


def test_the_key_can_be_left_out(provider: TracerProvider, tracer: Tracer, exporter: InMemorySpanExporter) -> None:
    """It is the id of a user: not everybody's tracing may have it."""
    observer = TracingObserver(with_key=False, provider=provider)
    with tracer.start_as_current_span("task"):
        observer.acquired("canary-key", "default", 0.0, warm=True)
        observer.connected("canary-key", "default", "ssh", 0.1)
    assert len(exporter.get_finished_spans()) == 3
    assert not any("canary-key" in span.to_json() for span in exporter.get_finished_spans())


def test_outside_of_a_trace_no_span_is_made(observer: TracingObserver, exporter: InMemorySpanExporter) -> None:
    """Nor of the steps of backends, which belong to no task."""
    observer.acquired("k", "a", 0.1, warm=True)
    observer.executed("ssh", 0.1, "ok")
    observer.step(Step("closed", "k", "a", "ssh"))
    assert exporter.get_finished_spans() == ()


def test_what_is_observed_on_the_loop_of_the_pool_joins_the_trace_too(
    observer: TracingObserver, tracer: Tracer, exporter: InMemorySpanExporter
) -> None:
    """A coroutine that a task hands over runs in the task's context."""
    loop = LoopThread("tracing-test")

    async def command() -> None:
        await asyncio.sleep(0)
        observer.executed("ssh", 0.1, "ok")

    try:
        with tracer.start_as_current_span("task"):
            loop.run(command())
    finally:
        loop.stop()
    found = spans(exporter)
    assert found["backend_pool.exec"].parent.span_id == found["task"].context.span_id


@pytest.mark.parametrize("missing", ["opentelemetry", "opentelemetry.trace"])
def test_without_opentelemetry_there_is_no_observer(missing: str) -> None:
    """Whoever asks for one by its class is told what to install."""
    script = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from pool.tracing import TracingObserver, tracing_observer\n"
        "print(tracing_observer())\n"
        "try: TracingObserver()\n"
        "except ValueError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.splitlines()[0] == "None", done.stderr
    assert "pip install celery-warm-pool[tracing]" in done.stdout


def test_with_opentelemetry_there_is_one() -> None:
    """Its key switch is handed on."""
    assert isinstance(tracing_observer(with_key=False), TracingObserver)
