"""The pure state machine: events and ``now`` go in, states and effects come out. Nothing here waits."""

import pytest

from pool.config import PoolConfig
from pool.entry import TRANSITIONS, Close, Connect, Entry, IllegalTransition, Wake
from pool.errors import AcquireTimeout, BackendClosed, BackendUnavailable, ConfigError, PoolExhausted
from tests.support.world import Thing, World

EVENTS = sorted({event for row in TRANSITIONS.values() for event in row})


# -- the table


@pytest.mark.parametrize(("state", "event"), [(s, e) for s, row in TRANSITIONS.items() for e in row])
def test_each_row_of_the_table_is_followed(state, event):
    """A known event leads to the state that the table names."""
    entry = Entry(("a", "x"), {}, None, 0.0, pooled=True)
    entry.state = state
    entry.apply(event)
    assert entry.state == TRANSITIONS[state][event]
    assert list(entry.history) == [event]


@pytest.mark.parametrize(("state", "event"), [(s, e) for s, row in TRANSITIONS.items() for e in EVENTS if e not in row])
def test_an_event_that_a_state_does_not_know_raises(state, event):
    """What the table does not list is a bug, and changes nothing."""
    entry = Entry(("a", "x"), {}, None, 0.0, pooled=True)
    entry.state = state
    with pytest.raises(IllegalTransition, match="before: nothing"):
        entry.apply(event)
    assert entry.state == state


def test_an_illegal_transition_shows_the_history():
    """The message names event, state, entry and what happened before."""
    entry = Entry(("user-1", "ssh"), {}, None, 0.0, pooled=True)
    for event in ("connected", "acquire", "last_release", "close"):
        entry.apply(event)
    with pytest.raises(IllegalTransition) as caught:
        entry.apply("acquire")
    message = str(caught.value)
    assert "'acquire' in state 'closed'" in message
    assert "'user-1'/ssh" in message
    assert message.endswith("before: connected acquire last_release close")


def test_the_hot_path_follows_the_table():
    """What `acquire_warm` and `release_warm` write down themselves is what the table and its history say."""
    world = World()
    world.ask()
    (entry,) = world.connect()
    world.life.release(entry, world.now, world.effects)
    entry.history.clear()
    state = "idle"
    calls = [("acquire", True), ("acquire", True), ("release", False), ("last_release", False)]
    for event, borrows in calls:
        if borrows:
            assert world.life.acquire_warm(("a", "x"), None, world.now) is entry
        else:
            assert world.life.release_warm(entry, world.now)
        world.life.check_invariants()
        state = TRANSITIONS[state][event]
        assert entry.state == state
    assert list(entry.history) == [event for event, _ in calls]


@pytest.mark.parametrize("what", ["retired", "closed", "lifetime", "turn", "room", "keyless", "shut"])
def test_a_release_that_has_consequences_leaves_the_hot_path(what):
    """`release_warm` changes nothing then, and `release` does what follows."""
    world = World(max_lifetime=100.0, max_backends=1)
    entry = world.hold(None if what == "keyless" else "a", Thing(max_users=1))
    match what:
        case "retired":
            world.life.close_key("a", world.now, world.effects)
        case "closed":
            world.life.expel(lambda key, _: key == "a", world.now, world.effects)
        case "lifetime":
            world.now += 200.0
        case "turn":
            world.ask()
        case "room":
            world.ask("b")
        case "shut":
            world.life.shutdown(world.now, world.effects)
    before = (entry.state, entry.users, list(entry.history))
    assert not world.life.release_warm(entry, world.now)
    assert (entry.state, entry.users, list(entry.history)) == before
    world.life.release(entry, world.now, world.effects)
    world.life.check_invariants()
    assert entry.state == ("busy" if what == "turn" else "closed")


# -- connecting


def test_many_acquires_of_one_key_make_one_connect():
    """Single flight: whoever asks while it connects shares it."""
    world = World()
    waiters = [world.ask() for _ in range(5)]
    assert len(world.take(Connect)) == 1
    world.life.connected(waiters[0].entry or next(iter(world.life.entries.values())), Thing(), world.now, world.effects)
    assert [effect.waiter for effect in world.take(Wake)] == waiters
    assert {waiter.entry for waiter in waiters} == set(world.life.entries.values())
    assert next(iter(world.life.entries.values())).users == 5


def test_who_waited_for_the_connect_was_not_served_warm():
    """``warm`` is told of those only who came after the connect."""
    world = World()
    first, second = world.ask(), world.ask()
    world.connect()
    assert not first.warm
    assert not second.warm
    assert world.ask().warm
    assert world.life.counters.hits == 1


