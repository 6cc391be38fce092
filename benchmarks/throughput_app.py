"""The Celery app of the throughput table, with or without the pool; everything else is alike.

BENCH_BROKER: its URL. BENCH_SHARDS: number of shard queues; 0: plain Celery, one queue. BENCH_LATE=1: plain tasks are
acknowledged late, as pooled ones are. BENCH_PREFETCH: prefetch multiplier of a plain worker. BENCH_ACQUIRE=1: pooled
tasks use their backend. BENCH_METRICS: the port of the node's metrics.
"""

import itertools
import os
import time
from typing import Any

import redis
from celery import Celery

from pool import MemoryBackend, PooledTask, Settings, install

URL = os.environ.get("BENCH_BROKER", "memory://")
SHARDS = int(os.environ.get("BENCH_SHARDS", "0"))
CONCURRENCY = 8
ACQUIRES = os.environ.get("BENCH_ACQUIRE") == "1"

app = Celery(f"bench{SHARDS}", broker=URL, backend="disabled://")
app.conf.update(
    broker_transport_options={"priority_steps": [0]},
    broker_connection_retry_on_startup=True,
    task_ignore_result=True,
    worker_pool="threads",
    worker_concurrency=CONCURRENCY,
    worker_prefetch_multiplier=int(os.environ.get("BENCH_PREFETCH", "1")),  # of plain workers; install() sets 2
    task_default_queue=os.environ.get("BENCH_QUEUE", "plain"),
)

_count = itertools.count(1)
_first = (0.0, 0.0)  # wall clock, CPU time of the process; seconds


def _ran(until: int) -> None:
    """Count a task; the last of a round tells how long it was from the first one's start."""
    global _count, _first
    number = next(_count)
    if number == 1:
        _first = time.perf_counter(), time.process_time()
    if number == until:
        wall, cpu = time.perf_counter() - _first[0], time.process_time() - _first[1]
        _count = itertools.count(1)
        with redis.Redis.from_url(URL) as client:
            client.rpush(f"took:{app.conf.task_default_queue}", f"{wall} {cpu}")


@app.task(name="bench.plain", acks_late=os.environ.get("BENCH_LATE") == "1")
def plain(user_id: str, until: int) -> None:  # noqa: ARG001 - same arguments as the keyed one
    _ran(until)


if SHARDS:
    settings = Settings(
        broker_url=URL,
        namespace=os.environ["BENCH_QUEUE"],
        shards=SHARDS,
        concurrency=CONCURRENCY,
        metrics_port=int(os.environ.get("BENCH_METRICS", "0")),
    )
    install(app, settings, backend_class=MemoryBackend)

    @app.task(base=PooledTask, bind=True, key="user_id", name="bench.pooled")
    def pooled(self: PooledTask, user_id: str, until: int) -> None:  # noqa: ARG001
        if ACQUIRES:
            with self.backend() as backend:
                backend.exists("x")
        _ran(until)


def noop() -> Any:
    """The task of this app's contestant."""
    return pooled if SHARDS else plain
