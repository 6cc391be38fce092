"""The rules of the lease machine, one by one; the simulation tries them together."""

from dataclasses import replace

import pytest

from pool.sharding.handoff import KEPT, Abandon, Beat, Close, Rejoin, Restore, Serve, Stop, Suspend
from pool.sharding.lease import Answer, Lease, LeaseMachine, Member, Release, Terms

TERMS = Terms(ttl=5.0, heartbeat=1.0, handoff_timeout=30.0)
TRUST = TERMS.ttl - TERMS.margin
ME, OTHER = "a#1", "b#1"


class Bench:
    """A machine, a clock, and a store that answers what the test says. The invariants hold after every event."""

    def __init__(self, shards=4, terms=TERMS):
        self.machine = LeaseMachine(ME, "a", shards, terms)
        self.now = 100.0
        self.version = 0
        self.born = "t1"

    def _told(self, instructions):
        self.machine.check_invariants(self.now)
        return instructions

    def request(self):
        request = self.machine.request(self.now)
        self.machine.check_invariants(self.now)
        return request

    def answer(
        self, request, *, after=0.0, verdict="ok", members=None, leases=None, dead=(), settles_in=0.0, detail=""
    ):
        self.now += after
        self.version += 1
        if members is not None:
            members = {i: Member(i.split("#")[0], state) for i, state in members.items()}
        answer = Answer(verdict, detail, self.born, self.version, settles_in, members, leases, tuple(dead))
        return self._told(self.machine.answered(request, answer, self.now))

    def beat(self, **answer):
        return self.answer(self.request(), **answer)

    def tick(self, after=0.0):
        self.now += after
        return self._told(self.machine.tick(self.now))

    def happened(self, event, *shards):
        tenancies = [self.machine.tenancies[shard] for shard in shards]
        return self._told(self.machine.happened(event, tenancies, self.now))

    def call(self, name):
        return self._told(getattr(self.machine, name)(self.now))

    def state(self, shard):
        tenancy = self.machine.tenancies.get(shard)
        return tenancy and tenancy.state

    def serve(self, *shards, epoch=10, members=None):
        """Own and serve *shards*."""
        self.beat(members=members or {ME: "active"}, leases={shard: Lease(epoch, ME) for shard in shards})
        self.happened("restored", *shards)
        return self


@pytest.fixture
def bench():
    return Bench()


GRACE = 60.0


@pytest.fixture
def patient():
    """A node that lets fenced work go on."""
    return Bench(terms=replace(TERMS, grace=GRACE))


def kinds(instructions):
    return [type(instruction) for instruction in instructions]


# -- joining and taking


def test_a_node_that_has_joined_asks_for_what_nobody_owns(bench):
    """Alone, for everything, and at once."""
    assert kinds(bench.beat(members={ME: "active"})) == [Beat]
    assert bench.request().takes == (0, 1, 2, 3)


def test_what_was_refused_once_waits_for_the_heartbeat(bench):
    """A take that the store did not grant asks for no second call at once."""
    bench.beat(members={ME: "active"})
    assert bench.beat() == []


def test_a_node_takes_only_its_own_share(bench):
    """The rest is the other's, as both work out from the same table."""
    bench.beat(members={ME: "active", OTHER: "active"})
    mine = bench.request().takes
    other = LeaseMachine(OTHER, "b", 4, TERMS)
    request = other.request(0.0)
    other.answered(request, Answer("ok", "", "t1", 1, 0.0, dict(bench.machine.members)), 0.0)
    theirs = other.request(0.0).takes
    assert (len(mine), len(theirs)) == (2, 2)
    assert set(mine) | set(theirs) == {0, 1, 2, 3}


def test_what_a_member_owns_is_not_asked_for_and_what_the_gone_own_is(bench):
    """An owner that is no member counts as nobody."""
    bench.beat(members={ME: "active", OTHER: "active"}, leases={s: Lease(5, OTHER) for s in range(4)})
    assert bench.request().takes == ()
    bench.beat(members={ME: "active"}, dead=[OTHER])
    assert bench.request().takes == (0, 1, 2, 3)


