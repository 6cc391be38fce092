"""What it costs a build that writes much that others can follow it, and how soon they see its first line."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from time import perf_counter, process_time
from typing import Any

from benchmarks.harness import (
    REPOSITORY,
    Report,
    broker,
    interleaved,
    p50,
    ratio,
    remote_folder,
    scratch,
    spread,
    ssh_server,
)
from pool import BackendPoolManager, LocalFilesystemBackend, RemoteFilesystemBackend
from pool.backends.output import TAP
from pool.live.follow import follow
from pool.live.output import LiveOutput

MEGABYTES = 50
LINE = "cc -O2 -Wall -c -o build/objects/some/module/of/the/program.o src/some/module/of/it.c"
FLOOD = f"date +%s.%N; yes '{LINE}' | head -c {MEGABYTES}000000"
QUIET = "sleep 0.1; date +%s.%N; sleep 0.1"
TARGET = 1.05
FIRST_LINE = 200.0  # ms
NAMESPACE = "bench"

_ids = count()


def measure(*, quick: bool) -> Report:
    rounds, lines = (3, 5) if quick else (25, 25)
    report = Report("live_output", f"one command writes {MEGABYTES} MB; followed or not")
    with scratch() as folder, broker(folder) as url, ssh_server(folder) as (which, info), _follower(url) as follower:
        live = LiveOutput(url, NAMESPACE, keep_bytes=4_000_000, ttl=60.0)
        stage = _Stage(live, follower)
        remote = {
            "host": "127.0.0.1",
            "port": info.port,
            "username": info.username,
            "client_keys": str(info.client_key),
            "known_hosts": str(info.known_hosts),
            "root_dir": remote_folder(folder),
        }
        pools: dict[str, BackendPoolManager[Any]] = {
            "local": BackendPoolManager(LocalFilesystemBackend, {"root_dir": str(folder / "work")}),
            which: BackendPoolManager(RemoteFilesystemBackend, remote),
        }
        try:
            for name, pool in pools.items():
                _measure(report, name, pool, stage, rounds if name == "local" else max(3, rounds // 3), lines)
        finally:
            live.close()
            for pool in pools.values():
                pool.destroy_all(0.0)
    report.notes.append(
        "Redis keeps 4 MB. The follower is a process of its own on the same cores: what it is not shown, it is told of."
    )
    return report


def _measure(report: Report, name: str, pool: Any, stage: "_Stage", rounds: int, lines: int) -> None:
    with pool.backend("key") as backend:
        contestants: dict[str, Callable[[], float]] = {
            "plain": partial(stage.plain, backend, "plain"),
            "again": partial(stage.plain, backend, "again"),
            "live": partial(stage.alone, backend),
            "followed": partial(stage.followed, backend),
        }
        interleaved(contestants, 1)
        for kept in (stage.first, stage.shown, stage.cpu):
            kept.clear()
        told = interleaved(contestants, rounds)
        floods, stage.first = stage.first, []
        cpu, stage.cpu = stage.cpu, {}
        for _ in range(lines):
            stage.followed(backend, QUIET)
        quiets, stage.first = stage.first, []
    first = {"flood": floods, "quiet": quiets}
    report.raw[name] = {"s": told, "CPU, s": cpu, "first line, ms": first, "MB shown": stage.shown[:rounds]}
    report.add(f"{name}: {MEGABYTES} MB without live output", p50(told["plain"]), "s", remark=spread(told["plain"]))
    for what, contestant in (("live output", "live"), ("one follower", "followed")):
        value = ratio(told[contestant], told["plain"])
        pairs = [a / b for a, b in zip(told[contestant], told["plain"], strict=True)]
        report.add(f"{name}: {what} / none", value, "x", TARGET, remark=spread(pairs))
        report.add(f"{name}: ... the quickest quarter of each", _quick(told[contestant]) / _quick(told["plain"]), "x")
        report.add(f"{name}: ... CPU time of the process", ratio(cpu[contestant], cpu["plain"]), "x")
    report.add(f"{name}: none / none, what noise alone does", ratio(told["again"], told["plain"]), "x")
    report.add(f"{name}: ... the quickest quarter of each", _quick(told["again"]) / _quick(told["plain"]), "x")
    report.add(f"{name}: ... CPU time of the process", ratio(cpu["again"], cpu["plain"]), "x")
    report.add(f"{name}: first line of a quiet command", p50(quiets), "ms", FIRST_LINE, remark=spread(quiets))
    report.add(f"{name}: first line of one that floods", p50(floods), "ms", FIRST_LINE, remark=spread(floods))
    report.add(f"{name}: of {MEGABYTES} MB the follower was shown", p50(stage.shown[:rounds]), "MB")


def _quick(values: list[float]) -> float:
    """What a machine with others on it disturbs least."""
    return p50(sorted(values)[: max(1, len(values) // 4)])


class _Stage:
    """Runs commands, each as a task with an id of its own."""

    def __init__(self, live: LiveOutput, follower: "subprocess.Popen[str]") -> None:
        self.live = live
        self.follower = follower
        self.first: list[float] = []  # ms from the first line to the follower
        self.shown: list[float] = []  # MB
        self.cpu: dict[str, list[float]] = {}

    def plain(self, backend: Any, name: str) -> float:
        return self._timed(backend, FLOOD, name)

    def alone(self, backend: Any, command: str = FLOOD, name: str = "live", task_id: str | None = None) -> float:
        task = self.live.open(task_id or f"task-{next(_ids)}", {"name": "bench"})
        token = TAP.set(task.feed)
        try:
            return self._timed(backend, command, name)
        finally:
            TAP.reset(token)
            task.close("SUCCESS", 0)

    def followed(self, backend: Any, command: str = FLOOD) -> float:
        assert self.follower.stdin is not None
        assert self.follower.stdout is not None
        task_id = f"task-{next(_ids)}"
        self.follower.stdin.write(f"{task_id}\n")
        self.follower.stdin.flush()
        time.sleep(0.1)  # it connects
        taken = self.alone(backend, command, "followed", task_id)
        told = json.loads(self.follower.stdout.readline())
        self.first.append(told["first"])
        self.shown.append(told["shown"] / 1e6)
        return taken

    def _timed(self, backend: Any, command: str, name: str) -> float:
        cpu, started = process_time(), perf_counter()
        backend.exec(command, encoding=None)
        taken = perf_counter() - started
        self.cpu.setdefault(name, []).append(process_time() - cpu)
        return taken


@contextmanager
def _follower(url: str) -> Iterator["subprocess.Popen[str]"]:
    """A process that follows the tasks whose ids it reads, and tells of each what it was shown."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", "from benchmarks.live_output import following; following()", url]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdin=pipe, stdout=pipe, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for end in (process.stdin, process.stdout):
            if end is not None:
                end.close()


def following() -> None:
    """What that process does."""
    for line in sys.stdin:
        first: float | None = None
        shown = 0
        for piece in follow(line.strip(), url=sys.argv[1], namespace=NAMESPACE, timeout=60):
            shown += len(piece.data)
            if first is None and piece.data and not piece.offset:
                first = 1e3 * (time.time() - float(piece.data.split(b"\n")[0]))
        print(json.dumps({"first": first, "shown": shown}), flush=True)
