"""shards -> nodes: who should own what. Every node computes the same answer from the same members and owners.

1. `_quotas`: how many shards each node gets. What rounding down leaves over goes first to where it saves a move.
2. `_best_first`: a node keeps as many shards as its quota; above it, those leave for which it ranks lowest.
3. `_place`: what leaves, and what nobody owns, goes to nodes with room, by rendezvous: the highest rank wins.

Step 1 makes the number of moves minimal; the other two only say which shards move, and where to.
"""

from bisect import bisect
from collections.abc import Collection, Iterable, Mapping
from fractions import Fraction
from hashlib import blake2b
from math import inf

CANDIDATES = 64  # nodes ranked for one moving shard: with all, a cold start of 1,000 x 16,384 takes 7 s, not 0.6


def assign(
    shards: int | Collection[int],
    nodes: Iterable[str],
    current: Mapping[int, str],
    weights: Mapping[str, float] | None = None,
) -> dict[int, str]:
    """Return the node that should own each shard, in ascending order of shards; nothing without nodes.

    *shards*: how many (0 to *shards* - 1), or which. *current*: who owns what now; an owner that is not in *nodes* is
    gone, a shard that is not in *shards* is ignored. *weights*: the capacity of each node, in any unit; equal without.

    Balance: a node gets its exact proportional share, rounded down or up; equal nodes differ by at most one shard.
    Stability: no assignment with that balance moves fewer shards; a balanced *current* comes back as it is.
    Determinism: the same on every machine and in every process, whatever the order of the arguments.

    Raises `ValueError` when the weight of a node is missing, or not a positive finite number.
    """
    names = sorted(set(nodes))
    if not names:
        return {}
    wanted = sorted(set(range(shards) if isinstance(shards, int) else shards))
    held: dict[str, list[int]] = {node: [] for node in names}
    moving: list[int] = []
    for shard in wanted:
        owner = current.get(shard)
        if owner in held:
            held[owner].append(shard)
        else:
            moving.append(shard)
    quotas = _quotas(len(wanted), _capacities(names, weights), {node: len(held[node]) for node in names})
    owners: dict[int, str] = {}
    for node, quota in quotas.items():
        ordered = _best_first(node, held[node]) if len(held[node]) > quota else held[node]
        owners |= dict.fromkeys(ordered[:quota], node)
        moving += ordered[quota:]
    room = {node: quota - len(held[node]) for node, quota in quotas.items() if quota > len(held[node])}
    owners |= _place(sorted(moving), room)
    return {shard: owners[shard] for shard in wanted}


def _capacities(names: list[str], weights: Mapping[str, float] | None) -> dict[str, Fraction]:
    """Fractions, because a share that floats miss by 1e-15 is rounded to another shard."""
    if weights is None:
        return dict.fromkeys(names, Fraction(1))
    for node in names:
        weight = weights.get(node)
        if weight is None or not 0 < weight < inf:  # nan is not either
            found = "missing" if weight is None else weight
            raise ValueError(f"weight of node {node!r} is {found}: it must be a positive finite number")
    return {node: Fraction(weights[node]) for node in names}


def _quotas(shards: int, capacities: Mapping[str, Fraction], held: Mapping[str, int]) -> dict[str, int]:
    """Return how many shards each node gets: its exact share rounded down, or up where that leaves shards over.

    Up go first the nodes that hold more than their share rounded down, each of which saves a move; then the largest
    remainders; then the first in *capacities*. A share without a remainder is never rounded.
    """
    whole = sum(capacities.values())
    quotas: dict[str, int] = {}
    remainders: dict[str, Fraction] = {}
    for node, capacity in capacities.items():
        quotas[node], remainders[node] = divmod(shards * capacity, whole)
    uneven = [node for node in quotas if remainders[node]]
    uneven.sort(key=lambda node: (held[node] > quotas[node], remainders[node]), reverse=True)
    for node in uneven[: shards - sum(quotas.values())]:
        quotas[node] += 1
    return quotas


def _best_first(node: str, shards: Iterable[int]) -> list[int]:
    return sorted(shards, key=lambda shard: (_rank(f"{node}/{shard}"), shard), reverse=True)


def _place(shards: Iterable[int], room: dict[str, int]) -> dict[int, str]:
    """Give each shard to the node that ranks highest for it, while that has room. *room*, in shards, is enough for all.

    Where more than `CANDIDATES` nodes have room, those are ranked that follow the shard on a circle of hashes.
    """
    circle = sorted((_rank(node), node) for node in room)
    owners: dict[int, str] = {}
    for shard in shards:
        start = bisect(circle, (_rank(str(shard)), ""))
        candidates = (circle[start:] + circle[:start])[:CANDIDATES]
        _, node, place = max((_rank(f"{node}/{shard}"), node, place) for place, node in candidates)
        owners[shard] = node
        room[node] -= 1
        if not room[node]:
            circle.remove((place, node))
    return owners


def by_rank(shard: int, nodes: Iterable[str]) -> list[str]:
    """Return *nodes* in the order of their rank for *shard*, the highest first."""
    return sorted(nodes, key=lambda node: (_rank(f"{node}/{shard}"), node), reverse=True)


def _rank(text: str) -> bytes:
    """A stable pseudo-random 64-bit number, as bytes that compare like it. Equal ranks are told apart by name."""
    return blake2b(text.encode(), digest_size=8).digest()