def test_nothing_is_taken_or_begun_in_an_unsettled_table(bench):
    """And the node asks again when it settles, if that is before the heartbeat."""
    bench.beat(members={ME: "active"}, leases={1: Lease(5, ME)}, settles_in=0.3)
    assert bench.machine.tenancies == {}
    assert bench.request().takes == ()
    bench.beat(settles_in=0.3)
    assert bench.machine.deadline == pytest.approx(bench.now + 0.3)
    assert kinds(bench.beat(settles_in=0.0))[0] is Restore


def test_a_new_lease_is_restored_before_it_is_served(bench):
    """The dead of the same answer come first; only then may tasks run."""
    bench.beat(members={ME: "active"})
    restore, *_ = bench.beat(leases={1: Lease(5, ME), 2: Lease(6, ME)}, dead=["x#1"])
    assert {tenancy.shard for tenancy in restore.tenancies} == {1, 2}
    assert restore.dead == ("x#1",)
    assert bench.state(1) == "restoring"
    served = bench.happened("restored", 1, 2)
    assert kinds(served)[:2] == [Serve, Serve]
    assert bench.state(1) == bench.state(2) == "serving"


def test_the_dead_are_seen_to_once_also_by_a_node_that_owns_nothing_of_theirs(bench):
    """Whoever hears of one restores it; a death that is known already is no news."""
    bench.serve(0, 1, 2, 3)
    assert bench.beat(dead=["x#1"]) == [Restore((), ("x#1",))]
    assert bench.beat(dead=["x#1"]) == []


def test_the_buried_are_told_to_the_store_until_it_has_heard(bench):
    """An answer that was lost is made up for."""
    bench.serve(0)
    bench.machine.bury(["x#1"])
    assert bench.request().buried == ("x#1",)
    request = bench.request()
    assert request.buried == ("x#1",)
    bench.answer(request)
    assert bench.request().buried == ()


def test_claimants_that_are_no_members_are_dead(bench):
    """As the broker knew them before the request; a table that was lost has forgotten them."""
    bench.serve(0, 1, 2, 3)
    bench.machine.registered([ME])
    request = bench.request()
    bench.machine.registered([ME, "late#1"])
    bench.answer(request)
    assert bench.machine.dead == ()
    bench.machine.registered([ME, "x#1"])
    assert bench.beat() == [Restore((), ("x#1",))]
    bench.machine.registered([ME])
    bench.beat()
    assert bench.machine.dead == ()


# -- trust


def test_trust_counts_from_when_the_request_was_sent(bench):
    """However late the answer."""
    bench.beat(after=3.0, members={ME: "active"})
    assert bench.machine.trusts(100.0 + TRUST - 0.001)
    assert not bench.machine.trusts(100.0 + TRUST)


def test_an_answer_that_is_too_late_gives_no_trust(bench):
    """What it says is lost before it is begun."""
    bench.beat(after=TRUST, members={ME: "active"}, leases={1: Lease(5, ME)})
    assert bench.machine.tenancies == {}


@pytest.mark.parametrize("steps", [[], ["restored"], ["restored", "move"], ["restored", "move", "stopped"]])
def test_everything_is_abandoned_when_the_trust_ends(bench, steps):
    """At that moment, in every state."""
    bench.beat(members={ME: "active"}, leases={1: Lease(5, ME)})
    for step in steps:
        bench.machine.tenancies[1].apply(step, bench.now)
    assert bench.machine.deadline <= 100.0 + TRUST
    assert bench.tick(TRUST - 0.001) is not None
    assert bench.state(1) != "losing"
    assert kinds(bench.tick(0.001)) == [Abandon]
    assert bench.state(1) == "losing"
    bench.happened("abandoned", 1)
    assert bench.machine.tenancies == {}


