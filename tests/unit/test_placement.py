"""shards -> nodes: balance, the fewest moves that keep it, and one answer everywhere."""

import itertools
import os
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from hashlib import blake2b, sha256
from math import ceil, floor, inf, nan
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pool
from pool.sharding import placement
from pool.sharding.placement import CANDIDATES, assign

NODES = [f"node-{number}@host" for number in range(1, 9)]
SIZES = st.integers(1, 3)  # some shares are whole numbers, some are not
WEIGHTS = st.one_of(SIZES, st.floats(0.01, 1000), st.sampled_from([0.1, 0.2, 0.3, 1e-300, 1e300]))


@st.composite
def situations(draw, max_shards=80, max_nodes=8):
    """``(shards, nodes, current, weights)``: any owners, gone ones and unowned shards among them."""
    shards = draw(st.integers(0, max_shards))
    nodes = NODES[: draw(st.integers(1, max_nodes))]
    owners = st.lists(st.sampled_from([*nodes, "gone", None]), min_size=shards, max_size=shards)
    current = {shard: owner for shard, owner in enumerate(draw(owners)) if owner is not None}
    weights = draw(
        st.none()
        | st.fixed_dictionaries(dict.fromkeys(nodes, SIZES))
        | st.fixed_dictionaries(dict.fromkeys(nodes, WEIGHTS))
    )
    return shards, nodes, current, weights


def shares(shards, nodes, weights):
    """Exact proportional shares, computed apart from the code under test."""
    exact = {node: Fraction(1 if weights is None else weights[node]) for node in nodes}
    return {node: shards * exact[node] / sum(exact.values()) for node in nodes}


def moves(current, wanted):
    return sum(current.get(shard) != node for shard, node in wanted.items())


def rank(node, shard):
    """The documented weight of a pair."""
    return blake2b(f"{node}/{shard}".encode(), digest_size=8).digest()


def fewest_by_trying_all(shards, nodes, current, weights):
    """Look at every assignment there is."""
    share = shares(shards, nodes, weights)
    tried = (dict(enumerate(owners)) for owners in itertools.product(nodes, repeat=shards))
    return min(
        moves(current, owners)
        for owners in tried
        if all(abs(list(owners.values()).count(node) - share[node]) < 1 for node in nodes)
    )


def fewest_by_counts(shards, nodes, current, weights):
    """The best counts, node by node: `best[n]` is the fewest moves with n shards given to the nodes so far."""
    share = shares(shards, nodes, weights)
    held = Counter(owner for shard, owner in current.items() if shard < shards)
    best = {0: shards - sum(held[node] for node in nodes)}
    for node in nodes:
        counts = {floor(share[node]), ceil(share[node])}
        grown = [(n + count, cost + max(0, held[node] - count)) for n, cost in best.items() for count in counts]
        best = {n: min(cost for m, cost in grown if m == n) for n, _ in grown}
    return best[shards]


@given(situations())
def test_every_shard_has_one_owner_and_nodes_are_balanced(situation):
    """Each node gets its exact share, rounded down or up; equal nodes differ by one at most."""
    shards, nodes, _, weights = situation
    owners = assign(*situation)
    assert list(owners) == list(range(shards))
    counts = Counter(owners.values())
    assert set(counts) <= set(nodes)
    for node, share in shares(shards, nodes, weights).items():
        assert counts[node] in (floor(share), ceil(share))
    if weights is None:
        assert max(counts[node] for node in nodes) - min(counts[node] for node in nodes) <= 1


@given(situations(max_shards=5, max_nodes=3))
def test_no_balanced_assignment_moves_fewer_shards(situation):
    """Against all assignments of small systems."""
    assert moves(situation[2], assign(*situation)) == fewest_by_trying_all(*situation)


@given(situations())
def test_no_choice_of_counts_would_save_a_move(situation):
    """Against the best counts of larger systems."""
    assert moves(situation[2], assign(*situation)) == fewest_by_counts(*situation)


@given(situations())
def test_a_balanced_placement_does_not_change(situation):
    """assign(assign(x)) == assign(x)."""
    shards, nodes, _, weights = situation
    once = assign(*situation)
    assert assign(shards, nodes, once, weights) == once


