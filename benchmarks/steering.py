"""How soon a node that has very much answers, how soon a cancelled build is gone, and what metrics cost."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

from benchmarks.harness import (
    REPOSITORY,
    Report,
    Worker,
    broker,
    interleaved,
    p50,
    pong,
    ratio,
    scratch,
    spread,
    ssh_hosts,
    ssh_server,
)
from benchmarks.throughput import Contestant
from tests.support.processes import group_members

BACKENDS = 10_000


def measure(*, quick: bool) -> Report:
    backends, cancels, starts = (1000, 5, 1) if quick else (BACKENDS, 50, 6)
    report = Report("steering", f"one node with {backends} backends; {cancels} builds cancelled; metrics on and off")
    with scratch() as folder, broker(folder) as url, ssh_server(folder) as (_, info):
        env = {
            "POOL_BROKER_URL": url,
            "POOL_MAX_BACKENDS": str(2 * BACKENDS),
            "POOL_IDLE_TIMEOUT": "3600",
            "POOL_HOSTS_FILE": str(ssh_hosts(folder, info)),
        }
        os.environ |= env
        from benchmarks.steering_app import app, fill

        with Worker("benchmarks.steering_app", "one", env, log=folder / "node.log") as worker:
            worker.until(lambda: pong(app, "one"), "the node answers")
            worker.until(lambda: _ask(app, "pool_stats")["shards"] == 64, "it has its shards")
            fill.delay("filler", backends).get(timeout=120)
            _answers(report, app, env, 5 if quick else 21)
            _cancels(report, app, cancels)
        _metrics(report, url, 300 if quick else 1000, starts)
    return report


def _ask(app: Any, command: str, **arguments: Any) -> Any:
    (reply,) = app.control.broadcast(command, arguments, reply=True, timeout=30.0, limit=1)
    return next(iter(reply.values()))


def _answers(report: Report, app: Any, env: dict[str, str], rounds: int) -> None:
    celery = [sys.executable, "-m", "celery", "-A", "benchmarks.steering_app"]

    def command(*words: str) -> float:
        started = perf_counter()
        subprocess.run([*celery, *words], cwd=REPOSITORY, env={**os.environ, **env}, check=True, capture_output=True)
        return perf_counter() - started

    def asked(name: str, **arguments: Any) -> float:
        started = perf_counter()
        _ask(app, name, **arguments)
        return perf_counter() - started

    told = interleaved(
        {
            "pool_stats": partial(asked, "pool_stats"),
            "pool_backends": partial(asked, "pool_backends", limit=100),
            "pool_explain": partial(asked, "pool_explain", key="filler-1"),
            "celery report": partial(command, "report"),
            "celery pool status": partial(command, "pool", "status", "--json"),
            "celery pool explain": partial(command, "pool", "explain", "filler-1", "--json"),
        },
        rounds,
    )
    targets = {"pool_stats": 1.0, "celery pool status": 1.0, "pool_explain": 0.5, "celery pool explain": 0.5}
    for name, seconds in told.items():
        report.add(name, p50(seconds), "s", targets.get(name), remark=spread(seconds))
    report.notes.append("celery report is a command that asks nobody: what starting Celery and loading the app costs.")
    report.raw["answers"] = told


def _cancels(report: Report, app: Any, count: int) -> None:
    from tasks import run_build

    build: Callable[..., Any] = run_build.delay
    gone, warm = [], 0
    for number in range(count):
        file = Path(build("user-1", "pwd").get(timeout=60)["output"].strip()) / f"pid{number}"
        task = build("user-1", f"sh -c 'trap \"\" TERM; echo $$ > {file}; while :; do sleep 0.05; done' & wait")
        while not file.exists() or not file.read_text():
            sleep(0.002)
        group = os.getpgid(int(file.read_text()))
        started = perf_counter()
        app.control.broadcast("pool_cancel", {"task_id": task.id})
        while group_members(group):
            sleep(0.002)
        gone.append(perf_counter() - started)
        warm += build("user-1", "true").get(timeout=60)["warm"]
    remark = f"p50 {p50(gone):.3f} s; the next build of the key was warm {warm} times"
    report.add(f"cancel until the last process is gone, the slowest of {count}", max(gone), "s", 1.0, remark=remark)
    report.raw["cancels"] = gone


def _metrics(report: Report, url: str, tasks: int, starts: int) -> None:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        port = made.getsockname()[1]
    base = {"BENCH_SHARDS": "64", "BENCH_ACQUIRE": "1"}
    envs = {"off": base, "a twin": base, "on": {**base, "BENCH_METRICS": str(port)}}
    walls: dict[str, list[float]] = {name: [] for name in envs}
    cpus: dict[str, list[float]] = {name: [] for name in envs}
    for start in range(starts):  # the same worker started twice differs for as long as it lives
        order = [*envs][start % 3 :] + [*envs][: start % 3]
        with ExitStack() as stack:
            nodes = {name: stack.enter_context(Contestant(url, n, envs[name])) for n, name in enumerate(order)}
            runs = {name: partial(node.round, tasks) for name, node in nodes.items()}
            interleaved(runs, 1)
            for name, seconds in interleaved(runs, 3).items():
                walls[name].append(p50(seconds))
                cpus[name].append(p50(nodes[name].cpu[1:]))
    what = "metrics on / off: CPU time of tasks that only borrow their backend"
    report.add(what, ratio(cpus["on"], cpus["off"]), "x", 1.02, remark=spread(cpus["on"]))
    report.add("... wall clock", ratio(walls["on"], walls["off"]), "x")
    report.add("off / its twin: what noise alone does, CPU time", ratio(cpus["a twin"], cpus["off"]), "x")
    report.raw["metrics"] = {"walls": walls, "cpus": cpus}
