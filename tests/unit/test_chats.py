"""The chats of a worker process: the path of a turn, whether an attempt is told apart from the first, and closes."""

import logging
import threading

import pytest

from pool.agents import NO_AGENTS
from pool.chats import Chat
from pool.errors import (
    AcquireTimeout,
    BackendClosed,
    BackendUnavailable,
    ConfigError,
    InvalidKey,
    NotOwner,
    PoolError,
    PoolExhausted,
    TaskCancelled,
    TurnFailed,
)
from pool.interrupt import Interrupt
from pool.sharding.hashing import shard_of
from pool.worker import chats as module
from pool.worker.chats import Chats
from tests.support.agents import Aside, Office
from tests.support.waiting import wait_until

STEPS = ("begin", "open", "session", "save", "prompt", "finish")


@pytest.fixture
def office(monkeypatch):
    office = Office(monkeypatch)
    yield office
    for gate in (office.farm.opens, office.farm.prompts, office.farm.cancels):
        gate.open()
    office.pool.destroy_all(grace=1.0)


def record(office, key="c1", agent="fake"):
    """What the store has."""
    return next((found for found in office.store.records(key) if found.agent == agent), None)


def lost(retry_after=1.0):
    return BackendUnavailable("the host is gone", "lost", retry_after)


# -- the path of a turn


def test_a_turn_goes_from_the_record_to_the_agent_and_back(office):
    """The record first, the agent, its session, what is new written down before the prompt, the end noted."""
    office.run()
    assert office.farm.did(*STEPS) == ["begin", "open", "session", "save", "prompt", "finish"]
    assert record(office).session_id == "s1"
    assert record(office).turn == ""


def test_a_warm_turn_saves_nothing(office):
    """Only what has changed is written."""
    office.run()
    office.farm.diary.clear()
    office.run(turn="t2")
    assert office.farm.did(*STEPS) == ["begin", "session", "prompt", "finish"]
    office.farm.version = "fake 2"
    office.run(turn="t3")
    assert office.farm.did("save") == ["save"]
    assert record(office).version == "fake 2"


def test_a_version_that_an_agent_does_not_tell_stays_in_the_record(office):
    """The worktree, which it does tell, is written."""
    office.farm.version = "fake 1"
    office.run()
    office.farm.version, office.farm.worktree = "", "worktrees/x"
    office.run(turn="t2")
    assert (record(office).version, record(office).worktree) == ("fake 1", "worktrees/x")


def test_an_agent_is_warm_when_it_ran_and_had_the_session(office):
    """Not one that runs and begins a session now, nor one that brings an old one back."""
    office.farm.errors["session"] = lost()
    with pytest.raises(BackendUnavailable):
        office.run()
    office.farm.errors.clear()
    assert office.pool.peek("c1", "fake") is not None  # it runs, and has no session yet
    assert not office.run().warm
    assert office.run(turn="t2").warm
    office.pool.peek("c1", "fake").session_id = ""
    resumed = office.run(turn="t3")
    assert resumed.session.resumed
    assert not resumed.warm
    office.pool.close_key("c1")
    assert not office.run(turn="t4").warm


def test_a_warm_agent_that_lost_the_memory_is_not_warm(office):
    """It ran, but what it has is a new session."""
    office.run()
    office.farm.kept.clear()
    office.pool.peek("c1", "fake").session_id = ""
    turn = office.run(turn="t2")
    assert turn.session.memory_lost
    assert not turn.warm
    assert record(office).session_id == turn.session.session_id == "s2"


def test_the_agent_is_given_back_and_the_chat_free_after_each_end(office):
    """Whether the task's code returned or failed."""
    office.run()
    with pytest.raises(ZeroDivisionError), office.turn(turn="t2"):
        raise ZeroDivisionError
    assert office.pool.get_stats().active_backends == 0
    assert record(office).turn == ""
    office.run(turn="t3", timeout=0.0)


# -- what a later attempt is told


@pytest.mark.parametrize("error", [lost(), BackendClosed("closed"), SystemExit(1)], ids=lambda e: type(e).__name__)
def test_an_attempt_that_ended_after_its_prompt_was_sent_is_told_to_the_next(error, office):
    """The message goes back, and the agent may have heard the prompt."""
    office.farm.errors["prompt"] = error if isinstance(error, Exception) else lost()
    with pytest.raises(type(error)), office.turn() as chat:
        try:
            chat.prompt("do it")
        except PoolError:
            if not isinstance(error, Exception):
                raise error from None
            raise
    assert record(office).turn == "t1"
    office.farm.errors.clear()
    assert office.run().repeated
    assert not office.run(turn="t2").repeated


