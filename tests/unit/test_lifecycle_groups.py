"""Limits of a group of entries: how many, how heavy, how many at once in their start."""

from typing import Any

import pytest

from pool.config import GroupLimit
from pool.entry import Close, Connect, Entry, Tell, Wake
from pool.errors import AcquireTimeout, PoolExhausted
from tests.support.world import Thing, World

G = "g"  # an agent, and the group of its entries


def world(limit: GroupLimit, **settings: Any) -> World:
    return World(groups={G: limit, "h": GroupLimit(1)}, **settings)


def starts(world: World) -> list[Connect]:
    """The connects that were asked for, left where they are."""
    return [effect for effect in world.effects if isinstance(effect, Connect)]


def started(world: World) -> list[str]:
    return [connect.entry.identity[0] for connect in starts(world)]


def at_rest(world: World, *weights: int) -> list[Entry]:
    """Idle members a, b, c, ... of these weights, idle for longest first."""
    entries = []
    for key, _ in zip("abcdefgh", weights, strict=False):
        entries.append(world.rest(key, Thing(key), agent=G))
        world.now += 1
    for entry, weight in zip(entries, weights, strict=True):
        entry.backend.weight = weight
    return entries


# -- how many


def test_a_full_group_makes_room_by_its_own_least_recently_used():
    """Not by that of somebody else, who has been idle for longer."""
    w = world(GroupLimit(2))
    stranger = w.rest("stranger")
    w.now += 1
    first, second = at_rest(w, 0, 0)
    w.ask("c", agent=G)
    [connect] = w.take(Connect)
    assert connect.first_close == (first.backend,)
    assert (first.state, second.state, stranger.state) == ("closed", "idle", "idle")
    assert w.life.groups[G].total == 2
    assert w.life.counters.evicted_lru == 1


def test_a_member_evicted_for_its_group_leaves_its_place_in_the_pool_too():
    """One goes, one comes: nobody else has to leave a full pool."""
    w = world(GroupLimit(1), max_backends=2)
    stranger = w.rest("stranger")
    w.now += 1
    [member] = at_rest(w, 0)
    w.ask("b", agent=G)
    [connect] = w.take(Connect)
    assert connect.first_close == (member.backend,)
    assert stranger.state == "idle"
    assert w.life.total == 2


def test_a_busy_member_survives_and_the_newcomer_waits():
    """Until its release; then it is the busy one's own place that is had."""
    w = world(GroupLimit(1))
    busy = w.hold("a", agent=G)
    waiter = w.ask("b", agent=G)
    assert started(w) == []
    w.release(busy)
    [connect] = starts(w)
    assert connect.first_close == (busy.backend,)
    w.connect()
    assert waiter.entry is not None


def test_an_idle_member_that_says_it_is_busy_makes_no_room():
    """The next one goes instead."""
    w = world(GroupLimit(2))
    first, second = at_rest(w, 0, 0)
    first.backend.working = True
    w.ask("c", agent=G)
    [connect] = w.take(Connect)
    assert connect.first_close == (second.backend,)


def test_a_closing_member_keeps_its_place_in_the_group():
    """Never more than the count alive: the next one starts when it is gone."""
    w = world(GroupLimit(1))
    w.rest("a", agent=G)
    w.life.close_key("a", w.now, w.effects)
    [close] = w.take(Close)
    w.ask("b", agent=G)
    assert started(w) == []
    assert w.life.groups[G].total == 1
    w.life.gone(close.entry, w.now, w.effects)
    assert started(w) == ["b"]


def test_a_member_on_its_way_out_is_closed_by_the_connect_that_needs_its_place():
    """A changed config takes the place of the old backend; nobody else of the group is evicted."""
    w = world(GroupLimit(2))
    other = w.rest("b", agent=G)
    w.now += 1
    old = w.rest("a", config={"n": 1}, agent=G)
    w.ask("a", config={"n": 2}, agent=G)
    [connect] = w.take(Connect)
    assert connect.first_close == (old.backend,)
    assert w.take(Close) == []
    assert other.state == "idle"
    assert w.life.groups[G].total == 2


def test_a_member_that_leaves_for_somebody_else_counts_until_it_is_gone():
    """An ungrouped entry takes its place in the pool, not in the group: that is free when the driver says so."""
    w = world(GroupLimit(1), max_backends=2)
    w.rest("a", agent=G)
    w.now += 1
    other = w.hold("other")
    w.ask("c")
    [connect] = w.take(Connect)
    assert [thing.name for thing in connect.first_close] == ["a"]
    assert w.life.groups[G].counts["total"] == 1
    waiter = w.ask("b", agent=G)
    w.release(other)
    assert started(w) == [], "the old member is still alive"
    w.made_way(connect)
    assert started(w) == ["b"]
    w.life.connected(connect.entry, Thing(), w.now, w.effects)
    w.connect()
    assert waiter.entry is not None


