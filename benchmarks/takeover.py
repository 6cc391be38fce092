"""Kill -9 of a node under load: when do others finish its tasks, and when does what it was running run again?"""

import random
import time
from pathlib import Path

from benchmarks.fleet import SHARDS, Fleet, by_shard, fleet, keys_by_shard, percentile
from benchmarks.harness import Report, p50, spread

NODES = ("node0", "node1", "node2")
EVERY = 0.5  # seconds between two tasks of a shard
BUILDS = 3  # that run on the node when it is killed
TIMEOUT = 30.0  # seconds for others to take over


def measure(*, quick: bool) -> Report:
    kills = 3 if quick else 30
    report = Report("takeover", f"{kills} kills of one of {len(NODES)} nodes, TTL 5 s, heartbeat 1 s, {SHARDS} shards")
    first: list[float] = []
    each: list[float] = []
    again: list[float] = []
    keys = keys_by_shard()
    chance = random.Random(11)
    with fleet() as site:
        site.start(*NODES)
        with site.load(keys.values(), EVERY):
            for number in range(kills):
                victim = NODES[number % len(NODES)]
                gate = site.folder / f"gate-{number}"
                builds = _builds(site, victim, gate)
                time.sleep(chance.uniform(0.0, 1.0))  # any moment between two heartbeats
                finished, running = _one_kill(site, victim, builds)
                gate.touch()
                first.append(min(finished))
                each.extend(finished)
                again.extend(running)
                site.start(victim)
        site.drain()
        sent, lost = len(site.sent), len(site.lost())
        failed, ended_twice = len(site.ledger.counts("fail")), site.twice("end")
        interrupted = site.twice("start") - ended_twice
    report.raw |= {"first": first, "each shard": each, "running again": again}
    report.add("kill -> first task finished by a new owner, p50", p50(first), "s", 5.5, remark=spread(first))
    report.add("... p99", percentile(first, 0.99), "s", 7.0)
    report.add("kill -> first task finished, each of its shards, p50", p50(each), "s", 5.5, remark=spread(each))
    report.add("... p99", percentile(each, 0.99), "s", 7.0)
    report.add("kill -> a build that was running runs again, p50", p50(again), "s", 5.5, remark=spread(again))
    report.add("... p99", percentile(again, 0.99), "s", 7.0)
    report.add("tasks lost", lost, "tasks", 0.0, remark=f"of {sent:,}")
    report.add("tasks failed", failed, "tasks", 0.0)
    report.add(
        "tasks that were cut off and ran again", interrupted, "tasks", remark=f"{kills * BUILDS} builds among them"
    )
    report.add("tasks that ended twice: the node died between end and acknowledgement", ended_twice, "tasks")
    report.notes.append(
        f"Steady load: a task for each shard every {EVERY:g} s, so some of a shard's time is waiting for work."
    )
    return report


def _builds(site: Fleet, victim: str, gate: Path) -> list[int]:
    """Have some builds run on *victim* until the gate is opened; return their numbers."""
    owners = site.owners()
    mine = [key for shard, key in keys_by_shard().items() if owners[shard] == victim]
    numbers = [site.send(key, f"while [ ! -e {gate} ]; do sleep 0.05; done") for key in mine[:BUILDS]]
    site.until(lambda: site.ledger.counts("start").keys() >= set(numbers), "builds run")
    return numbers


def _one_kill(site: Fleet, victim: str, builds: list[int]) -> tuple[list[float], list[float]]:
    """Seconds until each shard of *victim* had a task finished elsewhere, and until each build ran elsewhere."""
    shards = {shard for shard, owner in site.owners().items() if owner == victim}
    killed = site.kill(victim)

    def finished() -> dict[int, float]:
        ends = by_shard([e for e in site.ledger.since(killed, "end") if e.node != victim])
        return {shard: ends[shard][0].at - killed for shard in shards if ends[shard]}

    def running() -> dict[int, float]:
        found = [e for e in site.ledger.since(killed, "start") if e.number in builds]
        return {entry.number: entry.at - killed for entry in reversed(found)}

    site.until(lambda: len(finished()) == len(shards) and len(running()) == len(builds), "has taken over", TIMEOUT)
    return list(finished().values()), list(running().values())