@pytest.mark.parametrize("error", [lost(), BackendClosed("closed"), SystemExit(1)], ids=lambda e: type(e).__name__)
def test_an_attempt_that_ended_before_its_prompt_is_not(error, office):
    """Nothing was heard: the next one is the first."""
    with pytest.raises(type(error)), office.turn():
        raise error
    assert record(office).turn == ""
    assert not office.run().repeated


@pytest.mark.parametrize("step", ["open", "session"])
def test_an_agent_that_cannot_be_had_leaves_no_turn(step, office):
    """The task is tried again as if for the first time."""
    office.farm.errors[step] = lost(0.0)
    with pytest.raises(BackendUnavailable):
        office.run()
    assert record(office).turn == ""
    assert not office.farm.prompted


@pytest.mark.parametrize("error", [TurnFailed("no"), ZeroDivisionError()], ids=lambda e: type(e).__name__)
def test_a_turn_that_failed_for_good_has_ended(error, office):
    """Nobody repeats it."""
    office.farm.errors["prompt"] = error
    with pytest.raises(type(error)):
        office.run()
    assert record(office).turn == ""


def test_a_turn_is_worth_more_than_the_note_of_its_end(office, caplog):
    """A store that fails at the end fails no turn."""
    caplog.set_level(logging.INFO)
    with office.turn() as chat:
        chat.prompt("do it")
        office.store.unreachable = lost()
    assert "end of a turn of chat 'c1' was not written down" in caplog.text


# -- what is refused


def test_an_unknown_agent_writes_nothing(office):
    """The error names those there are."""
    with pytest.raises(ConfigError, match=r"there is no agent 'fak'; did you mean 'fake'\?"):
        office.run(agent="fak")
    assert not office.farm.diary


@pytest.mark.parametrize("key", ["../etc", "a b", ".ssh"])
def test_a_chat_that_cannot_have_a_folder_writes_nothing(key, office):
    """Its name would leave the root."""
    with pytest.raises(InvalidKey, match="root_dir"):
        office.run(key)
    assert not office.farm.diary


def test_a_node_that_lost_the_shard_prompts_nothing(office):
    """Another epoch has followed."""
    office.run()
    office.store.leases[shard_of("c1", 64)] = 2
    with pytest.raises(NotOwner, match="epoch 1"):
        office.run(turn="t2")
    assert office.farm.prompted == ["do it"]
    assert record(office).turn == ""


def test_a_shard_that_is_lost_before_the_session_is_saved_prompts_nothing(office):
    """The session would be known to nobody."""
    office.farm.opens.shut()
    turn = Aside(office.run)
    wait_until(lambda: office.farm.made, "the agent is being started")
    office.store.leases[shard_of("c1", 64)] = 2
    office.farm.opens.open()
    with pytest.raises(NotOwner):
        turn.result()
    assert not office.farm.prompted
    assert office.pool.get_stats().active_backends == 0


def test_a_store_that_is_away_is_told_as_such(office):
    """Nothing is started for it."""
    office.store.unreachable = BackendUnavailable("no redis", "store", 1.0)
    with pytest.raises(BackendUnavailable, match="no redis"):
        office.run()
    assert not office.farm.made


# -- one at a time


def test_another_turn_of_the_chat_waits_for_its_time_and_no_longer(office):
    """The error says for what; other chats do not wait."""
    with office.turn():
        waited = Aside(lambda: office.run(turn="t2", timeout=0.05))
        with pytest.raises(AcquireTimeout, match=r"another turn of chat 'c1' still runs after 0\.05 s") as caught:
            waited.result()
        assert caught.value.phase == "turn"
        assert Aside(lambda: office.run("c2", "t3", timeout=0.0)).result().prompted
    assert office.farm.prompted == ["do it"]


def test_a_turn_that_waits_begins_when_the_other_has_ended(office):
    """And not before: the record names one turn at a time."""
    office.farm.prompts.shut()
    first = Aside(lambda: office.run(text="first"))
    wait_until(lambda: office.farm.prompted, "the first turn works")
    second = Aside(lambda: office.run(turn="t2", text="second"))
    assert record(office).turn == "t1"
    office.farm.prompts.open()
    first.result()
    second.result()
    assert office.farm.did("begin", "prompt", "finish") == ["begin", "prompt", "finish"] * 2


def test_a_turn_may_wait_without_end(office):
    """``acquire_timeout`` may be a number that no clock can hold."""
    with office.turn():
        waited = Aside(lambda: office.run(turn="t2", timeout=float("inf")))
        waited._thread.join(0.05)
        assert not waited.done
    assert waited.result().id == "t2"