def test_a_failed_connect_frees_the_place_in_the_group():
    """Its own, and that of who had to leave for it."""
    w = world(GroupLimit(1), max_backends=1)
    w.rest("a", agent=G)
    w.ask("c", agent="h")
    w.fail()
    assert w.life.groups == {}
    assert w.life.total == 0


def test_a_registered_member_counts():
    """Whoever connected it."""
    w = world(GroupLimit(1))
    w.life.register(("a", G), {}, Thing("a"), w.now, w.effects, G)
    w.ask("b", agent=G)
    [connect] = w.take(Connect)
    assert [thing.name for thing in connect.first_close] == ["a"]


def test_a_retired_member_counts_until_its_last_user_has_gone():
    """It is alive as long as that."""
    w = world(GroupLimit(1))
    held = w.hold("a", agent=G)
    w.life.close_key("a", w.now, w.effects)
    w.ask("b", agent=G)
    assert started(w) == []
    w.release(held)
    [connect] = starts(w)
    assert connect.first_close == (held.backend,)


def test_a_keyless_member_counts_and_makes_room_at_its_release():
    """It stands outside the map of identities, not outside its group."""
    w = world(GroupLimit(1))
    held = w.hold(None, agent=G)
    waiter = w.ask(None, agent=G)
    assert waiter.entry is None
    w.release(held)
    [connect] = starts(w)
    assert connect.first_close == (held.backend,)


def test_a_group_without_limits_is_counted_only():
    """A name that the settings do not know."""
    w = world(GroupLimit(1))
    w.life.config = w.life.config.changed(groups={G: GroupLimit(1), "free": GroupLimit(9)})
    for key in "abc":
        w.hold(key, agent="free")
    w.life.configure(w.life.config.changed(groups={}), w.now, w.effects)
    w.life.check_invariants()
    assert w.life.groups["free"].total == 3
    assert w.life.groups.counts(w.life.config).keys() == {"free"}
    assert w.sweep() == []


# -- how heavy


def test_as_many_leave_as_it_takes_to_get_below_the_weight():
    """Longest idle first, and no more than needed; all are gone before the new one starts."""
    w = world(GroupLimit(9, weight=100))
    a, b, c = at_rest(w, 60, 50, 40)
    assert w.life.groups[G].weight == 150
    w.ask("d", agent=G)
    [connect] = w.take(Connect)
    assert connect.first_close == (a.backend,)
    w.life.connected(connect.entry, Thing("d", weight=30), w.now, w.effects)
    b.backend.weight = 90
    w.ask("e", agent=G)
    [connect] = w.take(Connect)
    assert connect.first_close == (b.backend,)
    assert c.state == "idle"


def test_the_places_of_several_victims_are_free_when_they_are_gone():
    """The newcomer stands for one of them; the others count, in the pool and in the group."""
    w = world(GroupLimit(3, weight=100), max_backends=3)
    at_rest(w, 90, 90, 90)
    w.ask("d", agent=G)
    [connect] = w.take(Connect)
    assert [thing.name for thing in connect.first_close] == ["a", "b"]
    assert w.life.total == 3
    assert w.life.groups[G].total == 3
    w.made_way(connect)
    assert w.life.total == 2
    assert w.life.groups[G].total == 2
    w.made_way(connect)  # said twice, it counts once
    assert w.life.total == 2


def test_a_weightless_member_is_not_evicted_for_its_weight():
    """That would not help."""
    w = world(GroupLimit(9, weight=100))
    light, heavy = at_rest(w, 0, 100)
    w.ask("c", agent=G)
    [connect] = w.take(Connect)
    assert connect.first_close == (heavy.backend,)
    assert light.state == "idle"


def test_nobody_is_evicted_in_vain():
    """If even without all idle members the group is too heavy, they stay and the newcomer waits."""
    w = world(GroupLimit(9, weight=100))
    [idle] = at_rest(w, 50)
    busy = w.hold("x", Thing("x", weight=120), agent=G)
    waiter = w.ask("y", agent=G)
    assert started(w) == []
    assert idle.state == "idle"
    w.release(busy)
    [connect] = starts(w)
    assert [thing.name for thing in connect.first_close] == ["a", "x"]
    w.connect()
    assert waiter.entry is not None


def test_a_group_without_live_members_always_admits_one():
    """However heavy that one will turn out to be."""
    w = world(GroupLimit(9, weight=0.5))
    [heavy] = at_rest(w, 10**9)
    w.ask("b", agent=G)
    [connect] = w.take(Connect)
    assert connect.first_close == (heavy.backend,)