def test_two_agents_of_one_key_have_a_backend_each():
    """The identity is key and agent."""
    world = World()
    assert world.hold("a", agent="x") is not world.hold("a", agent="y")


def test_a_failed_connect_fails_all_who_waited_for_it():
    """Each gets an error object of its own, and none is left waiting."""
    world = World()
    waiters = [world.ask() for _ in range(3)]
    world.fail()
    errors = [waiter.error for waiter in waiters]
    assert [effect.waiter for effect in world.take(Wake)] == waiters
    assert all(isinstance(error, BackendUnavailable) for error in errors)
    assert len({id(error) for error in errors}) == 3
    assert world.life.total == 0
    assert world.life.counters.failures == {"refused": 1}


def test_the_cause_of_a_failure_reaches_every_waiter():
    """The copies keep the chain."""
    world = World()
    waiters = [world.ask() for _ in range(2)]
    error = BackendUnavailable("refused", "refused", 0.0)
    error.__cause__ = cause = OSError("no")
    world.fail(error)
    assert [waiter.error.__cause__ for waiter in waiters] == [cause, cause]


def test_a_failure_is_remembered_until_its_retry_time():
    """No connect in between; the remaining seconds are told; afterwards the next one tries."""
    world = World(backoff_base=1.0)
    world.ask()
    world.fail()
    world.now += 0.2
    with pytest.raises(BackendUnavailable) as caught:
        world.ask()
    assert caught.value.retry_after == pytest.approx(0.3)  # half of the base, less 0.2
    assert world.take(Connect) == []
    world.now += 0.3
    world.ask()
    assert len(world.take(Connect)) == 1


def test_the_backoff_doubles_up_to_its_maximum():
    """Each failure in a row doubles the wait; the maximum ends that."""
    world = World(backoff_base=1.0, backoff_max=8.0)
    waits = []
    for _ in range(6):
        waiter = world.ask()
        world.fail()
        waits.append(waiter.error.retry_after)
        world.now += waits[-1]
    assert waits == [0.5, 1.0, 2.0, 4.0, 4.0, 4.0]  # jitter at its lowest: one half


def test_the_jitter_stretches_a_wait_up_to_twofold():
    """From a half of the backoff up to all of it."""
    world = World(backoff_base=1.0)
    world.dice = 0.999
    waiter = world.ask()
    world.fail()
    assert waiter.error.retry_after == pytest.approx(1.0, abs=0.001)


def test_thousands_of_failures_in_a_row_do_not_overflow():
    """The exponent is bounded."""
    world = World(backoff_base=1.0, backoff_max=5.0)
    for _ in range(2000):
        world.ask()
        world.fail()
        world.now += 5.0
    assert world.life.failed[("a", "x")].attempts == 2000


def test_a_success_forgets_the_failures():
    """The next failure starts at the base again."""
    world = World(backoff_base=1.0)
    for _ in range(3):
        world.ask()
        world.fail()
        world.now += 10
    entry = world.rest()
    entry.backend.usable = False
    waiter = world.ask()
    world.closed()
    world.fail()
    assert waiter.error.retry_after == 0.5


def test_a_different_config_bypasses_the_remembered_failure():
    """A failure belongs to what was tried."""
    world = World()
    world.ask(config={"host": "wrong"})
    world.fail()
    with pytest.raises(BackendUnavailable):
        world.ask(config={"host": "wrong"})
    world.ask(config={"host": "right"})
    assert len(world.take(Connect)) == 1


def test_a_failure_that_only_a_person_can_mend_says_so_each_time():
    """``retry_after`` None stays None, and the host is spared all the same."""
    world = World()
    world.ask()
    world.fail(BackendUnavailable("host key changed", "host_key", None))
    with pytest.raises(BackendUnavailable) as caught:
        world.ask()
    assert caught.value.retry_after is None
    assert caught.value.reason == "host_key"
    assert world.take(Connect) == []


def test_an_error_of_the_config_is_shared_but_not_remembered():
    """It comes from the code, not from the host: nothing to wait for."""
    world = World()
    waiter = world.ask()
    world.fail(ConfigError("root_dir is missing"))
    assert isinstance(waiter.error, ConfigError)
    world.ask()
    assert len(world.take(Connect)) == 1


def test_a_keyless_failure_is_not_remembered():
    """Nobody shares a keyless backend, nor its failure."""
    world = World()
    world.ask(None)
    world.fail()
    world.ask(None)
    assert len(world.take(Connect)) == 1