def test_an_interrupt_just_before_the_wait_for_a_chat_is_heard(office):
    """It comes when the wait is announced, and nobody waits yet who could be notified."""

    class Late(threading.Condition):
        def __enter__(self):
            stop.set(TaskCancelled("enough"))
            return super().__enter__()

    office.chats._here.busy.add("c1")
    office.chats._here.free = Late()
    with Interrupt() as stop, pytest.raises(TaskCancelled), office.chats.exclusive("c1", 60.0):
        pass


def test_threads_that_come_first_together_share_one_store_and_one_door(office):
    """A new process gets many tasks at once."""
    entered, hold = threading.Event(), threading.Event()

    def make():
        office.stores_made += 1
        entered.set()
        hold.wait(10)
        return office.store

    office.chats._make_store = make
    with office.chats.exclusive("c1", 0.0):
        asides = [Aside(lambda: office.chats.store) for _ in range(4)]
        assert entered.wait(10)
        asides[0]._thread.join(0.05)
        hold.set()
        assert [aside.result() for aside in asides] == [office.store] * 4
        assert office.stores_made == 1
        with pytest.raises(AcquireTimeout):
            Aside(lambda: office.run(timeout=0.0)).result()


def test_a_forked_child_makes_a_store_of_its_own(office, monkeypatch):
    """Connections of the parent are not for it; nor is its parent's turn."""
    office.run()
    watch = office.chats.watch
    monkeypatch.setattr(module, "fork_count", lambda: 7)
    with office.chats.exclusive("c1", 0.0):
        assert office.chats.store is office.store
        assert office.stores_made == 2
        assert office.chats.watch is not watch
        assert office.chats.watch is office.chats.watch
    assert office.chats.store is office.store
    assert office.stores_made == 2


# -- closing


def test_a_close_ends_everything_in_order(office):
    """Marked first, the live agent told, the pool's backends ended, what is left removed, the record last."""
    office.run()
    office.pool.acquire_backend("c1").release()
    office.farm.diary.clear()
    ended = office.close()
    assert sorted(ended["closed"]) == ["default", "fake"]
    assert (ended["retired"], ended["agents"]) == ([], {"fake": {"session": "deleted"}})
    steps = ("mark_closing", "close_session", "close", "forget", "delete")
    assert office.farm.did(*steps) == list(steps)
    assert office.store.records("c1") == []
    assert office.pool.get_stats().total_backends == 0


def test_a_close_can_be_repeated(office):
    """A second one finds nothing."""
    office.run()
    office.close()
    assert office.close() == {"closed": [], "retired": [], "agents": {}}


def test_a_close_leaves_no_backend_that_it_needed_itself(office):
    """Removing a worktree on a host borrows the chat's backend again."""
    office.farm.borrows_in_forget = True
    office.run()
    office.close()
    assert office.pool.get_stats().total_backends == 0


def test_an_agent_that_is_lost_is_not_told(office):
    """Nor one that never had a session; what it has left is removed all the same."""
    office.run()
    office.pool.peek("c1", "fake").mark_lost()
    assert office.close()["agents"] == {"fake": {"session": "deleted"}}
    assert office.farm.did("close_session", "forget") == ["forget"]
    office.farm.diary.clear()
    office.farm.errors["session"] = lost()
    with pytest.raises(BackendUnavailable):
        office.run()
    office.close()
    assert office.farm.did("close_session", "close", "forget") == ["close", "forget"]


def test_a_session_that_cannot_be_closed_holds_up_nothing(office):
    """It is forgotten with the agent."""
    office.run()
    office.farm.errors["close_session"] = TurnFailed("unknown method")
    office.close()
    assert office.farm.did("forget", "delete") == ["forget", "delete"]


def test_a_close_waits_for_the_running_turn(office):
    """Then it goes on; a turn that takes too long is told as such, and nothing is marked."""
    office.farm.prompts.shut()
    turn = Aside(office.run)
    wait_until(lambda: office.farm.prompted, "the turn works")
    with pytest.raises(AcquireTimeout):
        office.close(timeout=0.0)
    assert record(office).state == "open"
    closing = Aside(office.close)
    office.farm.prompts.open()
    turn.result()
    assert closing.result()["agents"] == {"fake": {"session": "deleted"}}
    assert office.farm.did("finish", "mark_closing") == ["finish", "mark_closing"]