@given(situations(), st.randoms(use_true_random=False))
def test_the_order_of_the_arguments_does_not_matter(situation, chance):
    """Members and owners come back from a store in any order, and some twice."""
    shards, nodes, current, weights = situation

    def shuffled(items):
        items = list(items)
        chance.shuffle(items)
        return items

    again = assign(
        shuffled([*range(shards), *range(shards // 2)]),
        iter(shuffled([*nodes, nodes[0]])),
        dict(shuffled(current.items())),
        weights and dict(shuffled(weights.items())),
    )
    assert list(again.items()) == list(assign(*situation).items())


@given(situations())
def test_equal_ranks_change_nothing_but_the_choice(situation):
    """Were every hash the same, the answer would still be balanced, minimal, stable and one."""
    shards, nodes, current, weights = situation
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placement, "_rank", lambda _: b"")
        owners = assign(*situation)
        assert assign(shards, reversed(nodes), current, weights) == owners
        assert assign(shards, nodes, owners, weights) == owners
    counts = Counter(owners.values())
    assert all(abs(counts[node] - share) < 1 for node, share in shares(shards, nodes, weights).items())
    assert moves(current, owners) == fewest_by_counts(*situation)


def test_a_fifth_node_moves_its_share_and_no_more():
    """64 shards, 4 -> 5: at most 13, all to the new node, those for which the old owners rank lowest."""
    before = assign(64, NODES[:4], {})
    after = assign(64, NODES[:5], before)
    moved = {shard for shard in before if before[shard] != after[shard]}
    assert len(moved) <= 13
    assert {after[shard] for shard in moved} == {NODES[4]}
    for node in NODES[:4]:
        owned = sorted((shard for shard in before if before[shard] == node), key=lambda shard: rank(node, shard))
        assert moved & set(owned) == set(owned[: len(moved & set(owned))])


def test_a_dead_node_moves_its_own_shards_only():
    """64 shards, 5 -> 4."""
    before = assign(64, NODES[:5], {})
    after = assign(64, NODES[:4], before)
    assert {shard for shard in before if before[shard] != after[shard]} == {
        shard for shard in before if before[shard] == NODES[4]
    }
    assert set(Counter(after.values()).values()) == {16}


def test_a_node_that_comes_back_finds_balance_and_disturbs_only_its_share():
    """A rolling restart of 5 nodes at 64 shards: each stop and each start moves at most 13."""
    nodes, owners = NODES[:5], assign(64, NODES[:5], {})
    for restarted in nodes:
        for members in ([node for node in nodes if node != restarted], nodes):
            wanted = assign(64, members, owners)
            assert moves(owners, wanted) <= 13
            owners = wanted


def test_64_shards_on_50_nodes_are_within_one():
    """More members than half of the shards."""
    counts = Counter(assign(64, [f"n{number}" for number in range(50)], {}).values())
    assert sorted(counts.values()) == [1] * 36 + [2] * 14


def test_more_nodes_than_shards_leave_nodes_idle():
    """The owners stay where they are."""
    current = {0: "c", 1: "a"}
    assert assign(2, "abcdef", current) == current


def test_an_orphan_goes_to_the_node_that_ranks_highest_among_those_with_room():
    """Two of four nodes are full: the first orphan has the choice of the others, the second takes what is left."""
    full, free = NODES[:2], NODES[2:4]
    chosen = set()
    for orphan in range(50):
        owners = assign([orphan, 100, 101, 102], NODES[:4], {100: full[0], 101: full[1]})
        assert owners[orphan] == max(free, key=lambda node: rank(node, orphan))
        assert {owners[orphan], owners[102]} == set(free)
        chosen.add(owners[orphan])
    assert chosen == set(free)


def test_without_nodes_nothing_is_assigned():
    """Nor are weights looked at."""
    assert assign(64, [], {0: "a"}) == {}
    assert assign(64, [], {0: "a"}, {"a": nan}) == {}


def test_without_shards_nothing_is_assigned():
    """Whatever was owned before."""
    assert assign(0, ["a"], {0: "a"}) == {}
    assert assign([], ["a"], {0: "a"}) == {}


def test_some_shards_may_be_placed_alone():
    """Others in *current* neither count nor appear."""
    assert assign({7, 9}, ["a", "b"], {1: "a", 2: "a", 7: "b", 9: "a"}) == {7: "b", 9: "a"}


def test_a_node_without_a_name_owns_nothing_by_accident():
    """An unowned shard is not one of the node ''."""
    assert Counter(assign(4, ["", "a"], {0: "a", 1: "a"}).values()) == {"": 2, "a": 2}
    assert moves({}, assign(4, [""], {})) == 4


def test_capacity_decides_the_counts():
    """Shares of 6.4, 12.8 and 44.8 of 64: the largest remainders are rounded up."""
    owners = assign(64, "abc", {}, {"a": 1, "b": 2, "c": 7})
    assert Counter(owners.values()) == {"a": 6, "b": 13, "c": 45}


def test_rounding_up_where_it_saves_a_move_comes_before_the_largest_remainder():
    """The same shares; a holds 7 already, so c does with 44."""
    current = {shard: "a" if shard < 7 else "b" if shard < 20 else "c" for shard in range(64)}
    assert assign(64, "abc", current, {"a": 1, "b": 2, "c": 7}) == current


def test_a_whole_share_is_never_rounded():
    """Shares of 1.5, 1.5 and 3: c gives back what it holds above 3, however many moves that is."""
    owners = assign(6, "abc", dict.fromkeys(range(6), "c"), {"a": 1, "b": 1, "c": 2})
    assert Counter(owners.values())["c"] == 3


@pytest.mark.parametrize("weight", [0.1, 1 / 3, 1e-300, 1e300, 7])
def test_equal_weights_are_no_weights(weight):
    """In floats 0.1 of a sum of 0.1s is not a share: it misses by 1e-17, and a shard moves."""
    for count in range(1, 9):
        nodes = NODES[:count]
        current = assign(64, nodes[:-1], {})
        assert assign(64, nodes, current, dict.fromkeys(nodes, weight)) == assign(64, nodes, current)


@pytest.mark.parametrize("weight", [0, -1, -0.5, nan, inf, -inf])
def test_a_bad_weight_is_named(weight):
    """With its node."""
    with pytest.raises(ValueError, match=f"'b' is {weight}: it must be a positive finite number"):
        assign(8, ["a", "b"], {}, {"a": 1, "b": weight})


def test_a_missing_weight_is_named():
    """A default would hide a typing error; weights of nodes that are away are fine."""
    with pytest.raises(ValueError, match="'b' is missing"):
        assign(8, ["a", "b"], {}, {"a": 1, "B": 1})
    assert assign(8, ["a"], {}, {"a": 1, "away": 0}) == dict.fromkeys(range(8), "a")


VECTORS = [
    (8, ["a", "b", "c"], {}, None, "accbabba"),
    (8, ["a", "b", "c"], dict.fromkeys(range(8), "a"), None, "accbabab"),
    (8, ["a", "c"], dict(enumerate("accbabba")), None, "acccacaa"),
    (8, ["a", "b", "\u65e5"], {}, {"a": 1, "b": 2, "\u65e5": 1}, "aa\u65e5\u65e5bbbb"),
]


@pytest.mark.parametrize(("shards", "nodes", "current", "weights", "owners"), VECTORS)
def test_the_vectors_hold(shards, nodes, current, weights, owners):
    """Nodes of two versions that disagree would pull shards to and fro."""
    assert "".join(assign(shards, nodes, current, weights).values()) == owners


def digest_of_a_history():
    """SHA-256 of the placements while 100 nodes of two sizes join and leave at 1,024 shards."""
    told, owners, members = sha256(), {}, set()
    for step in range(60):
        members ^= {f"w{step * step * 7 % 100}@h", f"w{step * 31 % 100}@h", f"w{step % 9}@h"}
        owners = assign(1024, members, owners, {node: len(node) - 3 for node in members})
        told.update(repr(owners).encode())
    return told.hexdigest()


@pytest.mark.parametrize("seed", ["1", "2"])
def test_other_processes_compute_the_same(seed):
    """Whatever Python's own hash does to the order of sets."""
    root = Path(pool.__file__).parents[1]
    script = "from tests.unit.test_placement import digest_of_a_history as told; print(told())"
    env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.strip() == "ebdbc51731f39798584c5d417aa07db904654f94f05f17c78c8af650fe232b6f", done.stderr


@pytest.fixture
def ranked(monkeypatch):
    """How many ranks were computed."""
    calls = []
    original = placement._rank
    monkeypatch.setattr(placement, "_rank", lambda text: calls.append(None) or original(text))
    return calls


def test_one_change_ranks_only_what_it_moves(ranked):
    """1,000 nodes, 16,384 shards: a few hundred pairs of 16 million; a cold start 64 for each shard."""
    shards, nodes = 16_384, [f"node-{number}" for number in range(1_000)]
    full = assign(shards, nodes, {})
    assert len(ranked) <= (1 + CANDIDATES) * shards + len(nodes)
    assert set(Counter(full.values()).values()) == {16, 17}
    for members, current in ((nodes[1:], full), (nodes, assign(shards, nodes[1:], full))):
        ranked.clear()
        wanted = assign(shards, members, current)
        assert moves(current, wanted) <= 17
        assert len(ranked) < 1_000


def test_many_nodes_with_room_are_all_found():
    """More than are ranked for one shard: still every node gets its share."""
    nodes = [f"n{number}" for number in range(5 * CANDIDATES)]
    assert Counter(assign(3 * len(nodes), nodes, {}).values()) == dict.fromkeys(nodes, 3)