def test_sweeps_forget_old_failures():
    """A host that nobody asks for again leaves no trace."""
    world = World(backoff_base=1.0, backoff_max=10.0)
    world.ask()
    world.fail()
    world.now += 10.4
    world.sweep()
    assert world.life.failed
    world.now += 0.2
    world.sweep()
    assert not world.life.failed


# -- the cap


def test_waiters_for_room_are_served_in_order():
    """First come, first served, whatever the keys."""
    world = World(max_backends=1)
    entry = world.hold("a")
    waiters = [world.ask(key) for key in ("b", "c", None, "d")]
    assert world.take(Connect) == []
    for waiter in waiters:
        world.release(entry)
        world.closed()
        world.connect()
        assert waiter.entry is not None
        assert [w for w in waiters if w.entry is None] == waiters[waiters.index(waiter) + 1 :]
        entry = waiter.entry


def test_the_least_recently_released_backend_makes_room():
    """Not the one connected first, nor the one acquired first."""
    world = World(max_backends=3)
    entries = {key: world.hold(key) for key in "abc"}
    for key in "bca":
        world.now += 1
        world.release(entries[key])
    world.ask("d")
    (connect,) = world.take(Connect)
    assert connect.first_close == (entries["b"].backend,)
    assert entries["b"].state == "closed"
    assert world.life.counters.evicted_lru == 1


def test_a_victim_is_closed_by_the_connect_that_needs_its_place():
    """The cap counts live backends, so the old one goes before the new one comes."""
    world = World(max_backends=1)
    old = world.rest("a").backend
    world.ask("b")
    (connect,) = world.take(Connect)
    assert connect.first_close == (old,)
    assert world.take(Close) == []  # not a second time
    assert world.life.total == 1


def test_a_touched_backend_is_the_last_victim():
    """Being looked at counts as use."""
    world = World(max_backends=2)
    first, second = world.rest("a"), world.rest("b")
    world.now += 1
    world.life.touch(first, world.now)
    world.ask("c")
    assert second.state == "closed"
    assert first.state == "idle"


def test_a_busy_backend_survives_the_lru_cap():
    """The newcomer waits; nobody's backend is taken away."""
    world = World(max_backends=2)
    entries = [world.hold("a"), world.hold("b")]
    world.ask("c")
    assert world.take(Connect) == []
    assert [entry.state for entry in entries] == ["busy", "busy"]


def test_a_backend_that_is_being_closed_keeps_its_place():
    """The next one waits until it is gone."""
    world = World(max_backends=1)
    world.rest("a")
    world.life.close_key("a", world.now, world.effects)
    [close] = world.take(Close)
    world.ask("b")
    assert world.take(Connect) == []
    assert world.life.total == 1
    world.life.gone(close.entry, world.now, world.effects)
    assert len(world.take(Connect)) == 1


def test_a_changed_config_takes_the_place_of_the_old_backend():
    """In a full pool nobody else is evicted for it."""
    world = World(max_backends=2)
    old, other = world.rest("a", config={"n": 1}), world.rest("b")
    world.ask("a", config={"n": 2})
    [connect] = world.take(Connect)
    assert connect.first_close == (old.backend,)
    assert world.take(Close) == []
    assert other.state == "idle"
    assert world.life.total == 2


def test_room_is_never_made_by_a_backend_that_says_it_is_busy():
    """The next one that was idle for longest goes instead; without one the newcomer waits."""
    world = World(max_backends=2)
    working, resting = world.rest("a"), world.rest("b")
    working.backend.working = True
    world.ask("c")
    [connect] = world.take(Connect)
    assert connect.first_close == (resting.backend,)
    assert working.state == "idle"
    waiter = world.ask("d")
    assert world.take(Connect) == []
    world.life.give_up(waiter, None, world.now, world.effects)


def test_a_backend_that_is_lost_in_use_is_not_handed_on():
    """Who waited for a turn on it gets a new one."""
    world = World()
    entry = world.hold(thing=Thing(max_users=1))
    waiter = world.ask()
    entry.backend.usable = False
    world.release(entry)
    assert waiter.entry is None
    assert world.take(Close)[0].backend is entry.backend
    world.connect()
    assert waiter.entry is not None
    assert waiter.entry is not entry