def test_a_close_that_must_wait_for_a_host_raises_and_goes_on_when_repeated(office):
    """The record stays, and says that the chat is closing."""
    office.run()
    office.farm.errors["forget"] = lost(3.0)
    with pytest.raises(BackendUnavailable) as caught:
        office.close()
    assert caught.value.retry_after == 3.0
    assert record(office).state == "closing"
    office.farm.errors.clear()
    assert office.close()["agents"] == {"fake": {"session": "deleted"}}
    assert record(office) is None


def test_a_close_for_which_the_pool_has_no_room_goes_on_when_repeated(office):
    """That passes; the worktree would stay for good."""
    office.run()
    office.farm.errors["forget"] = PoolExhausted("full", "room")
    with pytest.raises(PoolExhausted):
        office.close()
    assert record(office).state == "closing"


@pytest.mark.parametrize("error", [lost(None), PoolError("odd"), ConfigError("bad")], ids=lambda e: type(e).__name__)
def test_what_only_a_person_can_mend_is_told_and_left(error, office, caplog):
    """The record goes: it would be tried for ever."""
    office.run()
    office.farm.errors["forget"] = error
    assert office.close()["agents"] == {"fake": {"error": str(error)}}
    assert record(office) is None
    assert f"chat 'c1', agent 'fake': left behind: {error}" in caplog.text


@pytest.mark.parametrize("error", [NotOwner("lost"), BackendClosed("closed")], ids=lambda e: type(e).__name__)
def test_a_close_that_lost_its_place_leaves_the_record_to_the_next_owner(error, office):
    """The message goes back."""
    office.run()
    office.farm.errors["forget"] = error
    with pytest.raises(type(error)):
        office.close()
    assert record(office).state == "closing"


def test_a_node_that_lost_the_shard_closes_nothing(office):
    """Its warm agent is another's business by now."""
    office.run()
    office.store.leases[shard_of("c1", 64)] = 2
    with pytest.raises(NotOwner):
        office.close()
    assert office.pool.peek("c1", "fake") is not None
    assert office.farm.did("close_session", "close", "forget", "delete") == []


def test_the_record_of_an_agent_that_is_configured_no_more_goes(office):
    """Nobody knows how to remove what it left; that is told. Other agents of the chat are closed as ever."""
    office.run()
    office.store.begin("c1", "retired", 1, "t9")
    ended = office.close()["agents"]
    assert ended["fake"] == {"session": "deleted"}
    assert "there is no agent 'retired'" in ended["retired"]["error"]
    assert office.store.records("c1") == []


def test_all_agents_of_a_chat_are_closed(monkeypatch):
    """Each has a record of its own."""
    office = Office(monkeypatch, ("one", "two"))
    office.run(agent="one")
    office.run(agent="two", turn="t2")
    assert office.close()["agents"] == {"one": {"session": "deleted"}, "two": {"session": "deleted"}}
    assert office.farm.did("forget", "delete") == ["forget", "delete"] * 2
    office.pool.destroy_all(0.0)


def test_a_turn_after_an_interrupted_close_finishes_it_and_begins_anew(office):
    """What was to be closed is closed first; the new chat remembers nothing of it."""
    office.run()
    office.store.mark_closing("c1", 1)
    office.farm.diary.clear()
    turn = office.run(turn="t2")
    assert office.farm.did("begin", "forget", "delete", "open", "prompt") == [
        "begin", "forget", "delete", "begin", "open", "prompt",
    ]  # fmt: skip
    assert turn.session.session_id == record(office).session_id == "s2"
    assert not turn.session.memory_lost
    assert not turn.repeated


def test_without_agents_a_close_is_the_pools(office):
    """And no store is made: there may be none."""
    office.pool.acquire_backend("c1").release()

    def no_store():
        raise AssertionError("a store was made")

    chats = Chats(NO_AGENTS, lambda key: 1, no_store)
    assert chats.close("c1", office.pool, 1.0) == {"closed": ["default"], "retired": []}
    assert chats.close_idle(shard_of("c1", 64), 0.0, office.pool) == []


# -- idle chats


SHARD = shard_of("c1", 64)
OF_SHARD = [key for key in (f"k{number}" for number in range(2000)) if shard_of(key, 64) == SHARD]


def grow_old(office, seconds=100.0):
    office.store.now += seconds


def test_idle_chats_of_the_shard_are_closed(office):
    """Not those that were used, nor those of other shards."""
    old, young = OF_SHARD[:2]
    other = next(f"k{number}" for number in range(99) if shard_of(f"k{number}", 64) != SHARD)
    for number, key in enumerate((old, other)):
        office.run(key, f"t{number}")
    grow_old(office)
    office.run(young, "t9")
    assert office.chats.close_idle(SHARD, 50.0, office.pool) == [old]
    assert [bool(office.store.records(key)) for key in (old, young, other)] == [False, True, True]
    assert office.pool.peek(old, "fake") is None


