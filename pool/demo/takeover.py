"""Kill -9 of one of three nodes while builds run: how soon others take over, and that nothing is lost.

Every user always has two builds under way. What was started and what ended is told by the build host, where each build
writes that down; so a build that the killed node had begun is seen to begin again elsewhere.
"""

import random
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count, pairwise
from pathlib import Path
from typing import Any

from rich.table import Table

from pool.demo.stage import START_TIMEOUT, DemoError, Stage, until

NODES = ("node-a", "node-b", "node-c")
UNDER_WAY = 2  # builds of each user at any time
SOME = 3  # results of each user before the node is killed, and after it is back
TASK_TIMEOUT = 60.0  # seconds for a build, a takeover included
LOOK = 0.02  # seconds between two looks at the builds: as exact as times here are
SHARE_CHECK = 1.0  # seconds between two looks at how the shards are shared out

Place = tuple[str, int]
"""Node and process."""


@dataclass
class Build:
    """One build. It has more than one run if it was cut off, or had ended when its node died, but was not acknowledged.

    Runs are known by their process on the build host; times are wall clock, in seconds.
    """

    user: str
    result: Any
    starts: dict[str, float] = field(default_factory=dict)
    ends: dict[str, float] = field(default_factory=dict)
    place: Place | None = None
    """Where the run was whose result came."""
    run: str = ""
    """Which one that was."""
    error: str = ""

    @property
    def done(self) -> bool:
        return self.place is not None or bool(self.error)

    @property
    def told(self) -> bool:
        """Whether all is known of the run whose result came."""
        return self.place is not None and self.run in self.ends

    @property
    def began(self) -> float:
        return self.starts[self.run]

    @property
    def ended(self) -> float:
        return self.ends[self.run]


@dataclass(frozen=True)
class TakeoverReport:
    """The JSON of ``--kill --json``. Times are seconds since the kill, as far as the demo's names do not say else."""

    killed: str
    users: int
    users_of_killed: int
    builds: int
    failed: int
    lost: int
    cut_off: int
    ended_twice: int
    first_finished_s: float
    running_again_s: float
    every_user_s: float
    back_s: float
    """From the restart of the node until it has its share of the shards."""
    strayed: int
    """Users who changed their process more often than the kill and the restart explain."""

    @property
    def ok(self) -> bool:
        """Whether nothing was lost, and every key kept to one process at a time."""
        return not (self.failed or self.lost or self.strayed)


