"""A worker with opentelemetry-instrumentation-celery, whose spans go to a file, one JSON object a line."""

import os
from typing import Any

from celery import Celery
from celery.signals import worker_init
from opentelemetry import trace
from opentelemetry.instrumentation.celery import CeleryInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor

from pool.tracing import TracingObserver

app = Celery("traced", broker=os.environ["BROKER_URL"], backend=os.environ["BROKER_URL"])
observer = TracingObserver()  # before there is a provider, as an app that installs the pool first would have it


@worker_init.connect
def trace_to_file(**_: Any) -> None:
    provider = TracerProvider()
    out = open(os.environ["SPANS_FILE"], "a", encoding="utf-8")
    exporter = ConsoleSpanExporter(out=out, formatter=lambda span: span.to_json(indent=None) + "\n")
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    CeleryInstrumentor().instrument()


@app.task(name="traced.build")
def build(key: str) -> None:
    """What a pooled task's backend tells of."""
    observer.acquired(key, "default", 0.01, warm=True)
    observer.executed("ssh", 0.02, "ok")
