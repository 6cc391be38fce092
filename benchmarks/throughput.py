"""Tasks per second through shard queues, against the same worker with one plain queue.

Every contestant is a worker process of its own, held still while its queues are filled, then let go: what counts is
the time from its first task's start to its last one's. The contestants run in turn.
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from time import perf_counter
from typing import Any, Self

import redis

from benchmarks.harness import REPOSITORY, Report, Worker, broker, interleaved, p50, ratio, scratch, spread

KEYS = 500
CONTESTANTS: Mapping[str, Mapping[str, str]] = {
    "plain": {"BENCH_SHARDS": "0"},
    "plain, a twin": {"BENCH_SHARDS": "0"},
    "plain, late ack": {"BENCH_SHARDS": "0", "BENCH_LATE": "1"},
    "plain, prefetch 4": {"BENCH_SHARDS": "0", "BENCH_PREFETCH": "4"},
    "1": {"BENCH_SHARDS": "1"},
    "16": {"BENCH_SHARDS": "16"},
    "64": {"BENCH_SHARDS": "64"},
    "256": {"BENCH_SHARDS": "256"},
}
TARGETS = {"16": 0.95, "64": 0.9}


def measure(*, quick: bool) -> Report:
    tasks, rounds, starts = (300, 1, 2) if quick else (1000, 3, 5)
    report = Report("throughput", f"{tasks} empty tasks of {KEYS} keys a round, one node, 8 threads, no results")
    told: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    cpu: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    with scratch() as folder, broker(folder) as url:
        for _ in range(starts):
            for name, (walls, cpus) in _one_start(url, tasks, rounds).items():
                told[name].append(p50(walls))
                cpu[name].append(p50(cpus))
    report.raw |= {"seconds": told, "CPU seconds of the worker": cpu, "tasks": tasks, "rounds": rounds}
    report.notes.append(
        f"Every contestant was started {starts} times and ran {rounds} rounds each time, of which the median counts:"
        " the same worker started twice differs by up to 15 % for as long as it lives, so the starts decide."
    )
    _fill(report, told, cpu, tasks)
    return report


def _one_start(url: str, tasks: int, rounds: int) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds of each round and CPU seconds of the worker, by contestant."""
    with ExitStack() as stack:
        runs, contestants = {}, {}
        for number, (name, env) in enumerate(CONTESTANTS.items()):
            contestant = stack.enter_context(Contestant(url, number, env))
            contestants[name] = contestant
            runs[name] = partial(contestant.round, tasks)
        interleaved(runs, 1)  # threads are started, code is loaded, connections are made
        walls = interleaved(runs, rounds)
        return {name: (walls[name], contestants[name].cpu[1:]) for name in runs}


def _fill(report: Report, told: dict[str, list[float]], cpu: dict[str, list[float]], tasks: int) -> None:
    plain = _mean(told["plain"], told["plain, a twin"])
    plain_cpu = _mean(cpu["plain"], cpu["plain, a twin"])
    for name, target in TARGETS.items():
        remark = spread([a / b for a, b in zip(plain, told[name], strict=True)])
        what = f"{name} shard queues / plain Celery on one queue: tasks per second"
        report.add(what, ratio(plain, told[name]), "x", target, least=True, remark=remark)
        report.add("... the same by CPU time of the worker", ratio(plain_cpu, cpu[name]), "x")
        report.add("... against acks_late on both sides", ratio(told["plain, late ack"], told[name]), "x")
        report.add("... against Celery's prefetch multiplier, 4", ratio(told["plain, prefetch 4"], told[name]), "x")
    report.add("plain Celery / its twin: what noise alone does", ratio(told["plain"], told["plain, a twin"]), "x",
               remark="by CPU time " + format(ratio(cpu["plain"], cpu["plain, a twin"]), ".3g"))  # fmt: skip
    for name, seconds in told.items():
        what = name if name.startswith("plain") else f"{name} shard queue{'s' * (name != '1')}"
        remark = f"{1e3 * p50(cpu[name]) / tasks:.3f} ms CPU; {tasks / p50(seconds):,.0f} tasks/s"
        report.add(f"cost per task: {what}", 1e3 * p50(seconds) / tasks, "ms", remark=remark)
    report.notes.append(
        "Same threads, concurrency, priority_steps and result settings. Prefetch: 1 x 8 for plain Celery but for the"
        " row that says 4, 2 x 8 for shard queues, as install() sets it. Pooled tasks are acknowledged late, plain"
        " ones early unless the row says so. No events."
    )


def _mean(one: list[float], other: list[float]) -> list[float]:
    return [(a + b) / 2 for a, b in zip(one, other, strict=True)]


class Contestant:
    """One worker, and the producer that fills its queues while it is held still."""

    def __init__(self, url: str, number: int, env: Mapping[str, str]) -> None:
        self.queue = f"c{number}"
        self._url = url
        self._env = {**env, "BENCH_BROKER": url, "BENCH_QUEUE": self.queue}
        self._worker = Worker("benchmarks.throughput_app", self.queue, self._env)
        self._redis = redis.Redis.from_url(url)
        self.cpu: list[float] = []

    def __enter__(self) -> Self:
        self._producer = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.throughput"],
            cwd=REPOSITORY,
            env={**os.environ, **self._env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._worker.__enter__()
        self._produce(1)
        self._worker.until(self._took, "the first task")
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.__exit__()
        with self._producer as producer:
            producer.stdin.close()  # type: ignore[union-attr]
        self._redis.close()

    def round(self, tasks: int) -> float:
        """Seconds from the first task to the last one."""
        with self._worker.paused():
            self._produce(tasks)
        wall, cpu = self._worker.until(self._took, "the last task of a round", timeout=60.0)
        self.cpu.append(cpu)
        return float(wall)

    def _produce(self, tasks: int) -> float:
        assert self._producer.stdin is not None
        assert self._producer.stdout is not None
        self._producer.stdin.write(f"{tasks}\n")
        self._producer.stdin.flush()
        return float(self._producer.stdout.readline())

    def _took(self) -> tuple[float, float] | None:
        found: Any = self._redis.blpop([f"took:{self.queue}"], timeout=1)
        if not found:
            return None
        wall, cpu = found[1].split()
        return float(wall), float(cpu)


def produce() -> None:
    """Fill the queues with as many tasks as each line of stdin says; answer with the seconds that it took."""
    from benchmarks.throughput_app import noop

    task = noop()
    for line in sys.stdin:
        tasks, started = int(line), perf_counter()
        for number in range(tasks):
            task.apply_async((f"user-{number % KEYS}", tasks))
        print(perf_counter() - started, flush=True)


if __name__ == "__main__":
    produce()