class Takeover:
    """Work for some users on three nodes, one of which is killed and started again."""

    def __init__(self, stage: Stage, users: int) -> None:
        self.stage = stage
        self.console = stage.console
        self.users = [f"user-{number:02d}" for number in range(1, users + 1)]
        self.builds: dict[int, Build] = {}
        self._numbers = count(1)
        self._sending = True
        self._ledger = Path(stage.folder, "host", "ledger")
        self._read = 0

    def run(self) -> TakeoverReport:
        """Start the nodes, have them work, kill one, start it again; then wait for every build."""
        for name in NODES:
            self.stage.start_node(name)
        with self.console.status("starting Valkey, an SSH server and three worker nodes ..."):
            self.stage.wait_for_nodes()
        with self.console.status("builds run; one of the nodes will be killed ..."):
            pids = {name: stats["pid"] for name, stats in self.stage.all_stats().items()}
            self._work_until(lambda: self._results_since(0.0) >= SOME, "every user has builds")
            self._work(random.uniform(0.0, 2.0))  # noqa: S311 - any moment
            homes = {user: self._places(user)[-1] for user in self.users}
            nodes = [node.partition("@")[0] for node, _ in homes.values()]
            self.killed = max(NODES, key=nodes.count)
            self.moved = {user for user, node in zip(homes, nodes, strict=True) if node == self.killed}
            self._work_until(lambda: bool(self._running_there()), "a build runs there")
            self._read_ledger()
            self.killed_at = self.stage.kill(self.killed, pids[self.killed])
            self._look()
            self.cut = self._running_there()
        self.console.print(
            f"kill -9 of {self.killed}, where {len(self.cut)} builds of {len(self.moved)} users were running"
        )
        with self.console.status("its leases run out, the others take over ..."):
            self._work_until(lambda: not self.moved - self._first_ends().keys(), "others have taken over")
        self._restart()
        self._sending = False
        with self.console.status("waiting for the last builds ..."), suppress(DemoError):
            self._work_until(lambda: all(build.done for build in self.builds.values()), "all builds are done")
        return self._report()

    def _restart(self) -> None:
        with self.console.status(f"{self.killed} is started again ..."):
            self.restarted_at = checked_at = time.time()
            self.stage.start_node(self.killed)

            def shared_out() -> bool:
                nonlocal checked_at
                if time.time() < checked_at + SHARE_CHECK:
                    return False
                checked_at = time.time()
                return self.stage.shared_out()

            self._work_until(shared_out, f"{self.killed} has its share again", START_TIMEOUT)
            back_at = time.time()
            self.back_s = back_at - self.restarted_at
            self._work_until(lambda: self._results_since(back_at) >= SOME, "every user has builds")

    # -- work

    def _work_until(self, condition: Callable[[], bool], what: str, timeout: float = TASK_TIMEOUT) -> None:
        def looked() -> bool:
            self._look()
            return condition()

        until(looked, timeout, what, LOOK)

    def _work(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        self._work_until(lambda: time.monotonic() >= deadline, "some time has passed", seconds + TASK_TIMEOUT)

    def _look(self) -> None:
        """Look what has happened, and give every user something to do."""
        for build in self.builds.values():
            if not build.done and build.result.ready():
                self._collect(build)
        self._read_ledger()  # afterwards: what is written there is written before the result
        if self._sending:
            for user in self.users:
                under_way = sum(build.user == user and not build.done for build in self.builds.values())
                for _ in range(UNDER_WAY - under_way):
                    self._send(user)

    def _send(self, user: str) -> None:
        number = next(self._numbers)
        seconds = random.uniform(0.2, 0.8)  # noqa: S311
        note = f"{number} $$ >> ../ledger"
        command = f"echo start {note}; sleep {seconds:.2f}; echo end {note}; echo $$"
        self.builds[number] = Build(user, self.stage.app.tasks["tasks.builds.run_build"].delay(user, command))

    def _collect(self, build: Build) -> None:
        try:
            told = build.result.get(timeout=TASK_TIMEOUT)
            build.place, build.run = (told["node"], told["pid"]), told["output"].strip()
        except Exception as error:
            build.error = f"{build.user}: {error}"
        finally:
            # What still waits would be undone when the interpreter ends, after Valkey has gone.
            self.stage.app.backend.remove_pending_result(build.result)

    def _read_ledger(self) -> None:
        with suppress(FileNotFoundError), self._ledger.open() as file:
            file.seek(self._read)
            now = time.time()
            for line in file.read().splitlines():
                what, number, run = line.split()
                build = self.builds[int(number)]
                (build.starts if what == "start" else build.ends)[run] = now
            self._read = file.tell()

    # -- what it means

    def _results_since(self, at: float) -> int:
        """The number of results that the user with the fewest has, of builds that began after *at*."""
        fresh = [b.user for b in self.builds.values() if b.told and b.began > at]
        return min(fresh.count(user) for user in self.users)

    def _done_by(self, user: str) -> list[Build]:
        """Return the user's builds that succeeded, in the order in which they began."""
        found = [b for b in self.builds.values() if b.user == user and b.told]
        return sorted(found, key=lambda build: build.began)

    def _places(self, user: str) -> list[Place]:
        return [build.place for build in self._done_by(user) if build.place]

    def _of_moved(self) -> list[Build]:
        return [build for build in self.builds.values() if build.user in self.moved]

    def _running_there(self) -> list[Build]:
        return [b for b in self._of_moved() if len(b.starts) > len(b.ends) and not b.done]

    def _first_ends(self) -> dict[str, float]:
        """Seconds from the kill to the first end of a build elsewhere, by user of the killed node."""
        found: dict[str, float] = {}
        for build in self._of_moved():
            if build.told and build.began > self.killed_at:
                taken = build.ended - self.killed_at
                found[build.user] = min(taken, found.get(build.user, taken))
        return found

    def _moves(self, user: str, after: float, before: float) -> int:
        """How often the user's builds, of those that began in this time, are in another process than the one before."""
        return sum(
            one.place != other.place and after < other.began <= before for one, other in pairwise(self._done_by(user))
        )

    def _strays(self, user: str) -> bool:
        return (
            self._moves(user, 0.0, self.killed_at) > 0
            or self._moves(user, self.killed_at, self.restarted_at) > (user in self.moved)
            or self._moves(user, self.restarted_at, float("inf")) > 1
        )

    def _report(self) -> TakeoverReport:
        first_ends = self._first_ends().values()
        again = [list(build.starts.values())[1] - self.killed_at for build in self.cut if len(build.starts) > 1]
        return TakeoverReport(
            killed=self.killed,
            users=len(self.users),
            users_of_killed=len(self.moved),
            builds=len(self.builds),
            failed=sum(bool(build.error) for build in self.builds.values()),
            lost=sum(not build.done for build in self.builds.values()),
            cut_off=len(self.cut),
            ended_twice=sum(len(build.ends) > 1 for build in self.builds.values()),
            first_finished_s=round(min(first_ends), 2),
            running_again_s=round(max(again, default=0.0), 2),
            every_user_s=round(max(first_ends), 2),
            back_s=round(self.back_s, 2),
            strayed=sum(self._strays(user) for user in self.users),
        )

    def show(self, report: TakeoverReport) -> None:
        """Print the table and the verdict."""
        table = Table(title=f"kill -9 of {report.killed}", title_justify="left")
        for column in ("user", "before", "after the kill", "when it was back"):
            table.add_column(column)
        for column in ("builds", "cut off", "waited s"):
            table.add_column(column, justify="right")
        waited = self._first_ends()
        for user in self.users:
            built = self._done_by(user)
            times = [(0.0, self.killed_at), (self.killed_at, self.restarted_at), (self.restarted_at, float("inf"))]
            table.add_row(
                user,
                *(_named([b.place for b in built if b.place and after < b.began <= to]) for after, to in times),
                str(len(built)),
                str(sum(build.user == user for build in self.cut)),
                f"{waited[user]:.1f}" if user in waited else "",
            )
        self.console.print(table)
        for line in self._verdict(report):
            self.console.print(line, highlight=False)

    def _verdict(self, report: TakeoverReport) -> list[str]:
        succeeded = report.builds - report.failed - report.lost
        return [
            (
                f"Takeover: {report.first_finished_s:.1f} s from the kill to the first build finished by a new owner,"
                f" {report.every_user_s:.1f} s until each of its {report.users_of_killed} users had one."
            ),
            (
                f"The {report.cut_off} builds that were running there ran again, the last of them after"
                f" {report.running_again_s:.1f} s; started again, {report.killed} had its share of the shards after"
                f" {report.back_s:.1f} s."
            ),
            f"{succeeded} of {report.builds} builds succeeded: {report.lost} lost, {report.failed} failed.",
            (
                f"{report.users - report.strayed} of {report.users} users had one process at a time, which changed only"
                " when a node went or came."
            ),
            *[build.error for build in self.builds.values() if build.error][:5],
        ]


def _named(places: list[Place]) -> str:
    """Each node once, in order."""
    return " -> ".join(dict.fromkeys(node.partition("@")[0] for node, _ in places))