def test_each_waiter_gets_an_error_of_its_own():
    """Tracebacks of callers that failed together do not mix, whatever the error."""
    world = World()
    waiters = [world.ask(), world.ask()]
    world.fail(ConfigError("host: unknown"))
    errors = [waiter.error for waiter in waiters]
    assert [str(error) for error in errors] == ["host: unknown"] * 2
    assert errors[0] is not errors[1]


def test_registering_the_same_backend_again_keeps_it():
    """It counts as a use."""
    world = World()
    thing = Thing()
    for _ in range(2):
        world.life.register(("a", "x"), {}, thing, world.now, world.effects)
    assert world.take(Close) == []
    assert len(world.life.idle) == 1


def test_a_failed_connect_frees_its_place():
    """Whoever waits for room is next."""
    world = World(max_backends=1)
    world.ask("a")
    waiter = world.ask("b")
    world.fail()
    world.connect()
    assert waiter.entry is not None


# -- giving up


def test_giving_up_in_the_room_raises_pool_exhausted_with_counts():
    """The message says what the pool holds."""
    world = World(max_backends=2)
    world.hold("a")
    world.hold("b")
    waiter = world.ask("c")
    world.ask("d")
    with pytest.raises(PoolExhausted) as caught:
        world.life.give_up(waiter, 3.0, world.now, world.effects)
    assert caught.value.phase == "room"
    assert caught.value.counts == {"total": 2, "busy": 2, "idle": 0, "waiting": 1}
    assert "no room for backend 'x' of key 'c' within 3 s: max_backends=2" in str(caught.value)
    assert "2 total, 2 busy, 0 idle, 1 waiting" in str(caught.value)


def test_giving_up_on_a_connect_raises_acquire_timeout():
    """The connect goes on; its backend becomes idle for the next one."""
    world = World()
    waiter = world.ask()
    with pytest.raises(AcquireTimeout, match="still connecting") as caught:
        world.life.give_up(waiter, 1.5, world.now, world.effects)
    assert not isinstance(caught.value, PoolExhausted)
    assert caught.value.phase == "connect"
    (entry,) = world.connect()
    assert entry.state == "idle"
    assert world.warm() is entry


def test_giving_up_on_a_turn_raises_acquire_timeout():
    """The one behind moves up."""
    world = World()
    entry = world.hold("a", Thing(max_users=1))
    first, second = world.ask(), world.ask()
    with pytest.raises(AcquireTimeout, match="all its turns are taken") as caught:
        world.life.give_up(first, 1.0, world.now, world.effects)
    assert caught.value.phase == "turn"
    world.release(entry)
    assert second.entry is entry
    assert first.entry is None


def test_giving_up_keyless_names_no_key():
    """There is none."""
    world = World(max_backends=1)
    world.hold("a")
    with pytest.raises(PoolExhausted, match="no room for a fresh backend"):
        world.life.give_up(world.ask(None), 1.0, world.now, world.effects)


def test_a_timeout_that_comes_after_the_grant_returns_the_entry():
    """Served in the very last moment is served."""
    world = World()
    waiter = world.ask()
    (entry,) = world.connect()
    assert world.life.give_up(waiter, 1.0, world.now, world.effects) is entry
    assert entry.users == 1


def test_a_timeout_that_comes_after_the_failure_raises_the_failure():
    """The real reason, not the clock."""
    world = World()
    waiter = world.ask()
    world.fail()
    with pytest.raises(BackendUnavailable):
        world.life.give_up(waiter, 1.0, world.now, world.effects)


def test_a_cancelled_caller_that_was_served_meanwhile_gives_back():
    """A backend is never left with somebody who has gone."""
    world = World()
    waiter = world.ask()
    (entry,) = world.connect()
    world.life.give_up(waiter, None, world.now, world.effects)
    assert entry.state == "idle"


def test_a_caller_that_goes_away_twice_gives_back_once():
    """Its loop was closed, and later its coroutine is collected: the user count stays right."""
    world = World()
    waiter, other = world.ask(), world.ask()
    world.connect()
    for _ in range(2):
        world.life.give_up(waiter, None, world.now, world.effects)
        world.life.check_invariants()
    assert other.entry.users == 1


@pytest.mark.parametrize("phase", ["room", "connect", "turn", "failed"])
def test_a_cancelled_caller_leaves_quietly_in_every_phase(phase):
    """Nothing raised, nothing left behind."""
    world = World(max_backends=1)
    if phase in ("room", "turn"):
        world.hold("a", Thing(max_users=1))
    waiter = world.ask("b" if phase == "room" else "a")
    if phase == "failed":
        world.fail()
    assert world.life.give_up(waiter, None, world.now, world.effects) is None
    world.life.check_invariants()
    assert world.life.counts["waiting"] == 0


