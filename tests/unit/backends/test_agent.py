"""One turn of an agent of whatever kind: how it ends, and what is left of the agent then."""

import asyncio
import logging
import threading

import pytest

from pool.backends.agent import MAX_PROMPT, check_prompt
from pool.chats import Chat
from pool.errors import BackendClosed, BackendUnavailable, ConfigError, TurnFailed, TurnTimeout
from pool.runtime import loop_thread
from tests.support.agents import AgentFarm, Aside
from tests.support.fakes import Gate
from tests.support.waiting import wait_until


@pytest.fixture
def farm():
    farm = AgentFarm()
    farm.says = ["Hello ", "there."]
    yield farm
    for gate in (farm.opens, farm.prompts, farm.cancels):
        gate.open()
    farm.errors.clear()
    for agent in farm.made:
        agent.destroy()


@pytest.fixture
def agent(farm):
    return connected(farm)


def connected(farm, **config):
    agent = farm.kind(chat="c1", **config)
    loop_thread().run(agent.connect())
    return agent


def begun(agent, **options):
    """A turn that works, in a thread of its own."""
    agent.farm.prompts.shut()
    before = len(agent.farm.prompted)
    turn = Aside(lambda: agent.prompt("do it", **options))
    wait_until(lambda: len(agent.farm.prompted) > before or turn.done, "the turn works")
    return turn


def at_rest(agent):
    """Nothing of a turn is left."""
    return not agent.is_busy() and agent.working == 0 and agent._cancel_asked is None


# -- an ordinary end


def test_a_turn_returns_what_the_agent_said(agent):
    """And why it stopped."""
    turn = agent.prompt("do it")
    assert (turn.text, turn.stop_reason) == ("Hello there.", "end_turn")
    assert agent.farm.prompted == ["do it"]
    assert at_rest(agent)


def test_updates_come_in_the_thread_that_waits(agent):
    """Where a task's context is; through the other door, on the pool's event loop."""
    heard = []

    def take(update):
        heard.append((update, threading.current_thread()))

    agent.prompt("do it", take)
    said = [{"type": "text", "text": text} for text in agent.farm.says]
    assert heard == [(update, threading.current_thread()) for update in said]
    heard.clear()
    asyncio.run(agent.aprompt("do it", take))
    assert heard == [(update, loop_thread().thread) for update in said]


def test_both_doors_lead_to_the_same_agent(agent):
    """Each method exists twice."""
    chat = Chat("c1", "fake")
    session = agent.ensure_session(chat)
    again = Chat("c1", "fake", session_id=session.session_id)
    assert asyncio.run(agent.aensure_session(again)) == session
    assert asyncio.run(agent.aprompt("do it")) == agent.prompt("do it")
    asyncio.run(agent.aclose_session(again))
    agent.close_session(again)
    assert agent.farm.did("close_session") == ["close_session"] * 2
    assert agent.forget(again) == {"session": "deleted"}
    agent.dispose()
    assert agent.status == "closed"


@pytest.mark.parametrize("error", [TurnFailed("no"), BackendUnavailable("cut"), ValueError("odd")], ids=repr)
def test_what_a_turn_fails_with_is_raised_as_it_is(error, agent):
    """The next turn begins as if nothing had been."""
    agent.farm.errors["prompt"] = error
    with pytest.raises(type(error)) as caught:
        agent.prompt("do it")
    assert caught.value is error
    assert at_rest(agent)
    agent.farm.errors.clear()
    assert agent.prompt("do it").stop_reason == "end_turn"


# -- cancelled


def test_an_agent_that_obeys_ends_its_turn_and_stays(agent):
    """What it had said is kept."""
    turn = begun(agent)
    assert agent.cancel()
    ended = turn.result()
    assert (ended.stop_reason, ended.text) == ("cancelled", "Hello there.")
    assert agent.usable
    assert not agent.abandoned
    assert at_rest(agent)


def test_a_turn_that_ends_without_a_word_after_a_cancel_was_cancelled(agent):
    """Whatever the agent calls it."""
    agent.farm.says, agent.farm.obeys = [], False
    agent.farm.cancels.shut()
    turn = begun(agent)
    agent.cancel()
    wait_until(lambda: agent.farm.did("cancel"), "the agent is being asked")
    agent.farm.prompts.open()
    agent.farm.cancels.open()
    assert turn.result().stop_reason == "cancelled"


def test_an_agent_that_misses_a_cancel_is_asked_again(agent, monkeypatch):
    """It came before the agent had taken up the prompt."""
    monkeypatch.setattr("pool.backends.agent._ASK_AGAIN", 0.01)
    agent.farm.misses = 2
    turn = begun(agent)
    agent.cancel()
    assert turn.result().stop_reason == "cancelled"
    assert agent.farm.did("cancel") == ["cancel"] * 3
    assert agent.usable


