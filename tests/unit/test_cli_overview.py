"""What the lease table and the nodes say of themselves, put together."""

from pool.cli.nodes import Replies
from pool.cli.overview import Overview
from pool.sharding.lease import Lease
from pool.sharding.table import Seen, Table

STATS = {"total": 3, "busy": 1, "idle": 2, "running": 1, "hits": 3, "connects": 1, "lease_age_s": 0.4, "shards": 2}


def table(*members, leases, dead=(), settles_in=0.0):
    """Members are (name, state, seconds left); leases shard -> name."""
    seen = {f"{name}/1": Seen(name, state, left) for name, state, left in members}
    held = {shard: Lease(shard + 1, f"{name}/1") for shard, name in leases.items()}
    return Table(4, seen, held, {f"{name}/0": name for name in dead}, settles_in)


def made(*args):
    return Overview.made(*args, 4)


def states(overview):
    return {node["node"]: node["state"] for node in overview.nodes}


BOTH = [("a@x", "active", 4.0), ("b@x", "active", 4.0)]
EVEN = {0: "a@x", 1: "b@x", 2: "a@x", 3: "b@x"}


def test_all_is_well_when_everybody_answers_and_each_shard_has_an_owner():
    """Then there is no problem, and the sums are right."""
    found = made(table(*BOTH, leases=EVEN), Replies({"a@x": STATS, "b@x": STATS}, []))
    assert (found.problems, states(found)) == ([], {"a@x": "ok", "b@x": "ok"})
    assert found.shards["owners"] == {"a@x": [0, 2], "b@x": [1, 3]}
    assert (found.totals["total"], found.totals["hit_rate"]) == (6, 0.75)
    assert found.told()["ok"]


def test_a_member_that_does_not_answer_is_shown_with_what_it_owns():
    """And until when its leases last."""
    found = made(table(*BOTH, leases=EVEN), Replies({"a@x": STATS}, ["b@x"]))
    assert states(found) == {"a@x": "ok", "b@x": "no answer"}
    assert found.nodes[1]["shards"] == 2
    assert found.problems == ["b@x does not answer: its leases end in 4.0 s unless it renews them"]
    assert found.answering == 1


def test_shards_whose_owner_has_ended_are_without_an_owner():
    """Nobody may have noticed yet."""
    found = made(table(BOTH[0], ("b@x", "active", -2.0), leases=EVEN), Replies({"a@x": STATS}, []))
    assert (found.shards["owned"], found.shards["free"]) == (2, 2)
    assert "b@x does not answer: its leases ended 2.0 s ago" in found.problems
    assert "2 shards without an owner: their tasks wait" in found.problems


def test_shards_that_are_due_to_move_are_in_handoff():
    """A draining node's all, and those that a new node is to get."""
    draining = [("a@x", "draining", 4.0), BOTH[1]]
    found = made(table(*draining, leases=EVEN), Replies({"a@x": STATS, "b@x": STATS}, []))
    assert (found.shards["moving"], states(found)["a@x"]) == ([0, 2], "draining")
    newcomer = made(table(*BOTH, leases=dict.fromkeys(range(4), "a@x")), Replies({"a@x": STATS, "b@x": STATS}, []))
    assert len(newcomer.shards["moving"]) == 2


def test_nodes_without_leases_are_known_by_their_answers_only():
    """What is left in the table of nodes that once had leases is not theirs."""
    static = {**STATS, "lease_age_s": None}
    old = table(("gone@x", "active", -5000.0), leases={0: "gone@x"})
    for seen in (None, old):
        found = made(seen, Replies({"a@x": static, "b@x": static}, []))
        assert states(found) == {"a@x": "static", "b@x": "static"}
        assert (found.shards["owned"], found.shards["free"], found.problems) == (4, 0, [])


def test_nobody_there_is_a_problem():
    """Whether there was ever a node or not."""
    assert made(None, Replies({}, [])).problems == ["no node answers", "4 shards without an owner: their tasks wait"]
    gone = made(table(("gone@x", "active", -5.0), leases=EVEN), Replies({}, []))
    assert "gone@x does not answer: its leases ended 5.0 s ago" in gone.problems


def test_the_dead_and_a_lost_table_are_told():
    """Both pass by themselves, and explain why tasks wait."""
    found = made(table(*BOTH, leases=EVEN, dead=["c@x"], settles_in=3.0), Replies({"a@x": STATS, "b@x": STATS}, []))
    assert found.dead == ["c@x"]
    assert len(found.problems) == 2
