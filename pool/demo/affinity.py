"""One warm connection for each user: builds on two nodes, where they ran, what cold and warm ones cost.

Afterwards a few chats are closed and beat's sweep evicts the rest. As promised only if every task succeeded, every task
of a user ran in one process (nobody dies here, so no key moves), and each user needed exactly one connection.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from pool.demo.stage import IDLE_TIMEOUT, SWEEP_INTERVAL, Stage, until

NODES = ("node-a", "node-b")
CLOSED_CHATS = 3
TASK_TIMEOUT = 120.0  # seconds for the whole burst


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


class Affinity:
    """Work for some users on two nodes."""

    def __init__(self, stage: Stage, users: int, tasks: int) -> None:
        self.stage = stage
        self.app = stage.app
        self.console = stage.console
        self.reports = [UserReport(f"user-{number:02d}") for number in range(1, users + 1)]
        self.tasks = tasks
        self.failures: list[str] = []

    def run(self) -> Report:
        """Start the nodes, do the work, watch the sweep."""
        for name in NODES:
            self.stage.start_node(name)
        with self.console.status("starting Valkey, an SSH server and two worker nodes ..."):
            self.stage.wait_for_nodes()
        self.console.print(
            f"2 nodes have shared out the shards; POOL_DATA_DIR={self.stage.shown_folder} lets another terminal look in"
        )
        self._work()
        self.stage.start_beat()  # not before: on a slow machine a user is idle for long while the others begin
        for report in self.reports:
            report.connects = self.stage.sshd.logins.read_text().split().count(report.user)
        closed = self._close_chats()
        evicted = self._wait_for_sweep(len(self.reports) - closed)
        return self._report(self.stage.sshd.count_logins(), evicted, closed)

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
            return sum(node["backend_pool"]["evicted_idle"] for node in self.stage.all_stats().values())

        text = f"{expected} backends are idle: beat sweeps those that nobody uses for {IDLE_TIMEOUT:g} s ..."
        with self.console.status(text):
            until(lambda: evicted() >= expected, IDLE_TIMEOUT + 30 * SWEEP_INTERVAL, "the sweep has evicted all")
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