def test_an_agent_that_does_not_obey_is_ended(farm, caplog):
    """After its time: the turn returns, and the pool makes another agent."""
    agent = connected(farm, cancel_timeout=0.05)
    farm.obeys = False
    turn = begun(agent)
    agent.cancel()
    assert turn.result().stop_reason == "cancelled"
    assert agent.abandoned
    assert agent.status == "lost"
    assert "did not end its turn within 0.05 s" in caplog.text
    assert at_rest(agent)


def test_an_agent_that_cannot_be_asked_is_ended(agent):
    """It would work on outside of any turn."""
    agent.farm.errors["cancel"] = TurnFailed("HTTP 404")
    turn = begun(agent)
    agent.cancel()
    assert turn.result().stop_reason == "cancelled"
    assert agent.abandoned
    assert agent.status == "lost"
    assert at_rest(agent)


def test_an_agent_that_cannot_even_be_ended_is_left(farm, caplog):
    """The turn ends all the same."""
    agent = connected(farm, cancel_timeout=0.05)
    farm.obeys, farm.errors["abandon"] = False, OSError("no such process")
    turn = begun(agent)
    agent.cancel()
    assert turn.result().stop_reason == "cancelled"
    assert "no such process" in caplog.text
    assert agent.status == "lost"
    assert at_rest(agent)


@pytest.mark.parametrize(
    "error", [TurnFailed("aborted"), BackendUnavailable("cut"), TimeoutError(), asyncio.CancelledError()], ids=repr
)
def test_a_turn_that_fails_because_it_was_cancelled_was_cancelled(error, agent):
    """An agent may answer with an error; it has ended its turn."""
    agent.farm.errors["prompt"] = error
    turn = begun(agent)
    agent.cancel()
    assert turn.result().stop_reason == "cancelled"
    assert not agent.abandoned
    assert at_rest(agent)


def test_a_turn_that_ends_while_it_is_being_cancelled_ended_as_it_did(agent):
    """Whichever comes first counts."""
    agent.farm.cancels.shut()
    turn = begun(agent)
    agent.cancel()
    wait_until(lambda: agent.farm.did("cancel"), "the agent is being asked")
    agent.farm.prompts.open()
    wait_until(lambda: not agent.working, "the turn has ended")
    agent.farm.cancels.open()
    assert turn.result().stop_reason == "end_turn"
    assert agent.usable
    assert not agent.abandoned


def test_an_agent_whose_turn_has_ended_is_not_ended_for_a_request_that_hangs(farm, caplog):
    """The request to end it was late."""

    class Late(Gate):
        async def passed(self):
            farm.prompts.open()
            await asyncio.Event().wait()

    agent = connected(farm, cancel_timeout=0.1)
    farm.cancels = Late()
    turn = begun(agent)
    agent.cancel()
    assert turn.result().stop_reason == "end_turn"
    assert not agent.abandoned
    assert agent.usable
    assert "did not end its turn" not in caplog.text


def test_a_turn_that_is_cancelled_twice_has_ended_when_that_is_told(agent):
    """As by a soft time limit, and the hard one while the agent is still being asked to stop."""
    agent.farm.prompts.shut()
    agent.farm.cancels.shut()
    call = loop_thread().spawn(agent._turn("do it", None, None, None))
    wait_until(lambda: agent.working, "the turn works")
    call.cancel()
    wait_until(lambda: agent.farm.did("cancel"), "the agent is being asked")
    call.cancel()
    loop_thread().run(asyncio.sleep(0.05))
    assert agent.is_busy()
    agent.farm.cancels.open()
    agent.farm.prompts.open()
    wait_until(lambda: call.done, "the turn has ended")
    assert at_rest(agent)


def test_a_cancel_between_turns_is_none_and_hits_no_later_turn(agent):
    """It says so."""
    assert not agent.cancel()
    agent.prompt("do it")
    assert not asyncio.run(agent.acancel())
    assert agent.prompt("do it").stop_reason == "end_turn"
    assert agent.farm.did("cancel") == []


def test_two_cancels_are_one(agent):
    """The agent is asked once."""
    agent.farm.cancels.shut()
    turn = begun(agent)
    assert agent.cancel()
    assert agent.cancel()
    agent.farm.cancels.open()
    turn.result()
    assert agent.farm.did("cancel") == ["cancel"]


def test_a_cancelled_turn_can_be_followed_by_another(agent):
    """On the same agent, at once."""
    turn = begun(agent)
    agent.cancel()
    turn.result()
    agent.farm.prompts.open()
    assert agent.prompt("go on").stop_reason == "end_turn"


