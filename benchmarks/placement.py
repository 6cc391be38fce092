"""Which node owns which shard: moves, balance, and the time to decide."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from time import perf_counter

from benchmarks.harness import Report, interleaved, p50, spread
from pool.sharding.placement import CANDIDATES, assign

SHARDS, NODES = 16_384, 1_000


def measure(*, quick: bool) -> Report:
    changes, starts = (3, 1) if quick else (15, 5)
    report = Report("placement", f"shards to nodes, one change and a cold start at {NODES:,} x {SHARDS:,}")
    nodes = [f"node-{number}@host" for number in range(NODES)]
    _moves(report, nodes)
    full = assign(SHARDS, nodes, {})
    fewer = assign(SHARDS, nodes[1:], full)
    contestants: dict[str, Callable[[], float]] = {
        "no change": lambda: _ms(nodes, full),
        "a node leaves": lambda: _ms(nodes[1:], full),
        "a node joins": lambda: _ms(nodes, fewer),
    }
    told = interleaved(contestants, changes)
    half = {"cold start": lambda: _ms(nodes, {}), "half of the nodes leave": lambda: _ms(nodes[NODES // 2 :], full)}
    told |= interleaved(half, starts)
    for what, taken in told.items():
        required = 2000.0 if what.startswith("a node") else None
        report.add(f"{NODES:,} x {SHARDS:,}: {what}", p50(taken), "ms", required, remark=spread(taken))
    report.raw["ms"] = told
    report.notes.append(
        f"For a shard that moves, at most {CANDIDATES} nodes with room are ranked. After one change fewer have room."
    )
    return report


def _moves(report: Report, nodes: list[str]) -> None:
    four = assign(64, nodes[:4], {})
    five = assign(64, nodes[:5], four)
    back = assign(64, nodes[:4], five)
    joined, died = _moved(four, five), _moved(five, back)
    lost = Counter(five.values())[nodes[4]]
    report.add("64 shards, 4 -> 5 nodes: shards that move", 100 * joined / 64, "%", 20.4,
               remark=f"{joined} of 64; {64 // 5} are the least")  # fmt: skip
    report.add("64 shards, 5 -> 4 nodes: shards that move", died, "shards", lost, remark="the dead node's own")
    fifty = assign(64, nodes[:50], {})
    report.add("64 shards, 5 nodes: most - least", _spread(five, nodes[:5]), "shards", 1.0)
    report.add("64 shards, 50 nodes: most - least", _spread(fifty, nodes[:50]), "shards", 1.0)
    many = assign(SHARDS, nodes, {})
    report.add(f"{SHARDS:,} shards, {NODES:,} nodes: most - least", _spread(many, nodes), "shards", 1.0)


def _moved(before: Mapping[int, str], after: Mapping[int, str]) -> int:
    return sum(before[shard] != after[shard] for shard in before)


def _spread(owners: Mapping[int, str], nodes: Collection[str]) -> int:
    counts = Counter(owners.values())
    return max(counts[node] for node in nodes) - min(counts[node] for node in nodes)


def _ms(nodes: Collection[str], current: Mapping[int, str]) -> float:
    started = perf_counter()
    assign(SHARDS, nodes, current)
    return 1e3 * (perf_counter() - started)
