"""Kill -9 of nodes with builds: what is left on the host 5 s later? And does a durable one run once, to its end?"""

import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import psutil

from benchmarks.build_host import BuildHost
from benchmarks.fleet import Fleet, fleet, keys_by_shard
from benchmarks.harness import Report, p50, spread, ssh_hosts, ssh_server

NODES = ("node0", "node1", "node2", "node3", "node4")
PATIENCE = 5.0  # seconds after a kill
BOOT = 60.0  # seconds for all builds of a batch to run
STAY = """sh -c 'trap "" TERM HUP INT; echo $$ >> ../pids; while :; do sleep 0.2; done'"""
NASTY = {
    "plain": f"{STAY} & {STAY}",
    "setsid": f"setsid {STAY} & {STAY}",
    "daemon": f"(setsid {STAY} >/dev/null 2>&1 &); {STAY}",
    "storm": f"(while :; do setsid sleep 600 >/dev/null 2>&1 & sleep 0.2; done) & {STAY}",
}
TOGETHER = ("daemon", "storm")  # two more, that one user runs at once
SAYING = 10  # of all their processes say that they run
KINDS = {"alone": "a user's only build", "together": "two builds of a user at once"}

SHORT = {"POOL_LEASE_TTL": "2.5", "POOL_LEASE_HEARTBEAT": "0.5"}
VICTIMS = 2  # nodes that are killed at once while they run durable builds
BUILDS = 2  # that run on each of them, and one more that was sent a moment ago
LINES, PAUSE, CODE = 20, 0.2, 7
OUTPUT = "".join(f"line {number}\n" for number in range(LINES))
LOOP = f"i=0; while [ $i -lt {LINES} ]; do echo line $i; i=$((i + 1)); sleep {PAUSE}; done; exit {CODE}"
RESULT_TIMEOUT = 60.0  # seconds