# -- out of time


def test_a_turn_that_takes_too_long_is_cancelled_and_told(agent):
    """With what it was to do, and the end of what came; the agent obeyed, so it stays."""
    agent.farm.prompts.shut()
    agent.farm.says = ["x" * 3000, "the end"]
    with pytest.raises(TurnTimeout, match=r"the turn was cancelled after 0\.02 s: fix  ?the bug") as caught:
        agent.prompt("fix\n the   bug", timeout=0.02)
    assert caught.value.reason == "timeout"
    assert caught.value.tail == "x" * 1993 + "the end"
    assert agent.farm.did("cancel") == ["cancel"]
    assert agent.usable
    assert at_rest(agent)


def test_a_long_prompt_is_told_in_short(agent):
    """80 characters of it."""
    agent.farm.prompts.shut()
    with pytest.raises(TurnTimeout) as caught:
        agent.prompt("y" * 5000, timeout=0.01)
    assert str(caught.value).endswith(": " + "y" * 77 + "...")


def test_an_agent_that_ignores_its_time_out_is_ended(farm):
    """The error is the time-out all the same."""
    agent = connected(farm, cancel_timeout=0.05)
    farm.obeys = False
    farm.prompts.shut()
    with pytest.raises(TurnTimeout):
        agent.prompt("do it", timeout=0.01)
    assert agent.abandoned
    assert agent.status == "lost"
    assert at_rest(agent)


def test_a_turn_within_its_time_is_not_disturbed(agent):
    """Any number of seconds is one."""
    assert agent.prompt("do it", timeout=1e9).stop_reason == "end_turn"
    assert agent.farm.did("cancel") == []


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), "5", True])
def test_a_time_out_is_a_number_of_seconds(timeout, agent):
    """Else nothing is prompted."""
    with pytest.raises(ConfigError, match=r"^timeout=.*must be more than 0, or None for no limit"):
        agent.prompt("do it", timeout=timeout)
    assert agent.farm.prompted == []
    assert at_rest(agent)


@pytest.mark.parametrize("cancel_timeout", [0, -1, "5", None])
def test_the_time_to_obey_is_a_number_of_seconds(cancel_timeout, farm):
    """Told when the agent is made."""
    with pytest.raises(ConfigError, match="cancel_timeout="):
        farm.kind(cancel_timeout=cancel_timeout)


# -- the one who waits goes away


def test_a_turn_whose_awaiting_task_is_cancelled_is_cancelled(agent):
    """And has ended when the task has."""

    async def go_away():
        turn = asyncio.create_task(agent.aprompt("do it"))
        while not agent.farm.prompted:
            await asyncio.sleep(0.001)
        turn.cancel()
        with pytest.raises(asyncio.CancelledError):
            await turn

    agent.farm.prompts.shut()
    asyncio.run(go_away())
    assert agent.farm.did("cancel") == ["cancel"]
    assert at_rest(agent)
    assert agent.usable
    loop_thread().run(again_on_the_pools_own_loop(agent, go_away))


async def again_on_the_pools_own_loop(agent, go_away):
    agent.farm.diary.clear()
    await go_away()
    assert agent.farm.did("cancel") == ["cancel"]
    assert at_rest(agent)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_exception_of_a_follower_ends_the_turn(asynchronous, agent):
    """Whoever follows it sees its own error, and the agent is at rest."""

    def take(update):
        raise ZeroDivisionError("in the follower")

    agent.farm.prompts.shut()
    with pytest.raises(ZeroDivisionError, match="in the follower"):
        if asynchronous:
            asyncio.run(agent.aprompt("do it", take))
        else:
            agent.prompt("do it", take)
    assert agent.farm.did("cancel") == ["cancel"]
    assert at_rest(agent)
    agent.farm.prompts.open()
    assert agent.prompt("do it").stop_reason == "end_turn"


# -- the agent goes away


def test_an_agent_that_is_closed_under_its_turn_says_so(agent):
    """However its own connection breaks."""
    turn = begun(agent)
    agent.destroy()
    with pytest.raises(BackendClosed):
        turn.result()
    assert at_rest(agent)


def test_an_agent_whose_turn_was_torn_down_as_cancelled_says_that_it_was_closed(agent):
    """Some libraries cancel what waits for their connection; nobody has cancelled the turn."""
    agent.farm.errors["prompt"] = asyncio.CancelledError()
    turn = begun(agent)
    agent.destroy()
    with pytest.raises(BackendClosed):
        turn.result()
    assert at_rest(agent)