def test_a_group_is_open_up_to_its_weight():
    """Below the limit there is room, at the limit there is none."""
    w = world(GroupLimit(9, weight=100))
    busy = w.hold("a", Thing("a", weight=99), agent=G)
    assert w.hold("b", agent=G)
    busy.backend.weight = 100
    w.ask("c", agent=G)
    assert started(w) == []


# -- how many at once in their start


def test_no_more_than_the_limit_start_at_once():
    """The next one starts when one is connected, and when one has failed."""
    w = world(GroupLimit(9, starting=2))
    for key in "abcd":
        w.ask(key, agent=G)
    first, second = w.take(Connect)
    assert w.life.groups[G].starting == 2
    w.life.connected(first.entry, Thing("a"), w.now, w.effects)
    [third] = w.take(Connect)
    assert third.entry.identity[0] == "c"
    w.life.connect_failed(second.entry, AcquireTimeout("no"), w.now, w.effects)
    assert started(w) == ["d"]


def test_who_shares_a_connect_needs_no_start_of_its_own():
    """Single flight comes first."""
    w = world(GroupLimit(9, starting=1))
    waiters = [w.ask("a", agent=G) for _ in range(3)]
    w.connect()
    assert len({waiter.entry for waiter in waiters}) == 1


def test_a_check_is_not_a_start_and_what_it_leads_to_is_one():
    """A member that fails its check is replaced when it is its turn to start, its waiters first."""
    w = world(GroupLimit(9, starting=1), check_after=10.0)
    entry = w.rest("a", agent=G)
    w.now += 10
    w.ask("b", agent=G)
    [start] = w.take(Connect)
    checking, second = w.ask("a", agent=G), w.ask("a", agent=G)
    [check] = w.take(Connect)
    later = w.ask("c", agent=G)
    assert check.entry is entry
    w.life.check_failed(entry, w.now, w.effects)
    w.life.check_invariants()
    assert started(w) == []
    assert list(w.life.room) == [checking, second, later]
    w.life.connected(start.entry, Thing("b"), w.now, w.effects)
    assert started(w) == ["a"]
    w.connect()
    assert checking.entry is not None
    assert not checking.warm
    assert later.entry is None
    assert started(w) == ["c"]


def test_a_member_that_was_closed_during_its_check_is_gone_when_that_fails():
    """No place is lost."""
    w = world(GroupLimit(1), check_after=10.0)
    entry = w.rest("a", agent=G)
    w.now += 10
    w.ask("a", agent=G)
    w.take(Connect)
    w.life.expel(lambda key, _: key == "a", w.now, w.effects)
    assert w.life.groups[G].closing == 1
    w.life.check_failed(entry, w.now, w.effects)
    assert w.take(Close) == []
    assert w.life.groups == {}
    assert w.life.total == 0


# -- who waits


def test_a_full_group_holds_up_its_own_only():
    """Those of other groups and of none pass; within the group it stays first come, first served."""
    w = world(GroupLimit(1))
    busy = w.hold("a", agent=G)
    first, second = w.ask("b", agent=G), w.ask("c", agent=G)
    w.hold("d", agent="h")
    w.hold("e")
    assert first.entry is None
    w.release(busy)
    w.connect()
    assert first.entry is not None
    assert second.entry is None
    w.release(first.entry)
    w.connect()
    assert second.entry is not None


def test_a_full_pool_holds_up_everybody_in_order():
    """Also those whose group has room: the place that becomes free is the first one's."""
    w = world(GroupLimit(2), max_backends=1)
    entry = w.hold("a")
    waiters = [w.ask("b", agent=G), w.ask("c"), w.ask("d", agent="h"), w.ask("e", agent=G)]
    for waiter in waiters:
        w.release(entry)
        w.connect()
        assert waiter.entry is not None
        assert [x for x in waiters if x.entry is None] == waiters[waiters.index(waiter) + 1 :]
        entry = waiter.entry


def test_who_was_passed_is_first_when_its_group_has_room():
    """Before an ungrouped one that came later, although others passed it meanwhile."""
    w = world(GroupLimit(1), max_backends=2)
    member, other = w.hold("a", agent=G), w.hold("other")
    first, later = w.ask("b", agent=G), w.ask("c")
    w.release(other)
    w.connect()
    assert later.entry is not None
    newest = w.ask("d")
    w.release(member)
    w.connect()
    assert first.entry is not None
    assert newest.entry is None