def test_a_node_that_slept_past_its_trust_loses_its_leases_whatever_it_handles_first(bench):
    """An answer, or a step that was done: neither goes on with work that was ended meanwhile."""
    bench.serve(0, 1, 2, 3)
    request = bench.request()
    bench.now += TRUST + 0.1
    late = bench.machine.request(bench.now)
    assert kinds(bench.answer(late)) == [Abandon] * 4
    assert request.sent < late.sent

    other = Bench()
    other.beat(members={ME: "active"}, leases={1: Lease(5, ME)})
    other.now += TRUST + 0.1
    assert kinds(other.happened("restored", 1)) == [Abandon]
    assert other.state(1) == "losing"


def test_a_lease_that_was_lost_and_is_still_ours_begins_anew(bench):
    """Once everything under the first stay has ended."""
    bench.serve(1, epoch=10)
    first = bench.machine.tenancies[1]
    bench.tick(TRUST)
    assert bench.beat(leases={1: Lease(10, ME)}) == []
    restore = bench.happened("abandoned", 1)[0]
    assert restore.tenancies[0].shard == 1
    assert bench.machine.tenancies[1] is not first


def test_a_lease_that_the_table_gives_to_another_is_abandoned(bench):
    """At the answer that says so."""
    bench.serve(1)
    lost = bench.beat(members={ME: "active", OTHER: "active"}, leases={1: Lease(11, OTHER)})
    assert Abandon(bench.machine.tenancies[1]) in lost


def test_what_comes_after_the_loss_is_ignored(bench):
    """The driver's late answers change nothing, of a lost stay or of one that is over."""
    bench.serve(1)
    tenancy = bench.machine.tenancies[1]
    bench.tick(TRUST)
    for event in ("restored", "stopped", "idle", "closed"):
        assert kinds(bench.happened(event, 1)) == []
        assert bench.state(1) == "losing"
    bench.happened("abandoned", 1)
    assert bench.machine.happened("abandoned", [tenancy], bench.now) == []


# -- a store that is silent


@pytest.mark.parametrize("steps", [[], ["restored"], ["restored", "move"], ["restored", "move", "stopped"]])
def test_with_a_grace_everything_is_suspended_when_the_trust_ends(patient, steps):
    """And abandoned when the grace is over, too."""
    patient.beat(members={ME: "active"}, leases={1: Lease(5, ME)})
    for step in steps:
        patient.machine.tenancies[1].apply(step, patient.now)
    assert kinds(patient.tick(TRUST)) == [Suspend]
    assert patient.state(1) == "suspended"
    assert patient.machine.deadline <= patient.now + GRACE
    patient.machine.request(patient.now)
    assert patient.tick(GRACE - 0.001) == []
    assert kinds(patient.tick(0.001)) == [Abandon]
    assert patient.state(1) == "losing"


def test_backends_that_close_are_not_suspended(patient):
    """They are on their way out."""
    patient.serve(1)
    for step in ("move", "stopped", "idle"):
        patient.machine.tenancies[1].apply(step, patient.now)
    assert kinds(patient.tick(TRUST)) == [Abandon]


def test_what_is_ours_after_the_silence_goes_on_under_a_new_epoch(patient):
    """Handed over to ourselves: the table may have forgotten later owners of the old one."""
    patient.serve(1, epoch=10)
    patient.tick(TRUST + 20)
    told = patient.beat()
    assert kinds(told) == [Beat]
    request = patient.request()
    assert request.releases == (Release(1, 10, ME),)
    (restore, *_) = patient.answer(request, leases={1: Lease(30, ME)})
    assert [(tenancy.epoch, tenancy.source) for tenancy in restore.tenancies] == [(30, KEPT)]
    assert kinds(patient.happened("restored", 1))[0] is Serve
    assert patient.request().releases == ()


def test_what_is_another_s_after_the_silence_is_abandoned(patient):
    """Somebody could reach the store."""
    patient.serve(1, 2, epoch=10)
    patient.tick(TRUST + 20)
    told = patient.beat(members={ME: "active", OTHER: "active"}, leases={1: Lease(30, OTHER)})
    assert Abandon(patient.machine.tenancies[1]) in told
    assert patient.state(2) == "suspended"


def test_a_node_that_was_taken_for_dead_in_the_silence_abandons_everything(patient):
    """Its leases have gone to others."""
    patient.serve(1)
    patient.tick(TRUST + 20)
    assert kinds(patient.beat(verdict="dead")) == [Abandon]