def test_a_turn_that_was_torn_down_on_a_living_agent_has_failed(agent):
    """It is told as what it is."""
    agent.farm.errors["prompt"] = asyncio.CancelledError()
    with pytest.raises(TurnFailed, match="gave the turn up") as caught:
        agent.prompt("do it")
    assert caught.value.reason == "died"
    assert at_rest(agent)


def test_an_agent_that_is_closed_while_its_turn_is_cancelled_says_so(agent):
    """It is not the cancel that ended the turn."""
    agent.farm.cancels.shut()
    turn = begun(agent)
    agent.cancel()
    wait_until(lambda: agent.farm.did("cancel"), "the agent is being asked")
    agent.destroy()
    agent.farm.cancels.open()
    with pytest.raises(BackendClosed):
        turn.result()


def test_an_agent_that_was_closed_takes_no_turn(agent):
    """Nor does it look for a session."""
    agent.destroy()
    with pytest.raises(BackendClosed):
        agent.prompt("do it")
    with pytest.raises(BackendClosed):
        agent.ensure_session(Chat("c1", "fake"))
    assert agent.farm.did("prompt", "session") == []


def test_a_session_that_fails_because_the_agent_was_closed_says_so(agent):
    """What was closed under it fails in many ways; of one that lives, it is told as it is."""
    agent.farm.errors["session"] = RuntimeError("no pipe")
    with pytest.raises(RuntimeError, match="no pipe"):
        agent.ensure_session(Chat("c1", "fake"))
    asked, ensure = threading.Event(), agent._ensure_session

    async def slowly(chat):
        asked.set()
        while not agent.gone:
            await asyncio.sleep(0.001)
        return await ensure(chat)

    agent._ensure_session = slowly
    session = Aside(lambda: agent.ensure_session(Chat("c1", "fake")))
    assert asked.wait(10)
    agent.destroy()
    with pytest.raises(BackendClosed):
        session.result()


# -- one at a time


def test_a_second_turn_is_refused_and_the_first_goes_on(agent):
    """An agent has one conversation."""
    turn = begun(agent)
    with pytest.raises(ConfigError, match="a turn runs already: one at a time"):
        agent.prompt("and this")
    assert agent.is_busy()
    agent.farm.prompts.open()
    assert turn.result().stop_reason == "end_turn"
    assert agent.farm.prompted == ["do it"]


def test_an_agent_is_busy_while_a_turn_runs(agent):
    """No sweep evicts it then; one holder at a time is all that the pool lets in."""
    assert not agent.is_busy()
    turn = begun(agent)
    assert agent.is_busy()
    agent.cancel()
    turn.result()
    assert not agent.is_busy()
    assert agent.capabilities.max_users == 1


def test_a_turn_leaves_nothing_running(agent):
    """However it ended."""

    async def tasks():
        await asyncio.sleep(0)  # what was cancelled last has ended
        return asyncio.all_tasks() - {asyncio.current_task()}

    before = loop_thread().run(tasks())
    agent.prompt("do it")
    turn = begun(agent)
    agent.cancel()
    turn.result()
    with pytest.raises(TurnTimeout):
        agent.prompt("do it", timeout=0.01)
    assert loop_thread().run(tasks()) <= before


# -- prompts


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "prompt=None: must be text, not NoneType"),
        (b"do it", "must be text, not bytes"),
        (["do it"], "must be text, not list"),
        ("", "prompt is empty"),
        (" \n\t", "prompt is empty"),
        ("x" * (MAX_PROMPT + 1), f"prompt is {MAX_PROMPT + 1} bytes long: at most {MAX_PROMPT} bytes"),
        ("é" * (MAX_PROMPT // 2 + 1), f"prompt is {MAX_PROMPT + 2} bytes long"),
        ("half \ud83d of it", "lone surrogate"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_what_is_no_prompt_reaches_no_agent(prompt, message, agent):
    """The error says what is wrong with it."""
    with pytest.raises(ConfigError, match=message):
        agent.prompt(prompt)
    assert agent.farm.prompted == []
    assert at_rest(agent)


def test_a_prompt_may_be_as_long_as_the_limit():
    """It is returned as it is."""
    for text in ("x" * MAX_PROMPT, "é" * (MAX_PROMPT // 2), " do it "):
        assert check_prompt(text) is text


def test_what_went_wrong_with_a_cancel_is_logged(agent, caplog):
    """For whoever wonders."""
    caplog.set_level(logging.INFO)
    agent.farm.errors["prompt"] = TurnFailed("aborted in a strange way")
    turn = begun(agent)
    agent.cancel()
    turn.result()
    assert "asked to end its turn: aborted in a strange way" in caplog.text
