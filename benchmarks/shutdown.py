"""TERM for a node that is busy, while thousands of tasks wait: how long until it has gone, does any task run twice?"""

import threading
from pathlib import Path

from benchmarks.fleet import Fleet, fleet, keys_by_shard
from benchmarks.harness import Report, p50, spread

WAITING = 3000  # tasks that have not started when the signal comes, at least
PAUSE = 0.5  # seconds that one of them takes
KEYS = 200
BUILDS = 8  # that run when the signal comes ...
LINGER = 1.0  # ... and end so many seconds later


def measure(*, quick: bool) -> Report:
    rounds = 1 if quick else 5
    report = Report("shutdown", f"TERM with {WAITING:,} tasks queued and {BUILDS} builds running, {rounds} times each")
    taken: dict[str, list[float]] = {"another node is there": [], "it is the only node": []}
    waiting: list[int] = []
    with fleet() as site:
        for number in range(rounds):
            for what, told in taken.items():
                alone = what == "it is the only node"
                site.start("node0", *([] if alone else ["node1"]))
                seconds, queued = _stop_one(site, "node0", site.folder / f"gate-{number}-{alone}")
                told.append(seconds)
                waiting.append(queued)
                if alone:
                    site.start("node1")
                site.drain()
                site.leave("node1")
        lost, failed, twice = len(site.lost()), len(site.ledger.counts("fail")), site.twice("start")
        sent = len(site.sent)
    report.raw |= {"seconds after the last task": taken, "tasks that were waiting": waiting}
    for what, told in taken.items():
        report.add(f"{what}: end of its last task -> gone, the longest", max(told), "s", 3.0, remark=spread(told))
    report.add("tasks that were executed twice", twice, "tasks", 0.0, remark=f"of {sent:,}")
    report.add("tasks lost", lost, "tasks", 0.0)
    report.add("tasks failed", failed, "tasks", 0.0)
    report.add("tasks that waited when the signal came, the least", min(waiting), "tasks", WAITING, least=True)
    report.add("... p50", p50(waiting), "tasks")
    report.notes.append(
        f"{KEYS} keys, {PAUSE:g} s a task. Stock Celery, prefork: 11 executed twice, 5 of 8 stops took over 30 s."
    )
    return report


def _stop_one(site: Fleet, name: str, gate: Path) -> tuple[float, int]:
    """Seconds from the end of the node's last task to its own end, and how many tasks waited when it was told to."""
    owners = site.owners()
    mine = [key for shard, key in keys_by_shard().items() if owners[shard] == name][:BUILDS]
    builds = {site.send(key, f"while [ ! -e {gate} ]; do sleep 0.05; done") for key in mine}
    site.until(lambda: site.ledger.counts("start").keys() >= builds, "builds run")
    queued = 0
    while queued < WAITING:
        for number in range(KEYS):
            site.send(f"flood-{number}", pause=PAUSE)
        queued = len(site.sent) - len(site.ledger.counts("start"))
    threading.Timer(LINGER, gate.touch).start()
    gone = site.leave(name)
    return gone - max(entry.at for entry in site.ledger.read() if entry.node == name), queued