def test_suspended_leases_are_asserted_to_a_table_that_was_lost_and_resumed_when_it_has_settled(patient):
    """Whoever has a higher epoch may speak up first."""
    patient.serve(1, 2, epoch=10)
    patient.tick(TRUST + 20)
    patient.born = "t2"
    assert kinds(patient.beat(members={ME: "active"}, settles_in=5.0)) == [Beat]
    request = patient.request()
    assert request.asserts == ((1, 10), (2, 10))
    patient.answer(request, leases={1: Lease(10, ME), 2: Lease(12, OTHER)}, settles_in=4.9)
    assert (patient.state(1), patient.state(2)) == ("suspended", "losing")
    assert patient.request().releases == ()
    patient.beat(settles_in=0.0)
    assert patient.request().releases == (Release(1, 10, ME),)


def test_a_node_that_leaves_waits_for_suspended_work_but_no_longer(patient):
    """Nobody can be told of it; idle, there is nothing to keep."""
    patient.serve(1)
    patient.tick(TRUST)
    patient.call("leave")
    assert patient.state(1) == "suspended"
    assert kinds(patient.happened("idle", 1)) == [Abandon]
    patient.happened("abandoned", 1)
    assert patient.machine.tenancies == {}


def test_a_node_that_leaves_hands_over_what_it_gets_back_from_the_silence(patient):
    """Work that runs ends as in any handoff."""
    patient.serve(1, epoch=10)
    patient.tick(TRUST)
    patient.call("leave")
    patient.beat(members={ME: "draining", OTHER: "active"})
    patient.answer(patient.request(), leases={1: Lease(30, ME)})
    assert patient.state(1) == "restoring"
    assert kinds(patient.happened("restored", 1))[:2] == [Serve, Stop]
    assert patient.state(1) == "stopping"


def test_a_silence_after_the_silence(patient):
    """Before the next tenancy has begun, it is suspended like the first."""
    patient.serve(1, epoch=10)
    patient.tick(TRUST)
    patient.beat()
    patient.beat(leases={1: Lease(30, ME)})
    assert patient.state(1) == "restoring"
    assert kinds(patient.tick(TRUST)) == [Suspend]
    patient.beat()
    assert patient.request().releases == (Release(1, 30, ME),)


# -- handoff


def moving(bench):
    """Serve everything when another node comes: two shards have to go."""
    bench.serve(0, 1, 2, 3)
    stops = [i for i in bench.beat(members={ME: "active", OTHER: "active"}) if isinstance(i, Stop)]
    return [stop.tenancy.shard for stop in stops]


def test_shards_that_should_be_anothers_are_stopped_drained_closed_and_released_to_it(bench):
    """Each step when the one before is done; then the store is told at once."""
    going = moving(bench)
    assert len(going) == 2
    shard = going[0]
    assert bench.state(shard) == "stopping"
    assert bench.happened("stopped", shard) == []
    assert kinds(bench.happened("idle", shard)) == [Close]
    assert kinds(bench.happened("closed", shard)) == [Beat]
    assert bench.request().releases == (Release(shard, 10, OTHER),)
    bench.beat(leases={shard: Lease(11, OTHER)})
    assert bench.state(shard) is None


def test_a_release_without_an_answer_is_repeated_also_after_the_trust_has_ended(bench):
    """Begun anew under its old epoch, the shard would be taken from under us by the first, slow release."""
    shard = moving(bench)[0]
    for event in ("stopped", "idle", "closed"):
        bench.happened(event, shard)
    bench.request()
    bench.tick(TRUST)
    assert bench.state(shard) == "releasing"
    assert Release(shard, 10, OTHER) in bench.request().releases
    bench.beat()
    assert bench.state(shard) == "releasing"


def test_work_that_does_not_end_is_closed_at_the_handoff_timeout(bench):
    """Counted from when the shard began to drain."""
    shard = moving(bench)[0]
    bench.happened("stopped", shard)
    due = bench.now + TERMS.handoff_timeout
    while bench.now + 1 < due:
        bench.now += 1
        bench.beat()
    assert bench.state(shard) == "draining"
    assert kinds(bench.tick(due - bench.now)) == [Close]
    assert bench.state(shard) == "closing"