def test_a_keyless_connect_that_nobody_waits_for_is_closed():
    """Nobody else can ever use it."""
    world = World()
    world.life.give_up(world.ask(None), None, world.now, world.effects)
    (entry,) = world.connect()
    assert world.closed() == [entry.backend]
    assert world.life.total == 0


# -- retiring


def test_a_changed_config_retires_the_busy_backend():
    """Its user finishes on the old one; the newcomer gets a new one; the old one is closed at the release."""
    world = World()
    old = world.hold(config={"n": 1})
    new = world.hold(config={"n": 2})
    assert new is not old
    assert (old.state, new.state) == ("retired", "busy")
    assert world.take(Close) == []
    world.release(old)
    assert world.closed() == [old.backend]
    assert world.life.counters.retired == 1


def test_a_changed_config_closes_the_idle_backend():
    """Nobody uses it, so there is nothing to wait for."""
    world = World()
    old = world.rest(config={"n": 1})
    world.ask(config={"n": 2})
    assert [effect.backend for effect in world.take(Close)] == [old.backend]


def test_who_waits_for_a_connect_that_is_retired_is_still_served():
    """They asked for that config, and get it; then it is closed."""
    world = World()
    first = world.ask(config={"n": 1})
    second = world.ask(config={"n": 2})
    world.connect(Thing("old"), Thing("new"))
    assert (first.entry.backend.name, second.entry.backend.name) == ("old", "new")
    world.release(first.entry)
    assert [thing.name for thing in world.closed()] == ["old"]


def test_a_retired_connect_that_fails_is_gone():
    """Its waiters hear of it; the new one is not touched."""
    world = World()
    first = world.ask(config={"n": 1})
    (connect,) = world.take(Connect)
    second = world.ask(config={"n": 2})
    world.life.connect_failed(connect.entry, BackendUnavailable("x", "refused", 0.0), world.now, world.effects)
    assert isinstance(first.error, BackendUnavailable)
    world.connect()
    assert second.entry is not None


def test_a_lost_backend_is_replaced_by_the_next_acquire():
    """Idle or busy, what is not usable is not handed out again."""
    world = World()
    entry = world.rest()
    entry.backend.usable = False
    assert world.warm() is None
    waiter = world.ask()
    assert world.closed() == [entry.backend]
    world.connect()
    assert waiter.entry not in (None, entry)


def test_the_waiters_of_a_lost_backend_move_on_in_order():
    """They asked before the one who found out, and are served before it."""
    world = World()
    entry = world.hold("a", Thing(max_users=1))
    first, second = world.ask(), world.ask()
    entry.backend.usable = False
    third = world.ask()
    world.connect(Thing("new", max_users=1))
    assert first.entry is not None
    assert (second.entry, third.entry) == (None, None)
    world.release(first.entry)
    world.release(second.entry)
    assert third.entry is first.entry
    assert entry.state == "retired"


def test_a_lifetime_ends_at_the_release():
    """Not under the user, and not later."""
    world = World(max_lifetime=100.0)
    entry = world.hold()
    world.now += 100
    assert entry.state == "busy"
    world.release(entry)
    assert world.closed() == [entry.backend]


def test_an_idle_backend_past_its_lifetime_is_not_handed_out():
    """The next acquire replaces it."""
    world = World(max_lifetime=100.0)
    old = world.rest()
    world.now += 100
    assert world.warm() is None
    assert world.hold() is not old
    assert world.closed() == [old.backend]


def test_a_lifetime_is_shortened_by_jitter():
    """Up to the share that the config names, so that backends do not all end together."""
    world = World(max_lifetime=100.0, lifetime_jitter=0.2)
    world.dice = 0.5
    entry = world.rest()
    assert entry.expires == world.now + 90.0
    world.now += 89.9
    assert world.life.acquire_warm(("a", "x"), None, world.now) is None  # idle for long: to be checked first
    world.now += 0.1
    assert world.ask().entry is None
    assert world.closed() == [entry.backend]


def test_without_max_lifetime_a_backend_does_not_expire():
    """None is no limit."""
    assert World().hold().expires == float("inf")


# -- checks


def test_a_long_idle_backend_is_checked_before_it_is_handed_out():
    """And stays the same if it is alive."""
    world = World(check_after=30.0)
    entry = world.rest()
    world.now += 30
    assert world.warm() is None
    waiter = world.ask()
    (connect,) = world.take(Connect)
    assert connect.entry is entry
    assert waiter.entry is None
    world.life.connected(entry, entry.backend, world.now, world.effects)
    assert waiter.entry is entry
    assert waiter.warm
    assert world.life.counters.connects == 1


