"""``python -m pool.demo``: the main job on embedded parts, with nothing installed but Python packages.

An embedded Valkey, a loopback SSH server, two worker nodes and beat, all as real processes. Users enqueue builds;
afterwards a few chats are closed and beat's sweep evicts the rest. Exit code 0 only if every task succeeded, every
task of a user ran in one process, and each user needed exactly one connection.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from celery.app.utils import find_app
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from pool import embedded
from pool.backends.shell import ShellCommand
from pool.loopback_sshd import LoopbackSshd, SshdInfo

NODES = {"node-a": "0-31", "node-b": "32-63"}
IDLE_TIMEOUT = 5.0  # seconds; short, so that the sweep can be watched
SWEEP_INTERVAL = 1.0
CLOSED_CHATS = 3
START_TIMEOUT = 90.0  # seconds for two nodes to answer, on a slow machine
TASK_TIMEOUT = 120.0  # seconds for the whole burst
STOP_TIMEOUT = 15.0  # seconds for a process to end after TERM


@dataclass
class UserReport:
    """What one user saw."""

    user: str
    results: list[dict[str, Any]] = field(default_factory=list)
    cold_ms: float = 0.0
    warm_ms: list[float] = field(default_factory=list)
    connects: int = 0

    @property
    def places(self) -> set[tuple[str, int]]:
        """The (node, process) pairs that ran this user's tasks; one if all is well."""
        return {(result["node"], result["pid"]) for result in self.results}

    @property
    def warm_hits(self) -> int:
        """Tasks that found a connected backend."""
        return sum(result["warm"] for result in self.results)


@dataclass(frozen=True)
class Report:
    """The JSON of ``--json``."""

    tasks: int
    users: int
    failed: int
    connects: int
    affinity: float
    warm_hit_rate: float
    cold_ms_p50: float
    warm_ms_p50: float
    evicted: int
    closed: int

    @property
    def ok(self) -> bool:
        """Whether the demo shows what it promises."""
        return not self.failed and self.affinity == 1.0 and self.connects == self.users