def test_a_shard_that_should_go_is_served_first_if_it_is_being_restored(bench):
    """Its queue has waited long enough for what the dead had taken; then it goes."""
    bench.beat(members={ME: "active"}, leases={s: Lease(10, ME) for s in range(4)})
    bench.beat(members={ME: "active", OTHER: "active"})
    done = kinds(bench.happened("restored", 0, 1, 2, 3))
    assert done == [Serve] * 4 + [Stop] * 2


# -- drain, undrain, leave


def test_a_drained_node_hands_over_everything_and_takes_nothing(bench):
    """The others see that it is draining; alone, it releases to nobody."""
    bench.serve(0, 1, 2, 3)
    assert kinds(bench.call("drain")) == [Beat]
    assert bench.request().state == "draining"
    assert kinds(bench.beat(members={ME: "draining"})) == [Stop] * 4
    for event in ("stopped", "idle", "closed"):
        bench.happened(event, 0, 1, 2, 3)
    request = bench.request()
    assert [release.successor for release in request.releases] == [""] * 4
    bench.answer(request, leases={s: Lease(10, "") for s in range(4)})
    assert bench.machine.tenancies == {}
    assert bench.request().takes == ()


def test_an_undrained_node_takes_part_again(bench):
    """From the next answer on."""
    bench.beat(members={ME: "active"})
    bench.call("drain")
    bench.beat(members={ME: "draining"})
    assert kinds(bench.call("undrain")) == [Beat]
    assert bench.request().state == "active"
    bench.beat(members={ME: "active"})
    assert bench.request().takes == (0, 1, 2, 3)


def test_a_node_that_leaves_says_bye_when_everything_is_released(bench):
    """Not before; then it has finished."""
    bench.serve(0)
    assert kinds(bench.call("leave")) == [Beat]
    bench.beat(members={ME: "draining"})
    assert bench.request().state == "draining"
    for event in ("stopped", "idle", "closed"):
        bench.happened(event, 0)
    assert kinds(bench.beat(leases={0: Lease(10, "")})) == [Beat]
    request = bench.request()
    assert request.state == "bye"
    bench.answer(request)
    assert bench.machine.finished


def test_a_node_that_never_joined_leaves_at_once(bench):
    """There is nothing to say goodbye to."""
    assert bench.call("leave") == []
    assert bench.machine.finished


# -- being taken for dead


def test_a_node_that_was_taken_for_dead_comes_back_as_another_when_nothing_is_left(bench):
    """First everything is abandoned; the new incarnation knows nothing of the old table."""
    bench.serve(1)
    assert kinds(bench.beat(verdict="dead")) == [Abandon]
    assert not bench.machine.trusts(bench.now)
    assert bench.happened("abandoned", 1) == [Rejoin()]
    bench.machine.rejoin("a#2")
    request = bench.request()
    assert (request.incarnation, request.born, request.seen) == ("a#2", "", 0)


def test_a_node_that_hears_of_its_death_twice_rejoins_once(bench):
    """From the broker and from the table: two new names would each be refused because of the other."""
    bench.serve(0)
    bench.call("outlawed")
    assert bench.happened("abandoned", 0) == [Rejoin()]
    assert bench.call("outlawed") == []
    assert bench.tick() == []
    bench.machine.rejoin("a#2")
    bench.beat(members={"a#2": "active"}, leases={})
    assert bench.call("outlawed") == [Rejoin()]


def test_an_answer_to_the_former_incarnation_is_ignored(bench):
    """It may come after the rejoin."""
    request = bench.request()
    bench.beat(verdict="dead")
    bench.machine.rejoin("a#2")
    assert bench.answer(request, members={ME: "active"}, leases={1: Lease(5, ME)}) == []
    assert not bench.machine.joined