def test_a_briefly_idle_backend_is_not_checked():
    """Below ``check_after`` nothing stands between the caller and the backend."""
    world = World(check_after=30.0)
    entry = world.rest()
    world.now += 29.9
    assert world.warm() is entry


def test_a_backend_that_failed_its_check_is_replaced_within_its_entry():
    """Who waited gets the new one, and is not told that it was warm."""
    world = World(check_after=30.0)
    entry = world.rest()
    world.now += 30
    waiter = world.ask()
    world.connect(Thing("new"))
    assert waiter.entry is entry
    assert entry.backend.name == "new"
    assert not waiter.warm
    assert world.life.counters.connects == 2


def test_a_check_is_shared_by_those_who_ask_meanwhile():
    """Single flight holds for checks too."""
    world = World(check_after=30.0)
    world.rest()
    world.now += 30
    waiters = [world.ask() for _ in range(3)]
    assert len(world.take(Connect)) == 1
    assert [waiter.entry for waiter in waiters] == [None] * 3


# -- turns


def test_turns_are_given_in_order_of_asking():
    """With ``max_users`` one, each release serves the one who waits longest."""
    world = World()
    entry = world.hold("a", Thing(max_users=1))
    waiters = [world.ask() for _ in range(3)]
    assert world.warm() is None
    for number, waiter in enumerate(waiters):
        assert [w.entry for w in waiters[number:]] == [None] * (3 - number)
        world.release(entry)
        assert waiter.entry is entry
    assert entry.users == 1


def test_a_newcomer_does_not_overtake_those_who_wait_for_a_turn():
    """Two turns, both taken, one waiting: the freed turn is the waiter's."""
    world = World()
    entry = world.hold("a", Thing(max_users=2))
    assert world.warm() is entry
    waiter = world.ask()
    world.release(entry)
    assert waiter.entry is entry
    assert world.warm() is None


def test_a_connect_serves_as_many_as_there_are_turns():
    """The others wait for theirs."""
    world = World()
    waiters = [world.ask() for _ in range(3)]
    world.connect(Thing(max_users=2))
    assert [waiter.entry is not None for waiter in waiters] == [True, True, False]


# -- keyless


def test_a_keyless_backend_is_closed_at_release():
    """Fresh, private, and gone afterwards."""
    world = World()
    first, second = world.hold(None), world.hold(None)
    assert first is not second
    assert world.life.entries == {}
    world.release(first)
    assert world.closed() == [first.backend]
    assert second.state == "busy"


# -- sweeping


def test_a_sweep_evicts_what_was_idle_for_long_oldest_first():
    """And nothing else."""
    world = World(idle_timeout=100.0)
    entries = {key: world.hold(key) for key in "abcd"}
    for key in "cab":
        world.release(entries[key])
        world.now += 10
    world.now += 80  # c idle for 110, a for 100, b for 90, d busy
    assert world.sweep() == [("c", "x"), ("a", "x")]
    assert world.closed() == [entries["c"].backend, entries["a"].backend]
    assert world.life.counters.evicted_idle == 2
    assert set(world.life.entries) == {("b", "x"), ("d", "x")}


def test_a_sweep_spares_a_backend_that_says_it_is_busy():
    """Its idle time starts anew."""
    world = World(idle_timeout=100.0)
    entry = world.rest()
    entry.backend.working = True
    world.now += 100
    assert world.sweep() == []
    assert entry.idle_since == world.now
    entry.backend.working = False
    world.now += 99
    assert world.sweep() == []
    world.now += 1
    assert world.sweep() == [("a", "x")]


def test_a_backend_that_cannot_say_whether_it_is_busy_is_evicted():
    """An answer that raises spares nobody."""
    world = World(idle_timeout=100.0)
    entry = world.rest()
    entry.backend.is_busy = lambda: 1 / 0
    world.now += 100
    assert world.sweep() == [("a", "x")]


def test_a_sweep_trims_a_pool_whose_cap_was_lowered():
    """Least recently released first, and only as many as are too many."""
    world = World(max_backends=4)
    for key in "abcd":
        world.rest(key)
    world.life.config = PoolConfig(max_backends=2)
    assert world.sweep() == [("a", "x"), ("b", "x")]
    assert world.life.counters.evicted_lru == 2