def test_an_idle_chat_that_has_a_turn_is_spared(office, caplog):
    """A turn may well take longer than a chat may be idle."""
    first, second = OF_SHARD[:2]
    office.run(second, "t2")
    with office.turn(first):
        grow_old(office)
        assert Aside(lambda: office.chats.close_idle(SHARD, 50.0, office.pool)).result() == [second]
    assert office.store.records(first)
    assert not caplog.records  # nothing to wonder at


def test_a_chat_that_became_active_in_between_is_spared(office, monkeypatch):
    """It is looked at again when no turn of it can begin any more."""
    first, second = OF_SHARD[:2]
    office.run(first, "t1")
    office.run(second, "t2")
    grow_old(office)
    find, looks = office.store.idle, []

    def idle(*args):
        found = find(*args)
        looks.append(found)
        if len(looks) == 1:
            office.run(first, "t3")
        return found

    monkeypatch.setattr(office.store, "idle", idle)
    assert office.chats.close_idle(SHARD, 50.0, office.pool) == [second]
    assert looks[0] == [first, second]


def test_an_interrupted_close_is_finished(office):
    """However young the chat is."""
    key = OF_SHARD[0]
    office.run(key)
    office.farm.errors["forget"] = lost(1.0)
    with pytest.raises(BackendUnavailable):
        office.close(key)
    office.farm.errors.clear()
    assert office.chats.close_idle(SHARD, 1e6, office.pool) == [key]
    assert office.store.records(key) == []


@pytest.mark.parametrize(
    "error", [lost(1.0), PoolExhausted("full", "room"), KeyError("odd")], ids=lambda e: type(e).__name__
)
def test_one_chat_that_cannot_be_closed_does_not_keep_the_others(error, office, monkeypatch, caplog):
    """The next pass tries it again."""
    first, second = OF_SHARD[:2]
    office.run(first, "t1")
    office.run(second, "t2")
    grow_old(office)
    forget = office.farm.kind._forget

    async def fail(self, chat: Chat):
        if chat.chat == first:
            raise error
        return await forget(self, chat)

    monkeypatch.setattr(office.farm.kind, "_forget", fail)
    assert office.chats.close_idle(SHARD, 50.0, office.pool) == [second]
    assert record(office, first).state == "closing"
    told = [entry for entry in caplog.records if f"closing the idle chat {first!r} failed" in entry.message]
    assert len(told) == (not isinstance(error, AcquireTimeout))
    assert all(bool(entry.exc_info) == isinstance(error, KeyError) for entry in told)


def test_a_pass_ends_when_the_pool_is_closed(office):
    """The node is shutting down; the next one goes on."""
    office.run(OF_SHARD[0])
    grow_old(office)
    office.farm.errors["forget"] = BackendClosed("closed")
    with pytest.raises(BackendClosed):
        office.chats.close_idle(SHARD, 50.0, office.pool)


def test_a_pass_ends_when_the_shard_was_lost(office):
    """What remains is the next owner's."""
    first, second = OF_SHARD[:2]
    office.run(first, "t1")
    office.run(second, "t2")
    grow_old(office)
    office.store.leases[SHARD] = 2
    with pytest.raises(NotOwner):
        office.chats.close_idle(SHARD, 50.0, office.pool)
    assert office.farm.did("forget") == []


# -- cancelling


def test_a_turn_that_was_asked_to_end_ends(office):
    """By its id, while it works."""
    office.farm.prompts.shut()
    ended = []

    def work():
        with office.turn() as chat:
            ended.append(chat.prompt("do it").stop_reason)

    turn = Aside(work)
    wait_until(lambda: office.farm.prompted, "the turn works")
    assert office.store.request_cancel("c1") == ["t1"]
    turn.result()
    assert ended == ["cancelled"]
    assert record(office).turn == ""


@pytest.mark.parametrize(("before", "after"), [(logging.NOTSET, logging.WARNING), (logging.DEBUG, logging.DEBUG)])
def test_requests_to_a_server_fill_no_log(before, after, office, monkeypatch):
    """Unless somebody wants to see them."""
    monkeypatch.setattr(module, "sweep_leftovers", list)
    requests = logging.getLogger("httpx")
    was = requests.level
    try:
        requests.setLevel(before)
        office.chats.prepare()
        assert requests.level == after
    finally:
        requests.setLevel(was)
