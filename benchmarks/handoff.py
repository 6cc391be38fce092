"""Nodes that join, leave and are restarted under load: how long does a shard stand still, and what is lost?"""

import time
from contextlib import AbstractContextManager
from itertools import cycle, islice, pairwise

from benchmarks.fleet import SHARDS, Fleet, by_shard, fleet, keys_by_shard, percentile
from benchmarks.harness import Report, p50, spread

EVERY = 0.25  # seconds between two tasks of a shard
BUILD = "sleep 0.1"
BUILDS = 8  # keys whose tasks run a command; the others only borrow their backend


def measure(*, quick: bool) -> Report:
    rounds, restarts = (1, 1) if quick else (5, 9)
    report = Report(
        "handoff",
        f"{SHARDS} shards: a node joins 2 others and leaves, {rounds} x; then one of 3 restarts, {restarts} x",
    )
    with fleet() as site:
        site.start("node0", "node1")
        joins, leaves = _moves(site, rounds)
        _add_gaps(report, "a node joins", joins)
        _add_gaps(report, "a node leaves", leaves)
        site.start("node2")
        rolling = _rolling_restart(site, restarts)
        _add_gaps(report, "rolling restart of 3", rolling)
        site.drain()
        report.add("tasks lost", len(site.lost()), "tasks", 0.0, remark=f"of {len(site.sent):,}")
        report.add("tasks failed", len(site.ledger.counts("fail")), "tasks", 0.0)
        report.add("tasks that started twice", site.twice("start"), "tasks", 0.0)
    report.raw |= {"joins": joins, "leaves": leaves, "rolling restart": rolling}
    report.notes.append(
        f"Gap: last start on the old node to the first on the new one. Each shard has a task every {EVERY:g} s, so"
        f" {EVERY:g} s of it are the load's; {BUILDS} of the shards run `{BUILD}` each time."
    )
    return report


def _moves(site: Fleet, rounds: int) -> tuple[list[float], list[float]]:
    joins: list[float] = []
    leaves: list[float] = []
    for _ in range(rounds):
        with _load(site):
            begun = _steady(site)
            site.start("node2")
            _steady(site)
        site.drain()
        joins += _gaps(site, begun)
        with _load(site):
            begun = _steady(site)
            site.leave("node2")
            site.until_shared_out()
            _steady(site)
        site.drain()
        leaves += _gaps(site, begun)
    return joins, leaves


def _rolling_restart(site: Fleet, restarts: int) -> list[float]:
    gaps: list[float] = []
    with _load(site):
        for name in islice(cycle(list(site.nodes)), restarts):
            begun = _steady(site)
            site.leave(name)
            site.until_shared_out()
            _steady(site)
            gaps += _gaps(site, begun)
            begun = _steady(site)
            site.start(name)
            _steady(site)
            gaps += _gaps(site, begun)
    return gaps


def _load(site: Fleet) -> AbstractContextManager[None]:
    keys = list(keys_by_shard().values())
    return site.load(keys, EVERY, dict.fromkeys(keys[:: SHARDS // BUILDS], BUILD))


def _steady(site: Fleet) -> float:
    """Wait until each shard has ended a task that ran from now on; return this moment."""
    begun = time.time()
    site.until(lambda: len(by_shard(site.ledger.since(begun, "end"))) == SHARDS, "every shard works")
    return begun


def _gaps(site: Fleet, begun: float) -> list[float]:
    """For each shard that changed its node since *begun*: seconds from the last start there to the first here."""
    gaps = []
    for entries in by_shard(site.ledger.since(begun, "start")).values():
        gaps += [after.at - before.at for before, after in pairwise(entries) if before.node != after.node]
    return gaps


def _add_gaps(report: Report, what: str, gaps: list[float]) -> None:
    report.add(f"{what}: gap of a shard that moves, p50", p50(gaps), "s", remark=spread(gaps))
    report.add("... p99", percentile(gaps, 0.99), "s", 1.0)