def test_a_sweep_looks_at_no_more_than_it_evicts():
    """With 100,000 idle backends of which none is due it looks at one."""

    class Counting(dict):
        looked = 0

        def __iter__(self):
            for entry in super().__iter__():
                self.looked += 1
                yield entry

    world = World(max_backends=200_000)
    thing = Thing()
    idle = Counting()
    for number in range(100_000):
        entry = Entry((str(number), "x"), {}, None, world.now, pooled=True)
        entry.state, entry.backend = "idle", thing
        world.life.entries[entry.identity] = entry
        idle[entry] = None
    world.life.idle = idle
    assert world.life.due(world.now) == []
    assert idle.looked <= 1


# -- closing a key, adopting, shutting down


def test_closing_a_key_ends_all_its_backends():
    """Idle ones now, busy ones at their release; other keys are not touched."""
    world = World()
    idle, busy, other = world.rest("a", agent="x"), world.hold("a", agent="y"), world.rest("b")
    assert world.life.close_key("a", world.now, world.effects) == ([("a", "x")], [("a", "y")])
    world.life.check_invariants()
    assert world.closed() == [idle.backend]
    world.release(busy)
    assert world.closed() == [busy.backend]
    assert other.state == "idle"


def test_closing_a_key_twice_finds_nothing():
    """It can be repeated."""
    world = World()
    world.rest("a")
    world.life.close_key("a", world.now, world.effects)
    assert world.life.close_key("a", world.now, world.effects) == ([], [])


def test_closing_a_key_that_connects_serves_its_waiters_first():
    """They get what they asked for; then it ends."""
    world = World()
    waiter = world.ask("a")
    assert world.life.close_key("a", world.now, world.effects) == ([], [("a", "x")])
    world.connect()
    assert waiter.entry is not None
    world.release(waiter.entry)
    assert len(world.closed()) == 1


def test_a_key_can_be_used_again_after_it_was_closed():
    """With a new backend, even while the old one's users finish."""
    world = World()
    old = world.hold("a")
    world.life.close_key("a", world.now, world.effects)
    assert world.hold("a") is not old


def test_an_adopted_backend_is_warm():
    """`register` makes it idle at once."""
    world = World()
    thing = Thing("adopted")
    world.life.register(("a", "x"), {}, thing, world.now, world.effects)
    world.life.check_invariants()
    assert world.warm().backend is thing


def test_adopting_retires_what_was_there():
    """Its users finish; an idle one is closed."""
    world = World()
    busy, idle = world.hold("a"), world.rest("b")
    for key in "ab":
        world.life.register((key, "x"), {}, Thing(f"new {key}"), world.now, world.effects)
        world.life.check_invariants()
    assert busy.state == "retired"
    assert world.closed() == [idle.backend]


def test_a_backend_that_is_adopted_dead_is_closed():
    """It is not kept, and not handed out."""
    world = World()
    thing = Thing()
    thing.usable = False
    world.life.register(("a", "x"), {}, thing, world.now, world.effects)
    assert world.closed() == [thing]
    assert world.life.entries == {}


def test_shutdown_sends_everybody_away_and_closes_what_is_idle():
    """Waiters for room, connect and turn hear `BackendClosed`; busy backends stay for the moment."""
    world = World(max_backends=3)
    busy, idle = world.hold("a", Thing(max_users=1)), world.rest("b")
    waiters = [world.ask("a"), world.ask("c"), world.ask("d")]
    world.life.shutdown(world.now, world.effects)
    world.life.check_invariants()
    assert [type(waiter.error) for waiter in waiters] == [BackendClosed] * 3
    assert {id(effect.waiter) for effect in world.take(Wake)} >= {id(waiter) for waiter in waiters}
    assert busy.state == "busy"
    assert idle.state == "closed"
    for call in (lambda: world.ask("e"), lambda: world.life.register(("a", "x"), {}, Thing(), 0.0, [])):
        with pytest.raises(BackendClosed):
            call()


def test_after_shutdown_a_release_closes():
    """Nobody comes after this user."""
    world = World()
    entry = world.hold()
    world.life.shutdown(world.now, world.effects)
    world.release(entry)
    assert world.closed() == [entry.backend]
    assert world.life.total == 0


def test_close_rest_closes_under_the_users():
    """Their release afterwards does nothing."""
    world = World()
    entry, retired = world.hold(config={"n": 1}), world.hold(config={"n": 2})
    world.life.shutdown(world.now, world.effects)
    assert set(world.life.close_rest(world.now, world.effects)) == {entry, retired}
    assert len(world.closed()) == 2
    world.release(entry)
    assert world.closed() == []
    assert world.life.total == 0


