"""What the lease machine may rely on, over every store: the fake, Valkey 9, Redis 7 and a Redis Cluster."""

import pytest

from pool.sharding.lease import Lease, Member
from tests.support.lease_rigs import TERMS, DebianServer, EmbeddedServer, FakeRig, Node, RealRig
from tests.support.services import require_service


@pytest.fixture(scope="module", params=["fake", "valkey", "redis7", "cluster"])
def server(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "data"
    if request.param == "fake":
        yield None
        return
    if request.param == "valkey":
        server = EmbeddedServer(folder)
    else:
        require_service("redis-server", DebianServer.binary)
        server = DebianServer(folder, cluster=request.param == "cluster")
    yield server
    server.stop()


@pytest.fixture
def rig(server):
    rig = RealRig(server) if server else FakeRig()
    yield rig
    rig.close()


@pytest.fixture
def fake():
    return FakeRig()


def pair(rig):
    """Two nodes of a settled table that know each other."""
    a, b = Node(rig, "a").settle(), Node(rig, "b").settle()
    a.beat()
    return a, b


def outlive(rig, survivor, *gone):
    """Beat with *survivor* until the memberships of *gone* have ended."""
    ended = {node.incarnation for node in gone}
    rig.until(lambda: survivor.beat().dead and ended <= set(survivor.answer.dead), f"{ended} have ended")


# -- members


def test_a_node_that_joins_is_a_member_for_all(rig):
    """Everybody reads every member with its name and state."""
    a, b = pair(rig)
    expected = {a.incarnation: Member("a", "active"), b.incarnation: Member("b", "active")}
    assert a.members == b.members == expected


def test_members_are_told_only_when_they_have_changed(rig):
    """A quiet heartbeat reads back neither members nor leases."""
    a, b = pair(rig)
    assert b.beat().members is None
    assert b.beat().leases is None
    a.beat(state="draining")
    assert b.beat().members[a.incarnation] == Member("a", "draining")
    assert b.beat().members is None


def test_a_node_that_beats_stays_and_one_that_does_not_is_dead(rig):
    """Each answered request renews; a membership that has ended is on the list of the dead, once for all."""
    a, b = pair(rig)
    outlive(rig, b, a)
    assert b.answer.dead == (a.incarnation,)
    assert set(b.members) == {b.incarnation}
    assert a.beat().verdict == "dead"


def test_the_dead_stay_on_the_list_until_they_are_buried(rig):
    """Who put a dead node's messages back says so; then nobody hears of it again."""
    a, b = pair(rig)
    outlive(rig, b, a)
    assert b.beat().dead == (a.incarnation,)
    assert b.beat(buried=[a.incarnation]).dead == ()


def test_an_incarnation_that_was_buried_does_not_come_back(rig):
    """It is dead for good: its node needs a new incarnation, which may join at once."""
    a, b = pair(rig)
    outlive(rig, b, a)
    b.beat(buried=[a.incarnation])
    assert a.beat().verdict == "dead"
    again = Node(rig, "a")
    assert again.beat().verdict == "ok"


def test_a_node_that_says_bye_is_no_member_and_not_dead(rig):
    """A farewell leaves nothing to be put back."""
    a, b = pair(rig)
    a.beat(state="bye")
    assert set(b.beat().members) == {b.incarnation}
    assert b.answer.dead == ()


def test_two_nodes_with_one_name_are_told_apart(rig):
    """The second is refused, and told which incarnation has the name, until that has ended."""
    a, b = pair(rig)
    twin = Node(rig, "a")
    refused = twin.beat()
    assert refused.verdict == "name"
    assert refused.detail.split()[0] == a.incarnation
    until = float(refused.detail.split()[1])
    rig.until(lambda: a.beat() and float(twin.beat().detail.split()[1]) > until, "the first one is seen to renew")
    outlive(rig, b, a)
    assert twin.beat().verdict == "ok"


def test_a_different_shard_count_is_refused_while_anybody_lives(rig):
    """The answer says which count the others have, and who; alone, a node may change it."""
    a, _ = pair(rig)
    odd = Node(rig, "odd", shards=32)
    refused = odd.beat()
    assert (refused.verdict, refused.detail.split()[0]) == ("shards", "64")
    assert refused.detail.split()[1] in ("a", "b")
    a.beat(takes=[63])
    rig.until(lambda: odd.beat().verdict == "ok", "the others have ended")
    assert 63 not in odd.settle().leases


# -- leases


def test_a_free_shard_is_taken_and_everybody_reads_it(rig):
    """Owner and epoch are the same in every copy."""
    a, b = pair(rig)
    a.beat(takes=[3, 5])
    b.beat()
    assert set(a.owned()) == {3, 5}
    assert b.leases == a.leases


def test_what_somebody_owns_cannot_be_taken(rig):
    """The second one to ask reads who has it."""
    a, b = pair(rig)
    a.beat(takes=[3])
    b.beat(takes=[3])
    assert b.leases[3] == a.leases[3] == Lease(a.owned()[3], a.incarnation)


def test_only_changes_are_read_back(rig):
    """An answer has the leases that changed since the version that the node has seen, and no others."""
    a, b = pair(rig)
    a.beat(takes=range(10))
    assert set(b.beat().leases) == set(range(10))
    assert b.beat().leases is None
    a.beat(releases=[(4, a.owned()[4], "")])
    assert set(b.beat().leases) == {4}


def test_a_version_that_was_seen_before_is_told_again(rig):
    """An answer that was lost loses nothing: the node asks again with the version that it has."""
    a, b = pair(rig)
    seen = b.seen
    a.beat(takes=[1])
    b.beat()
    b.seen = seen
    assert set(b.beat().leases) == {1}


def test_a_shard_is_released_to_its_successor(rig):
    """It is the successor's under a higher epoch, and the successor is called."""
    a, b = pair(rig)
    a.beat(takes=[3])
    epoch = a.owned()[3]
    called = rig.listen(b.incarnation)
    a.beat(releases=[(3, epoch, b.incarnation)])
    rig.until(called, "the successor is called")
    b.beat()
    assert b.owned()[3] > epoch
    assert 3 not in a.owned()


def test_a_shard_is_released_to_nobody(rig):
    """Then anybody may take it, under a higher epoch."""
    a, b = pair(rig)
    a.beat(takes=[3])
    epoch = a.owned()[3]
    a.beat(releases=[(3, epoch, "")])
    assert a.leases[3].owner == ""
    b.beat(takes=[3])
    assert b.owned()[3] > epoch


def test_a_release_to_a_dead_successor_is_one_to_nobody(rig):
    """A shard is never given to an incarnation that is not there."""
    a, b = pair(rig)
    a.beat(takes=[3])
    outlive(rig, a, b)
    a.beat(releases=[(3, a.owned()[3], b.incarnation)])
    assert a.leases[3].owner == ""


def test_a_stale_release_changes_nothing(rig):
    """Neither one under an old epoch nor one of somebody else's shard."""
    a, b = pair(rig)
    a.beat(takes=[3])
    old = a.owned()[3]
    a.beat(releases=[(3, old, "")])
    a.beat(takes=[3])
    new = a.owned()[3]
    a.beat(releases=[(3, old, b.incarnation)])
    b.beat(releases=[(3, new, b.incarnation)])
    assert b.leases[3] == Lease(new, a.incarnation)


def test_the_shards_of_the_dead_can_be_taken(rig):
    """Together with the news that their owner is dead."""
    a, b = pair(rig)
    a.beat(takes=[3])
    epoch = a.owned()[3]
    outlive(rig, b, a)
    b.beat(takes=[3])
    assert b.owned()[3] > epoch
    assert a.incarnation in b.answer.dead


def test_a_take_from_a_node_that_has_just_ended_says_that_it_is_dead(rig):
    """The answer that gives a dead node's shard has that node on the list: nobody serves before putting back."""
    a, b = pair(rig)
    a.beat(takes=[3])
    rig.until(lambda: b.beat(takes=[3]) and 3 in b.owned(), "b gets the shard")
    assert a.incarnation in b.answer.dead


# -- epochs


def test_epochs_grow_over_owners(rig):
    """No two owners in a row, of any shards, share an epoch."""
    a, b = pair(rig)
    seen = []
    for node in (a, b, a, b):
        node.beat(takes=[7])
        seen.append(node.owned()[7])
        node.beat(releases=[(7, seen[-1], "")])
    assert seen == sorted(set(seen))


def test_epochs_grow_after_a_flush(rig):
    """Also for nodes that have never heard of the old table."""
    (a,) = (Node(rig, "a").settle(),)
    a.beat(takes=[7])
    rig.flush()
    b = Node(rig, "b").settle()
    b.beat(takes=[7])
    assert b.owned()[7] > a.owned()[7]


def test_epochs_grow_after_the_meta_key_was_deleted(rig):
    """What is left of such a table is not believed: its members do not live for ever, its epochs are not reused."""
    a, b = pair(rig)
    a.beat(takes=[7])
    epoch = a.owned()[7]
    rig.forget_meta()
    assert set(b.beat().members) == {b.incarnation}
    rig.until(lambda: b.beat(takes=[7]) and 7 in b.owned(), "the shard is taken again")
    assert b.owned()[7] > epoch
    assert set(b.members) == {b.incarnation}


def test_epochs_are_above_every_one_that_the_asking_node_knows(rig):
    """A node that remembers keeps the epochs growing even if the server's clock went back."""
    a = Node(rig, "a").settle()
    a.floor = 8_000_000_000_000_000  # far above the present time in microseconds; 16 digits, as they have
    a.beat(takes=[7, 8])
    assert sorted(a.owned().values()) == [a.floor + 1, a.floor + 2]


# -- a table that was lost or set back


def test_nothing_is_taken_from_an_empty_table_before_survivors_could_speak(rig):
    """A first start waits for a little more than a heartbeat."""
    a = Node(rig, "a")
    first = a.beat(takes=[1])
    assert 0 < first.settles_in <= 1.2 * TERMS.heartbeat + 0.001
    assert a.owned() == {}
    a.settle().beat(takes=[1])
    assert set(a.owned()) == {1}


def test_a_survivor_of_a_flush_joins_at_once_and_is_waited_for(rig):
    """It is no stranger: its membership goes on, and the table is quarantined for a whole TTL."""
    a, b = pair(rig)
    a.beat(takes=[3])
    born = a.born
    rig.flush()
    answer = a.beat(takes=[4])
    assert answer.verdict == "ok"
    assert answer.born != born
    assert answer.settles_in == TERMS.ttl
    assert b.beat(takes=[3]).verdict == "ok"
    assert b.owned() == {}


def test_a_survivor_that_comes_after_a_newcomer_prolongs_the_quarantine(rig):
    """There may be more of them."""
    a = Node(rig, "a").settle()
    rig.flush()
    newcomer = Node(rig, "new")
    assert newcomer.beat().settles_in < TERMS.ttl / 2
    assert a.beat().settles_in == TERMS.ttl
    assert newcomer.beat().settles_in > TERMS.ttl / 2


def test_a_restarted_server_is_quarantined_and_keeps_its_members(rig):
    """Whoever has the data may lack the last writes: another run_id is another birth, but nobody has to join again."""
    a, b = pair(rig)
    a.beat(takes=[3])
    born, epoch = a.born, a.owned()[3]
    rig.restart()
    answer = b.beat(takes=[4])
    assert answer.verdict == "ok"
    assert answer.born != born
    assert answer.settles_in == TERMS.ttl
    assert set(b.members) == {a.incarnation, b.incarnation}
    assert b.leases[3] == Lease(epoch, a.incarnation)
    assert b.owned() == {}
    rig.until(lambda: a.beat() and b.beat(takes=[4]) and b.owned(), "the quarantine ends")


def test_a_table_that_was_set_back_is_told_from_the_beginning(rig):
    """The version that a node has seen is of another table: it reads everything."""
    a, b = pair(rig)
    a.beat(takes=[1, 2])
    replica = rig.snapshot()
    for _ in range(5):
        a.beat(releases=[(2, a.owned()[2], "")])
        a.beat(takes=[2])
    b.beat()
    rig.fail_over(replica)
    assert set(b.beat().leases) == {1, 2}
    assert set(b.members) == {a.incarnation, b.incarnation}


def test_the_higher_epoch_wins_when_a_table_was_set_back(rig):
    """A handover that the table has forgotten is asserted by the successor and stands."""
    a, b = pair(rig)
    a.beat(takes=[3])
    replica = rig.snapshot()
    old = a.owned()[3]
    a.beat(releases=[(3, old, b.incarnation)])
    b.beat()
    new = b.owned()[3]
    rig.fail_over(replica)
    a.beat(asserts=[(3, old)])
    assert a.leases[3] == Lease(old, a.incarnation)
    b.beat()
    b.beat(asserts=[(3, new)])
    assert b.leases[3] == Lease(new, b.incarnation)
    a.beat(asserts=[(3, old)])
    assert a.leases[3] == Lease(new, b.incarnation)


def test_a_release_during_the_quarantine_keeps_the_epoch_down(rig):
    """A node gives back what a table that was set back says is its own; the last owner can still assert it."""
    a, b = pair(rig)
    a.beat(takes=[3])
    old = a.owned()[3]
    replica = rig.snapshot()
    a.beat(releases=[(3, old, b.incarnation)])
    b.beat()
    new = b.owned()[3]
    rig.fail_over(replica)
    a.beat()
    a.beat(releases=[(3, old, "")])
    assert a.leases[3] == Lease(old, "")
    b.beat()
    b.beat(asserts=[(3, new)])
    assert b.owned() == {3: new}


def test_a_handover_waits_for_the_end_of_the_quarantine(rig):
    """The last owner may still have to speak up; the lease stays where it is."""
    a, b = pair(rig)
    a.beat(takes=[3])
    old = a.owned()[3]
    rig.restart()
    a.beat()
    a.beat(releases=[(3, old, b.incarnation)])
    assert a.leases[3] == Lease(old, a.incarnation)
    rig.until(lambda: b.beat() and a.beat(releases=[(3, old, b.incarnation)]) and not a.owned(), "it is handed over")
    b.beat()
    assert b.owned()[3] > old


def test_a_node_hands_a_lease_over_to_itself(rig):
    """For a new epoch."""
    a, _b = pair(rig)
    a.beat(takes=[3])
    old = a.owned()[3]
    a.beat(releases=[(3, old, a.incarnation)])
    assert a.owned()[3] > old


def test_asserts_fill_an_empty_table(rig):
    """After a flush the survivors keep what they had, under the epochs that they had."""
    a, b = pair(rig)
    a.beat(takes=[3])
    b.beat(takes=[4])
    had = a.owned() | b.owned()
    rig.flush()
    for node in (a, b):
        held = node.owned()
        node.beat()
        node.beat(asserts=held.items())
    a.beat()
    assert a.owned() | b.owned() == had
    assert {shard: lease.epoch for shard, lease in a.leases.items()} == had


def test_an_assert_does_not_take_from_an_equal_owner(rig):
    """Under one epoch there is one owner: the one whom the table knows."""
    a, b = pair(rig)
    a.beat(takes=[3])
    b.beat(asserts=[(3, a.owned()[3])])
    assert b.leases[3].owner == a.incarnation


def test_a_lease_that_nobody_has_can_be_asserted_under_its_own_epoch(rig):
    """Its last holder still holds it; a lower epoch is not believed."""
    a, b = pair(rig)
    a.beat(takes=[3])
    epoch = a.owned()[3]
    a.beat(releases=[(3, epoch, "")])
    b.beat(asserts=[(3, epoch - 1)])
    assert b.leases[3].owner == ""
    a.beat(asserts=[(3, epoch)])
    assert a.leases[3] == Lease(epoch, a.incarnation)


def test_new_epochs_are_above_asserted_ones(rig):
    """An asserted epoch counts as one the table knows."""
    a, b = pair(rig)
    a.beat(asserts=[(3, 8_000_000_000_000_000)])
    b.beat(takes=[4])
    assert b.owned()[4] > 8_000_000_000_000_000


# -- the server's clock; it can only be turned in the fake


def test_a_clock_that_jumps_ahead_ends_no_lease(fake):
    """Members know how much time has passed for them: the lease clock follows that, however often it jumps."""
    a, b = pair(fake)
    for _ in range(10):
        fake.jump(3600)
        assert b.beat().dead == ()
    assert a.beat().verdict == "ok"


def test_a_clock_that_jumps_as_a_node_joins_ends_no_lease_by_more_than_the_margin(fake):
    """A node that is no member has no time to compare with."""
    a, b = pair(fake)
    fake.jump(3600)
    Node(fake, "c").beat()
    assert b.beat().dead == ()
    assert a.beat().verdict == "ok"


def test_members_that_were_all_frozen_for_long_can_go_on(fake):
    """A server that stood still, or a network that did: whoever speaks first does not bury the others."""
    a, b = pair(fake)
    fake.micros += 3_600_000_000
    assert b.beat().dead == ()
    assert a.beat().verdict == "ok"


def test_a_membership_ends_in_time_though_heartbeats_come_late(fake):
    """Each heartbeat that is late by less than half a TTL counts in full."""
    a, b = pair(fake)
    since = fake.now()
    while not b.beat().dead:
        fake.micros += 190_000  # less than half of the TTL of 400 ms
    assert fake.now() - since < 0.4 + 0.19
    assert a.beat().verdict == "dead"


def test_a_clock_that_jumps_back_stops_nothing(fake):
    """Memberships still end, and epochs still grow."""
    a, b = pair(fake)
    a.beat(takes=[3])
    epoch = a.owned()[3]
    fake.jump(-3600)
    outlive(fake, b, a)
    b.beat(takes=[3])
    assert b.owned()[3] > epoch


# -- cost


@pytest.mark.parametrize("shards", [64, 1024])
def test_a_heartbeat_is_one_call_whatever_it_says(rig, shards):
    """Joins, takes, releases, asserts and the read-back of the table, at any number of shards."""
    a, b = Node(rig, "a", shards).settle(), Node(rig, "b", shards).settle()
    before = rig.calls()
    a.beat(takes=range(shards))
    b.beat()
    a.beat(releases=[(shard, epoch, b.incarnation) for shard, epoch in a.owned().items()])
    b.beat(asserts=b.owned().items(), buried=["nobody"])
    assert rig.calls() - before == 4
    assert set(b.owned()) == set(range(shards))