def measure(*, quick: bool) -> Report:
    kills, cuts = (5, 4) if quick else (100, 50)
    report = Report("build_kills", f"{kills} kill -9 of nodes with builds, {cuts} with durable ones")
    with fleet() as site, ssh_server(site.folder) as (which, info), ExitStack() as stack:
        report.title += f" ({which})"
        site.env["POOL_HOSTS_FILE"] = str(ssh_hosts(site.folder, info))
        host = BuildHost(site.folder, info)
        stack.callback(host.clear)
        stack.callback(lambda: [site.kill(name) for name in list(site.nodes)])  # first: they would build again
        killing, cutting = Killing(site, host), Cutting(site, host)
        for _ in range(kills // len(NODES)):
            killing.one_batch()
        killing.tell(report, kills)
        site.start(*NODES, **SHORT)
        for _ in range(cuts // VICTIMS):
            cutting.one_round()
        cutting.tell(report, cuts)
    return report


class Killing:
    """Batches of nodes that are started, given builds which do not want to end, and killed."""

    def __init__(self, site: Fleet, host: BuildHost) -> None:
        self.site, self.host = site, host
        self.ran: Counter[str] = Counter()
        self.ended = 0  # processes that were gone before the kill
        self.left: dict[str, list[int]] = {kind: [] for kind in (*KINDS, "others")}
        self.gone: list[float] = []
        self.told: list[str] = []
        self._chance = random.Random(12)

    def one_batch(self) -> None:
        """Start nodes with builds, kill them all, look what is left."""
        pids = self.host.folder / "pids"
        pids.unlink(missing_ok=True)
        self.site.start(*NODES)
        for name in NODES:
            *alone, shared = islice(_keys(self.site, name), len(NASTY) + 1)
            for key, command in zip(alone, NASTY.values(), strict=True):
                self.host.run(key, command, "alone")
            for nasty in TOGETHER:
                self.host.run(shared, NASTY[nasty], "together")
        said = SAYING * len(NODES)
        self.site.until(lambda: pids.exists() and len(pids.read_text().splitlines()) >= said, "its builds run", BOOT)
        time.sleep(self._chance.uniform(0.0, 1.0))
        unseen = {int(pid) for pid in pids.read_text().split()} - {process.pid for process in self.host.builds()}
        if any(map(psutil.pid_exists, unseen)):
            raise RuntimeError("processes said that they run, and are not seen: nor would be what is left of them")
        self.ended += len(unseen)
        self.ran.update({kind: len(self.host.builds(kind, looks=1)) for kind in KINDS})
        self._kill()
        self.site.forget()  # the builds would run again

    def _kill(self) -> None:
        killed = seen = time.monotonic()
        for name in NODES:
            self.site.kill(name)
        while (now := time.monotonic()) < killed + PATIENCE:
            if self.host.builds("alone", looks=1):
                seen = now
            time.sleep(0.05)
        self.gone.append(seen - killed)
        left = {kind: self.host.builds(kind) for kind in KINDS} | {"others": self.host.others()}
        for kind, processes in left.items():
            self.left[kind].append(len(processes))
            self.told += [f"{kind}: {process}" for process in processes]
        self.host.clear()

    def tell(self, report: Report, kills: int) -> None:
        report.raw |= {"gone before": self.ended, "left": self.left, "gone, s": self.gone, "was left": self.told}
        for kind, whose in KINDS.items():
            what = f"{whose}: processes left {PATIENCE:g} s after the kill, grandchildren included"
            remark = f"of {self.ran[kind]:,}, of {kills} nodes"
            report.add(what, sum(self.left[kind]), "processes", 0.0, remark=remark)
        report.add("helpers and shells of ours, left then", sum(self.left["others"]), "processes", 0.0)
        what = f"kill -> the last process of its batch is gone ({KINDS['alone']}), p50"
        report.add(what, p50(self.gone), "s", remark=spread(self.gone))
        report.notes.append(
            f"{len(NODES)} nodes at once, each with one build of {len(NASTY)} users and two of one more. All"
            f" ignore TERM and start processes that do: {', '.join(NASTY)}; the two: {', '.join(TOGETHER)}."
        )


@dataclass
class Durable:
    """A durable build that was sent to a node; *ledger*: where its command leaves a line when it starts."""

    ledger: Path
    result: Any
    node: str

    def starts(self) -> int:
        return len(self.ledger.read_text().splitlines()) if self.ledger.exists() else 0

    def end(self) -> tuple[str, str]:
        """Wait for its end; return the node that told it, and what is wrong with it, if anything."""
        try:
            told = self.result.get(timeout=RESULT_TIMEOUT)
        except Exception as error:  # whatever it failed with
            return "", f"{self.result.id}: started {self.starts()} times, no result: {error!r}"
        node = told["node"].partition("@")[0]
        right = (self.starts(), told["exit_code"], told["output"]) == (1, CODE, OUTPUT)
        return node, "" if right else f"{self.result.id}: started {self.starts()} times, result {told}"


class Cutting:
    """Rounds of durable builds, whose nodes are killed at any moment of them."""

    def __init__(self, site: Fleet, host: BuildHost) -> None:
        self.site, self.host = site, host
        self.sent = self.left = 0
        self.cut: list[int] = []  # builds that ran when their node was killed, for each kill
        self.wrong: list[str] = []
        self.nodes: Counter[str] = Counter()
        self._chance = random.Random(13)

    def one_round(self) -> None:
        """Kill some of the nodes, start them again, and ask for the results."""
        victims = self._chance.sample(NODES, VICTIMS)
        keys = {name: _keys(self.site, name) for name in victims}
        builds = [self._send(next(keys[name]), name) for name in victims for _ in range(BUILDS)]
        self.site.until(lambda: all(build.starts() for build in builds), "builds run")
        time.sleep(self._chance.uniform(0.0, LINES * PAUSE - 0.5))
        builds += [self._send(next(keys[name]), name) for name in victims]
        time.sleep(self._chance.uniform(0.0, 0.3))
        for name in victims:
            self.site.kill(name)
            self.cut.append(sum(b.starts() > 0 and not b.result.ready() for b in builds if b.node == name))
        self.site.start(*victims, **SHORT)
        for build in builds:
            node, wrong = build.end()
            self.nodes["the same" if node == build.node else "another"] += 1
            self.wrong += [wrong] if wrong else []
        self.site.until_shared_out()
        self.left += len(self.host.builds("durable"))

    def _send(self, key: str, node: str) -> Durable:
        file = f"starts-{self.sent}"
        self.sent += 1
        result = self.host.run(key, f"echo started >> {file}; {LOOP}", "durable", check=False, durable=True)
        return Durable(self.host.folder / key / file, result, node)

    def tell(self, report: Report, kills: int) -> None:
        report.raw |= {"builds cut by each kill": self.cut, "wrong": self.wrong, "result from": self.nodes}
        report.add("kills that met a durable build which ran", sum(map(bool, self.cut)), "kills", kills, least=True)
        what = "durable builds without result, not started once, or of another exit code or output"
        remark = f"of {self.sent}, {sum(self.cut)} of which ran when their node was killed"
        report.add(what, len(self.wrong), "builds", 0.0, remark=remark)
        report.add("... whose result another node told", self.nodes["another"], "builds")
        report.add("processes of durable builds, left after their results", self.left, "processes", 0.0)


def _keys(site: Fleet, node: str) -> Iterator[str]:
    """Keys that a node owns, each in a shard of its own."""
    owners = site.owners()
    return (key for shard, key in keys_by_shard().items() if owners[shard] == node)