def test_after_shutdown_a_warm_backend_takes_nobody_new():
    """The grace is for those who have it, or it would never end."""
    world = World()
    entry = world.hold()
    world.life.shutdown(world.now, world.effects)
    assert world.warm() is None
    assert entry.users == 1


def test_one_place_serves_all_who_wait_for_room_for_the_same_backend():
    """They need one place together, and do not stand behind somebody who needs another one."""
    world = World(max_backends=1)
    entry = world.hold("a")
    first, other, second = world.ask("b"), world.ask("c"), world.ask("b")
    world.release(entry)
    world.connect()
    assert first.entry is not None
    assert second.entry is first.entry
    assert other.entry is None


def test_adopting_serves_who_waited_for_room():
    """A registered backend is there; nobody needs to wait for a place for it."""
    world = World(max_backends=1)
    world.hold("a")
    other, waiter = world.ask("c"), world.ask("b")
    world.life.register(("b", "x"), {}, Thing("adopted"), world.now, world.effects)
    world.life.check_invariants()
    assert waiter.entry.backend.name == "adopted"
    assert other.entry is None


def test_who_waits_for_a_check_that_is_retired_is_still_served():
    """Closing the key in the middle of a check: they get the backend, then it is closed."""
    world = World(check_after=30.0)
    entry = world.rest()
    world.now += 30
    waiter = world.ask()
    world.life.close_key("a", world.now, world.effects)
    world.connect(entry.backend)
    assert waiter.entry is entry
    assert world.take(Close) == []
    world.release(entry)
    assert world.closed() == [entry.backend]


def test_a_check_that_nobody_waits_for_keeps_its_place_until_it_ends():
    """It may be making a new backend: closing the old one under it would leave that one uncounted."""
    world = World(check_after=30.0, max_backends=1)
    entry = world.rest()
    world.now += 30
    world.life.give_up(world.ask(), None, world.now, world.effects)
    world.life.close_key("a", world.now, world.effects)
    waiter = world.ask("b")
    assert world.take(Close) == []
    assert [effect.entry for effect in world.effects if isinstance(effect, Connect)] == [entry]
    world.connect(Thing("new"))
    [connect] = [effect for effect in world.effects if isinstance(effect, Connect)]
    assert [thing.name for thing in connect.first_close] == ["new"]
    world.connect()
    assert waiter.entry is not None


@pytest.mark.parametrize("checking", [False, True])
@pytest.mark.parametrize("outcome", ["connected", "failed"])
def test_shutdown_counts_a_connect_until_it_has_ended(checking, outcome):
    """Whatever comes of it is closed; only then the pool is empty."""
    world = World(check_after=30.0)
    if checking:
        world.rest()
        world.now += 30
    world.ask()
    world.life.shutdown(world.now, world.effects)
    assert world.take(Close) == []
    assert world.life.total == 1
    if outcome == "connected":
        world.connect()
    else:
        world.fail()
    assert len(world.closed()) == (checking or outcome == "connected")
    assert world.life.total == 0


def test_a_keyless_release_is_not_counted_as_retired():
    """``retired_total`` tells of backends that ended before their time."""
    world = World()
    world.release(world.hold(None))
    assert world.life.counters.retired == 0
    assert world.life.counters.closed == 1


def test_a_raised_cap_lets_in_who_waits_for_room():
    """At once, as many as there are new places."""
    world = World(max_backends=1)
    world.hold("a")
    waiters = [world.ask(key) for key in "bcd"]
    world.life.configure(PoolConfig(max_backends=3), world.now, world.effects)
    world.connect()
    assert [waiter.entry is not None for waiter in waiters] == [True, True, False]


def test_the_waiters_of_a_lost_backend_move_on_although_its_finder_fails():
    """Who finds the loss may hear of a remembered failure; those who waited for a turn are not forgotten."""
    world = World(max_backends=9)
    world.ask(config={"n": 1})
    (first,) = world.take(Connect)
    world.ask(config={"n": 2})
    world.connect()
    entry = world.hold(config={"n": 1}, thing=Thing(max_users=1))
    waiting = world.ask(config={"n": 1})
    world.life.connect_failed(first.entry, BackendUnavailable("x", "refused", 0.0), world.now, world.effects)
    entry.backend.usable = False
    with pytest.raises(BackendUnavailable):
        world.ask(config={"n": 1})
    world.connect()
    assert waiting.entry not in (None, entry)