def test_a_waiter_that_gives_up_leaves_its_line():
    """And an empty line is none."""
    w = world(GroupLimit(1))
    busy = w.hold("a", agent=G)
    waiter = w.ask("b", agent=G)
    w.life.give_up(waiter, None, w.now, w.effects)
    assert not w.life.room.lines
    w.release(busy)
    assert not [effect for effect in w.effects if not isinstance(effect, Wake | Tell)]


@pytest.mark.parametrize(
    ("limit", "told"),
    [
        (GroupLimit(1), "group 'g' is at count=1 (total 1, busy 1, idle 0, starting 0, weight 70)"),
        (GroupLimit(5, weight=50), "group 'g' is at weight=50 (total 1, busy 1, idle 0, starting 0, weight 70)"),
    ],
)
def test_exhausted_names_the_limit_of_the_group(limit, told):
    """Its name, the limit that is reached, its counts; then the counts of the pool."""
    w = world(limit)
    w.hold("a", Thing("a", weight=70), agent=G)
    waiter = w.ask("b", agent=G)
    with pytest.raises(PoolExhausted) as caught:
        w.life.give_up(waiter, 5.0, w.now, w.effects)
    assert str(caught.value).startswith(f"no room for backend 'g' of key 'b' within 5 s: {told}")
    assert "max_backends" not in str(caught.value)
    assert "1 total, 1 busy" in str(caught.value)


def test_exhausted_names_the_limit_of_starts():
    """Not the count, of which there is plenty."""
    w = world(GroupLimit(9, starting=1))
    w.ask("a", agent=G)
    waiter = w.ask("b", agent=G)
    with pytest.raises(PoolExhausted, match=r"group 'g' is at starting=1 \(total 1, busy 0, idle 0, starting 1"):
        w.life.give_up(waiter, 5.0, w.now, w.effects)


def test_exhausted_names_the_cap_when_the_group_has_room():
    """Then it is the pool that is full."""
    w = world(GroupLimit(9), max_backends=1)
    w.hold("a")
    waiter = w.ask("b", agent=G)
    with pytest.raises(PoolExhausted, match="max_backends=1") as caught:
        w.life.give_up(waiter, 5.0, w.now, w.effects)
    assert "group" not in str(caught.value)


# -- sweeps


def test_a_sweep_brings_a_group_back_to_its_weight():
    """Longest idle first, and no more than needed."""
    w = world(GroupLimit(9, weight=100))
    a, b, c = at_rest(w, 40, 30, 30)
    assert w.sweep() == []
    c.backend.weight = 80
    assert w.sweep() == [("a", G), ("b", G)]
    assert (a.state, b.state, c.state) == ("closed", "closed", "idle")
    assert w.life.counters.evicted_lru == 2


def test_a_sweep_spares_a_weightless_member_of_a_group_that_is_too_heavy():
    """It would leave in vain."""
    w = world(GroupLimit(9, weight=100))
    light, heavy = at_rest(w, 0, 101)
    assert w.sweep() == [("b", G)]
    assert (light.state, heavy.state) == ("idle", "closed")


def test_a_sweep_brings_a_group_back_to_its_lowered_count():
    """Busy ones, and those that say so, stay."""
    w = world(GroupLimit(5))
    members = at_rest(w, 0, 0, 0, 0)
    busy = w.hold("a", agent=G)
    members[1].backend.working = True
    w.life.configure(w.life.config.changed(groups={G: GroupLimit(2)}), w.now, w.effects)
    assert w.sweep() == [("c", G), ("d", G)]
    assert busy.state == "busy"
    assert w.sweep() == []


def test_what_a_sweep_evicts_for_its_idle_time_counts_for_the_weight():
    """Nobody leaves besides, when that is enough."""
    w = world(GroupLimit(9, weight=100), idle_timeout=50)
    old, young, _ = at_rest(w, 60, 60, 40)
    w.now = old.idle_since + 50
    assert w.sweep() == [("a", G)]
    assert young.state == "idle"


def test_a_sweep_lets_in_who_waits_for_the_weight():
    """A busy member has become lighter, as its last measurement says."""
    w = world(GroupLimit(9, weight=100))
    busy = w.hold("a", Thing("a", weight=150), agent=G)
    w.ask("b", agent=G)
    assert started(w) == []
    busy.backend.weight = 80
    w.life.sweep(w.now, w.effects)
    assert started(w) == ["b"]


def test_a_raised_count_lets_waiters_in():
    """Settings of a living pool."""
    w = world(GroupLimit(1))
    w.hold("a", agent=G)
    w.ask("b", agent=G)
    w.life.configure(w.life.config.changed(groups={G: GroupLimit(2)}), w.now, w.effects)
    assert started(w) == ["b"]
