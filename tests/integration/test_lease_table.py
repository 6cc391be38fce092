"""`RedisStore.read`: the lease table as somebody sees it who takes no part, at a real Valkey, Redis 7 and a cluster."""

import pytest

from pool.sharding.lease import Lease, Terms
from tests.support.lease_rigs import DebianServer, EmbeddedServer, Node, RealRig
from tests.support.services import require_service

LASTING = Terms(ttl=60, heartbeat=0.1)
"""For tests in which no time may run out, however slow the machine is."""


@pytest.fixture(scope="module", params=["valkey", "redis7", "cluster"])
def server(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "data"
    if request.param == "valkey":
        server = EmbeddedServer(folder)
    else:
        require_service("redis-server", DebianServer.binary)
        server = DebianServer(folder, cluster=request.param == "cluster")
    yield server
    server.stop()


@pytest.fixture
def rig(server):
    rig = RealRig(server)
    yield rig
    rig.close()


def read(rig):
    return rig.run(rig.store(64).read())


def test_a_table_that_nobody_has_used_is_empty(rig):
    """No node has ever joined; looking at it makes none of its keys."""
    table = read(rig)
    assert (table.shards, table.members, table.leases, table.dead, table.settles_in) == (None, {}, {}, {}, 0.0)
    assert table.owner(3) is None
    assert rig.snapshot() == {}


def test_the_table_tells_members_leases_and_owners(rig):
    """As the nodes themselves read it."""
    rig.terms = LASTING
    a, b = Node(rig, "a@host").settle(), Node(rig, "b@host").settle()
    a.beat(takes=[3, 5])
    b.beat(takes=[7], state="draining")
    table = read(rig)
    assert table.shards == 64
    assert {i: seen[:2] for i, seen in table.members.items()} == {
        a.incarnation: ("a@host", "active"),
        b.incarnation: ("b@host", "draining"),
    }
    assert all(0 < seen.ends_in <= LASTING.ttl for seen in table.members.values())
    assert table.leases[3] == Lease(a.owned()[3], a.incarnation)
    assert [seen and seen.node for seen in map(table.owner, (3, 5, 7, 8))] == ["a@host", "a@host", "b@host", None]


def test_a_membership_is_seen_to_end_although_no_node_has_noticed(rig):
    """All nodes may be gone: then nobody strikes them off, and their leases count no more."""
    a = Node(rig, "a@host").settle()
    a.beat(takes=[3])
    rig.until(lambda: read(rig).owner(3) is None, "the membership has ended")
    table = read(rig)
    assert a.incarnation in table.members
    assert table.leases[3].owner == a.incarnation
    assert table.living == {}


def test_the_dead_are_told_until_their_messages_are_put_back(rig):
    """With the name of their node."""
    a, b = Node(rig, "a@host").settle(), Node(rig, "b@host").settle()
    rig.until(lambda: a.incarnation in b.beat().dead, "a has ended")
    assert read(rig).dead == {a.incarnation: "a@host"}
    b.beat(buried=[a.incarnation])
    assert read(rig).dead == {}


def test_reading_changes_nothing(rig):
    """Not even what a heartbeat would: the clock, the memberships that have ended."""
    a = Node(rig, "a@host").settle()
    a.beat(takes=[3])
    before = rig.snapshot()
    rig.until(lambda: read(rig).owner(3) is None, "the membership has ended")
    assert rig.snapshot() == before


def test_a_table_that_was_lost_is_seen_to_settle(rig):
    """For so long nothing is taken from it."""
    rig.terms = LASTING
    a = Node(rig, "a@host").settle()
    rig.flush()
    a.beat()
    assert 0 < read(rig).settles_in <= 2 * LASTING.ttl
