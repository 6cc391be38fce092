"""The watch for turns that are to be cancelled: it looks while turns run, at those only, and never gives up."""

import asyncio
import threading
from contextlib import ExitStack

import pytest

from pool.worker import cancelling
from pool.worker.cancelling import CancelWatch
from tests.support.waiting import wait_until


class Agent:
    """Takes note of cancels. ``runs``: its turn has begun."""

    def __init__(self, runs=True):
        self.runs = runs
        self.asked = 0
        self.error = None

    async def acancel(self):
        self.asked += 1
        if self.error:
            raise self.error
        return self.runs


class Desk:
    """A store that says which turns were asked to be cancelled, and can be made to wait or fail."""

    def __init__(self):
        self.wanted = set()
        self.looks = []
        self.error = None
        self.inside = self.most_inside = 0
        self.open = threading.Event()
        self.open.set()

    def cancelled(self, turns):
        self.looks.append(set(turns))
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        assert self.open.wait(10)
        self.inside -= 1
        if self.error:
            raise self.error
        return self.wanted & set(turns)

    def next_look(self, number=2):
        """Return when the last of *number* more looks has begun."""
        before = len(self.looks)
        wait_until(lambda: len(self.looks) >= before + number, "another look")


@pytest.fixture
def desk(monkeypatch):
    monkeypatch.setattr(cancelling, "INTERVAL", 0.001)
    return Desk()


@pytest.fixture
def watch(desk):
    return CancelWatch(desk.cancelled)


def stopped(watch):
    wait_until(lambda: not watch._looking, "the watch has stopped")


def test_it_looks_while_a_turn_runs_and_no_longer(desk, watch):
    """The store has better things to do."""
    with watch.watching("t1", Agent()):
        desk.next_look()
    stopped(watch)
    assert set(map(frozenset, desk.looks)) == {frozenset({"t1"})}
    before = len(desk.looks)
    with watch.watching("t2", Agent()):
        desk.next_look(1)
    stopped(watch)
    assert desk.looks[before:] == [{"t2"}] * (len(desk.looks) - before)


def test_one_look_is_for_all_turns(desk, watch):
    """However many run, one question at a time."""
    desk.open.clear()
    with ExitStack() as stack:
        stack.enter_context(watch.watching("t0", Agent()))
        wait_until(lambda: desk.looks, "the first look has begun")
        for number in range(1, 5):
            stack.enter_context(watch.watching(f"t{number}", Agent()))
        cancelling.loop_thread().run(asyncio.to_thread(lambda: None))  # whatever was begun with them has begun
        desk.open.set()
        desk.next_look()
        assert desk.most_inside == 1
        assert desk.looks[-1] == {f"t{number}" for number in range(5)}


def test_only_the_turn_that_was_asked_for_is_cancelled(desk, watch):
    """Its neighbours go on."""
    agents = {name: Agent() for name in ("t1", "t2", "t3")}
    desk.wanted = {"t2", "t9"}
    with ExitStack() as stack:
        for name, agent in agents.items():
            stack.enter_context(watch.watching(name, agent))
        wait_until(lambda: agents["t2"].asked, "the turn is cancelled")
        desk.next_look()
    assert agents["t1"].asked == agents["t3"].asked == 0


def test_a_turn_that_has_ended_meanwhile_is_not_cancelled(desk, watch):
    """By the time the store answers, its agent may work on the next turn of the chat, which nobody wants cancelled."""
    agent = Agent()
    desk.wanted = {"t1"}
    desk.open.clear()
    with watch.watching("t1", agent):
        wait_until(lambda: desk.looks, "the look has begun")
    with watch.watching("t2", agent):
        desk.open.set()
        desk.next_look()
    assert agent.asked == 0


def test_a_failing_store_is_asked_again(desk, watch, caplog):
    """Neither it nor an agent that fails ends the watch."""
    agent = Agent()
    desk.error = ConnectionError("no store")
    with watch.watching("t1", agent):
        desk.next_look()
        assert "looking for turns to cancel: no store" in caplog.text
        desk.error, desk.wanted, agent.error = None, {"t1"}, RuntimeError("odd agent")
        wait_until(lambda: agent.asked > 1, "the agent is asked, and asked again")
        assert "odd agent" in caplog.text


def test_a_turn_is_asked_until_its_prompt_has_begun(desk, watch):
    """The first times there is nothing to cancel."""
    agent = Agent(runs=False)
    desk.wanted = {"t1"}
    with watch.watching("t1", agent):
        wait_until(lambda: agent.asked > 2, "the agent is asked again")


def test_a_turn_that_comes_while_the_last_look_ends_is_looked_after(desk, watch):
    """Whatever the moment: either that look goes on, or another one begins."""
    desk.open.clear()
    with watch.watching("t1", Agent()):
        wait_until(lambda: desk.looks, "the look has begun")
    agent = Agent()
    desk.wanted = {"t2"}
    with watch.watching("t2", agent):
        desk.open.set()
        wait_until(lambda: agent.asked, "the second turn is cancelled")
    stopped(watch)
    with watch.watching("t2", agent):
        before = agent.asked
        wait_until(lambda: agent.asked > before, "so is a third one, after the watch has stopped")


def test_turns_that_come_and_go_are_all_looked_after(desk, watch):
    """Many threads, no turn between two looks forgotten."""
    desk.wanted = {f"t{thread}-{turn}" for thread in range(4) for turn in range(30)}

    def work(thread):
        for turn in range(30):
            agent = Agent()
            with watch.watching(f"t{thread}-{turn}", agent):
                wait_until(lambda: agent.asked, "the turn is cancelled", every=0.0005)
            done.append(turn)

    done = []
    threads = [threading.Thread(target=work, args=(thread,), daemon=True) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(done) == 120
    stopped(watch)
