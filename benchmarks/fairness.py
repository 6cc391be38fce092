"""One user has a thousand builds queued: how long does another user's build wait, and what does the limit cost?"""

import random
import time
from itertools import count

from benchmarks.fleet import Fleet, fleet, keys_by_shard, percentile
from benchmarks.harness import Report, interleaved, p50, ratio, spread

QUEUED = 1000
BUILD = "sleep 1"
LIMITS = {"limit 4, the default": {}, "no limit": {"POOL_KEY_CONCURRENCY": "100000"}}
MIXED = 1500  # tasks of the mixed load ...
KEYS = 100  # ... of so many keys, and of one that has a tenth of all
BUSY = 0.8  # share of the mixed load after which there is still work for every thread
NODE = "node0"

_rounds = count()


def measure(*, quick: bool) -> Report:
    probes, rounds = (30, 1) if quick else (300, 6)
    report = Report("fairness", f"one node, 32 threads; one user with {QUEUED:,} builds of 1 s queued")
    with fleet() as site:
        waits = {"nobody else": _waits(site, probes, flood=False)}
        waits |= {name: _waits(site, probes, flood=True, **env) for name, env in LIMITS.items()}
        mixed = {name: _Mixed(site, **env) for name, env in LIMITS.items()}
        told = interleaved({name: load.run for name, load in mixed.items()}, rounds)
    limited, unlimited = LIMITS
    report.raw |= {"seconds until a build of another user starts": waits, "seconds of the mixed load": told}
    report.raw["seconds of the mixed load, all of it"] = {name: load.whole for name, load in mixed.items()}
    ours = [1e3 * wait for wait in waits[limited]]
    report.add("another user's build: delay() -> it starts, p50", p50(ours), "ms", 100.0, remark=spread(ours))
    report.add("... p99", percentile(ours, 0.99), "ms", 500.0)
    report.add("... p50 while nobody else has builds", 1e3 * p50(waits["nobody else"]), "ms")
    report.add("... p50 without a limit per key", 1e3 * p50(waits[unlimited]), "ms")
    report.add(f"mixed load of {KEYS + 1} keys: tasks per second with / without the limit",
               ratio(told[unlimited], told[limited]), "x", 0.95, least=True,
               remark=spread([b / a for a, b in zip(told[limited], told[unlimited], strict=True)]))  # fmt: skip
    report.add("... tasks per second with it", BUSY * MIXED / p50(told[limited]), "/s")
    report.add("... the whole load, to the last task of its busiest key, with / without",
               ratio(mixed[unlimited].whole, mixed[limited].whole), "x")  # fmt: skip
    report.notes.append(
        f"The mixed load: {MIXED:,} tasks that hold their backend for 20 to 180 ms, a tenth of them of one key. Counted"
        f" while every thread has work, to {BUSY:.0%} of it; then the limit leaves the busiest key its 4"
        " threads and the others nothing to do."
    )
    return report


def _waits(site: Fleet, probes: int, *, flood: bool, **env: str) -> list[float]:
    """Seconds from sending a task of a quiet user to its start."""
    chance = random.Random(5)
    busy, *quiet = keys_by_shard().values()
    site.start(NODE, **env)
    for key in quiet:
        site.send(key)
    site.drain()
    if flood:
        builds = [site.send(busy, BUILD) for _ in range(QUEUED)]
        site.until(lambda: site.ledger.counts("start").keys() & set(builds), "the flood has begun")
    sent: dict[int, float] = {}
    for _ in range(probes):
        time.sleep(chance.uniform(0.02, 0.1))
        at = time.time()
        sent[site.send(chance.choice(quiet), "true")] = at
    site.until(lambda: site.ledger.counts("start").keys() >= sent.keys(), "the other users' builds have started")
    started = {entry.number: entry.at for entry in site.ledger.read() if entry.what == "start"}
    site.leave(NODE)
    site.forget()
    return [started[number] - at for number, at in sent.items()]


class _Mixed:
    """The mixed load on a node with a limit of its own."""

    def __init__(self, site: Fleet, **env: str) -> None:
        self._site = site
        self._env = env
        self.whole: list[float] = []
        """Seconds from the first start to the last end, of each round."""

    def run(self) -> float:
        """Seconds from the first start to the end of as many tasks as `BUSY` says."""
        site, chance, number = self._site, random.Random(6), next(_rounds)
        site.start(NODE, **self._env)
        begun = time.time()
        for _ in range(MIXED):
            key = "hot" if chance.random() < 0.1 else f"mixed-{chance.randrange(KEYS)}"
            site.send(f"{key}-{number}", pause=chance.uniform(0.02, 0.18))
        site.until(lambda: not site.lost(), "the mixed load is done")
        first, ends = site.ledger.since(begun, "start")[0].at, site.ledger.since(begun, "end")
        site.leave(NODE)
        self.whole.append(ends[-1].at - first)
        return ends[int(BUSY * MIXED)].at - first