def test_a_node_that_the_broker_has_fenced_begins_anew(bench):
    """It sends nothing more as what it was, whatever the table says."""
    bench.serve(1)
    request = bench.request()
    assert kinds(bench.call("outlawed")) == [Abandon]
    assert bench.answer(request) == []
    assert bench.machine.deadline == float("inf")
    assert bench.happened("abandoned", 1) == [Rejoin()]


def test_a_node_whose_name_is_taken_keeps_its_incarnation_and_is_no_survivor(bench):
    """It goes on asking, as one who comes for the first time."""
    bench.serve(1)
    assert kinds(bench.beat(verdict="name", detail="a#0 1")) == [Abandon]
    assert bench.happened("abandoned", 1) == []
    request = bench.request()
    assert (request.incarnation, request.born, request.seen) == (ME, "", 0)


# -- a table that was lost or set back


def test_leases_that_a_new_table_does_not_know_are_asserted_at_once(bench):
    """Nothing is lost or begun meanwhile, and the old trust counts until the answer."""
    bench.serve(1, 2, epoch=10)
    trusted = bench.machine.trusted_until
    bench.born = "t2"
    assert kinds(bench.beat(after=0.5, members={ME: "active"}, settles_in=5.0)) == [Beat]
    assert bench.machine.trusted_until == trusted
    assert bench.tick() == []
    request = bench.request()
    assert request.asserts == ((1, 10), (2, 10))
    bench.answer(request, leases={1: Lease(10, ME), 2: Lease(12, OTHER)}, settles_in=4.9)
    assert bench.machine.trusted_until > trusted
    assert (bench.state(1), bench.state(2)) == ("serving", "losing")
    assert bench.request().asserts == ()


def test_a_lease_that_is_not_trusted_any_more_is_not_asserted(bench):
    """Another may have had it since."""
    bench.serve(1)
    bench.born = "t2"
    bench.beat(members={ME: "active"}, settles_in=5.0)
    bench.now += TRUST
    assert bench.request().asserts == ()


def test_what_a_table_that_was_set_back_says_is_ours_is_released_to_nobody(bench):
    """It may have had later owners, whose higher epochs the table has forgotten."""
    bench.serve(1, epoch=10)
    bench.born = "t2"
    bench.beat(members={ME: "active"}, leases={1: Lease(10, ME), 2: Lease(7, ME)}, settles_in=5.0)
    request = bench.request()
    assert request.asserts == ((1, 10),)
    assert request.releases == (Release(2, 7, ""),)
    bench.answer(request)
    assert bench.state(2) is None
    bench.beat(leases={2: Lease(7, "")})
    assert bench.request().releases == ()
    bench.beat(leases={2: Lease(20, ME)})
    assert bench.state(2) == "restoring"


def test_the_floor_is_the_highest_epoch_ever_seen(bench):
    """Also of others, and of a table that is gone."""
    bench.beat(members={ME: "active"}, leases={1: Lease(50, OTHER), 2: Lease(9, "")})
    bench.born = "t2"
    bench.beat(members={ME: "active"})
    assert bench.request().floor == 50


# -- times


def test_the_next_request_is_due_a_heartbeat_after_the_last(bench):
    """Answered or not."""
    bench.request()
    assert bench.machine.deadline == 101.0


@pytest.mark.parametrize(("ttl", "heartbeat", "margin"), [(5, 1, 1), (20, 1, 4), (5, 2, 1)])
def test_the_margin_is_a_fifth_of_the_ttl(ttl, heartbeat, margin):
    """Whatever the heartbeat."""
    assert Terms(ttl, heartbeat).margin == margin


def test_a_request_says_how_long_ago_the_one_before_was_sent(bench):
    """By the node's own clock; the first one has none before it."""
    assert bench.request().elapsed == 0
    bench.now += 1.5
    assert bench.request().elapsed == 1.5


def test_a_wish_that_came_to_nothing_waits_for_the_heartbeat(bench):
    """A release that the table does not follow is no reason to ask all the time."""
    shard = moving(bench)[0]
    for event in ("stopped", "idle", "closed"):
        bench.happened(event, shard)
    assert bench.beat() == []
    assert bench.state(shard) == "releasing"
    assert bench.request().releases == (Release(shard, 10, OTHER),)