class Demo:
    """The processes of one run, and the work they are given."""

    def __init__(self, folder: Path, console: Console, users: int, tasks: int) -> None:
        self.folder = folder.absolute()
        self.console = console
        self.reports = [UserReport(f"user-{number:02d}") for number in range(1, users + 1)]
        self.tasks = tasks
        self.failures: list[str] = []

    def run(self) -> Report:
        """Start everything, do the work, stop everything; also when interrupted."""
        with ExitStack() as stack:
            self._clean()
            sshd = stack.enter_context(LoopbackSshd(self.folder / "sshd", home=self.folder / "host"))
            environment = self._environment(sshd.info)
            os.environ.update(environment)
            self.app = find_app("worker_config")
            self.app.loader.import_default_modules()
            processes = [
                stack.enter_context(self._celery(f"worker-{name}", environment | {"POOL_NODE_SHARDS": shards}, name))
                for name, shards in NODES.items()
            ]
            processes.append(stack.enter_context(self._celery("beat", environment)))
            self._wait_for_nodes(processes)
            self.console.print(f"2 nodes are up; POOL_DATA_DIR={self._shown_folder()} lets another terminal look in")
            self._work()
            for report in self.reports:
                report.connects = sshd.info.logins.read_text().split().count(report.user)
            closed = self._close_chats()
            evicted = self._wait_for_sweep(len(self.reports) - closed)
            return self._report(sshd.info.count_logins(), evicted, closed)

    # -- processes

    def _clean(self) -> None:
        """Begin with an empty folder, whatever an earlier run left. Valkey ends with its last user, this process."""
        embedded.stop(self.folder / "valkey")
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)

    def _environment(self, sshd: SshdInfo) -> dict[str, str]:
        hosts = self.folder / "hosts.toml"
        hosts.write_text(
            "[default]\n"
            'backend = "ssh"\nhost = "127.0.0.1"\n'
            f"port = {sshd.port}\n"
            'username = "{key}"\nroot_dir = "{key}"\n'
            f"client_keys = {json.dumps(str(sshd.client_key))}\n"
            f"known_hosts = {json.dumps(str(sshd.known_hosts))}\n",
            encoding="utf-8",
        )
        return {
            "POOL_DATA_DIR": str(self.folder),
            "POOL_HOSTS_FILE": str(hosts),
            "POOL_IDLE_TIMEOUT": str(IDLE_TIMEOUT),
            "POOL_SWEEP_INTERVAL": str(SWEEP_INTERVAL),
        }

    @contextmanager
    def _celery(
        self, log: str, environment: dict[str, str], node: str | None = None
    ) -> Iterator[subprocess.Popen[bytes]]:
        """A ``celery`` process in a session of its own: Ctrl-C reaches the demo, which stops all in order.

        It runs in the supervised shell, so that it ends even when the demo is killed.
        """
        what = ["worker", "-n", f"{node}@%h"] if node else ["beat", "-s", str(self.folder / "beat-schedule")]
        command = "exec " + shlex.join([sys.executable, "-m", "celery", "-A", "worker_config", *what, "-l", "INFO"])
        here = str(Path.cwd())
        path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
        with (self.folder / f"{log}.log").open("wb") as output:
            process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                ShellCommand(command, [here], {}).argv,
                env={**os.environ, **environment, "PYTHONPATH": path},
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            yield process
        finally:
            with process:  # lets go of the lifeline at the end, whatever happened before
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGTERM)
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(STOP_TIMEOUT)

    def _wait_for_nodes(self, processes: list[subprocess.Popen[bytes]]) -> None:
        wanted = [f"{name}@" for name in NODES]

        def all_answer() -> bool:
            for process, log in zip(processes, [*(f"worker-{name}" for name in NODES), "beat"], strict=True):
                if process.poll() is not None:
                    tail = (self.folder / f"{log}.log").read_text(errors="replace")[-3000:]
                    raise RuntimeError(f"{log} ended with exit code {process.returncode}:\n{tail}")
            names = [name for answer in self.app.control.ping(timeout=0.5) for name in answer]
            return all(any(name.startswith(prefix) for name in names) for prefix in wanted)

        with self.console.status("starting Valkey, an SSH server, two worker nodes and beat ..."):
            _until(all_answer, START_TIMEOUT, "both nodes answer")

    def _shown_folder(self) -> Path:
        return self.folder.relative_to(Path.cwd()) if self.folder.is_relative_to(Path.cwd()) else self.folder

    # -- work

    def _work(self) -> None:
        """Per user one task on a cold backend, then a burst of all users at once, then two on a quiet, warm one."""
        burst = max(0, self.tasks - 3 * len(self.reports))
        with self._progress() as advance:
            for report in self.reports:
                report.cold_ms = self._timed(report)
                advance()
            order = [self.reports[number % len(self.reports)] for number in range(burst)]
            pending = [(report, self._send(report)) for report in order]
            for report, result in pending:
                self._collect(report, result)
                advance()
            for report in [*self.reports, *self.reports]:
                report.warm_ms.append(self._timed(report))
                advance()

    @contextmanager
    def _progress(self) -> Iterator[Callable[[], None]]:
        columns = (TextColumn("builds"), BarColumn(40), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task("builds", total=max(self.tasks, 3 * len(self.reports)))
            yield lambda: progress.advance(task)

    def _send(self, report: UserReport) -> Any:
        return self.app.tasks["tasks.builds.run_build"].delay(report.user, "echo built by $USER in $PWD")

    def _timed(self, report: UserReport) -> float:
        started = time.perf_counter()
        self._collect(report, self._send(report))
        return 1e3 * (time.perf_counter() - started)

    def _collect(self, report: UserReport, result: Any) -> None:
        try:
            report.results.append(result.get(timeout=TASK_TIMEOUT))
        except Exception as error:
            self.failures.append(f"{report.user}: {error}")
        finally:
            # An interrupted wait would be undone when the interpreter ends, after Valkey has gone.
            self.app.backend.remove_pending_result(result)

    def _close_chats(self) -> int:
        close_chat = self.app.tasks["pool.close_chat"]
        closed = [close_chat.delay(report.user).get(timeout=TASK_TIMEOUT) for report in self.reports[:CLOSED_CHATS]]
        return sum(len(answer["closed"]) for answer in closed)

    def _wait_for_sweep(self, expected: int) -> int:
        """Wait until beat's sweeps have evicted every idle backend; return how many they were."""

        def evicted() -> int:
            stats = self.app.control.inspect(timeout=1.0).stats() or {}
            return sum(node["backend_pool"]["evicted_idle"] for node in stats.values())

        text = f"{expected} backends are idle: beat sweeps those that nobody uses for {IDLE_TIMEOUT:g} s ..."
        with self.console.status(text):
            _until(lambda: evicted() >= expected, IDLE_TIMEOUT + 30 * SWEEP_INTERVAL, "the sweep has evicted all")
        return evicted()

    # -- what is told

    def _report(self, connects: int, evicted: int, closed: int) -> Report:
        results = [result for report in self.reports for result in report.results]
        at_home = sum(
            sum(
                (result["node"], result["pid"]) == (report.results[0]["node"], report.results[0]["pid"])
                for result in report.results
            )
            for report in self.reports
        )
        return Report(
            tasks=len(results) + len(self.failures),
            users=len(self.reports),
            failed=len(self.failures),
            connects=connects,
            affinity=at_home / len(results) if results else 0.0,
            warm_hit_rate=round(sum(report.warm_hits for report in self.reports) / max(1, len(results)), 4),
            cold_ms_p50=round(statistics.median(report.cold_ms for report in self.reports), 1),
            warm_ms_p50=round(statistics.median(ms for report in self.reports for ms in report.warm_ms), 1),
            evicted=evicted,
            closed=closed,
        )

    def show(self, report: Report) -> None:
        """Print the table and the verdict."""
        table = Table(title="One warm connection per user", title_justify="left")
        for column in ("user", "node", "process"):
            table.add_column(column)
        for column in ("builds", "connects", "warm hits", "cold ms", "warm ms"):
            table.add_column(column, justify="right")
        for user in self.reports:
            places = sorted(user.places)
            table.add_row(
                user.user,
                ", ".join(sorted({node.partition("@")[0] for node, _ in places})),
                ", ".join(str(pid) for _, pid in places),
                str(len(user.results)),
                str(user.connects),
                str(user.warm_hits),
                f"{user.cold_ms:.0f}",
                f"{statistics.median(user.warm_ms):.0f}",
            )
        self.console.print(table)
        faster = report.cold_ms_p50 / report.warm_ms_p50
        lines = [
            (
                f"{report.tasks - report.failed} of {report.tasks} builds succeeded,"
                f" {report.affinity:.0%} of them in their user's own process."
            ),
            (
                f"{report.connects} SSH connections for {report.users} users (counted by the server);"
                f" {report.warm_hit_rate:.0%} of the builds found theirs warm."
            ),
            (
                f"From delay() to get(), p50: {report.cold_ms_p50:.1f} ms on a cold backend,"
                f" {report.warm_ms_p50:.1f} ms on a warm one ({faster:.1f}x)."
            ),
            (
                f"close_chat ended {report.closed} chats; after {IDLE_TIMEOUT:g} s of silence"
                f" beat's sweep evicted the other {report.evicted}."
            ),
            *self.failures[:5],
        ]
        for line in lines:
            self.console.print(line, highlight=False)


def _until(condition: Callable[[], bool], timeout: float, what: str) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"gave up after {timeout:g} s: waited until {what}")
        time.sleep(0.1)


def _interrupt(number: int, _frame: object) -> None:
    """TERM and HUP end the demo as Ctrl-C does; a second one does not disturb the clean-up."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt(number)


def main() -> int:
    """Run the demo; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pool.demo", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--users", type=int, default=12)
    parser.add_argument("--tasks", type=int, default=300, help="in all; at least 3 for each user")
    parser.add_argument("--folder", type=Path, default=Path(".pool/demo"), help="made anew; keeps the logs")
    options = parser.parse_args()
    if options.users < 1 or options.tasks < 3 * options.users:
        parser.error("--users must be 1 or more, and --tasks at least 3 for each user")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    console = Console(stderr=options.json)
    demo = Demo(options.folder, console, options.users, options.tasks)
    try:
        report = demo.run()
    except KeyboardInterrupt:
        console.print("interrupted; everything was stopped")
        return 130
    except RuntimeError as error:
        console.print(f"[red]{error}")
        return 1
    if options.json:
        print(json.dumps(asdict(report)))
    else:
        demo.show(report)
    if not report.ok:
        console.print(f"[red]not as promised; logs are in {options.folder}")
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
