"""The board of owned shards, the guard that acts on it, and calls to the hub."""

import asyncio
import os
import signal
import threading
import time
from types import SimpleNamespace

import kombu.asynchronous
import pytest

from pool import BackendClosed, BackendPoolManager, MemoryBackend, Settings
from pool.runtime import loop_thread
from pool.sharding.hashing import shard_of
from pool.sharding.ownership import FOREVER, Ownership, now
from pool.worker.bootsteps import ConsumptionStep
from pool.worker.consumption import Consumption
from pool.worker.guard import Guard
from pool.worker.hub import HubCalls
from pool.worker.line import Line
from pool.worker.router import ShardRouter
from tests.support.waiting import wait_until

SHARDS = 8
MINE = next(f"k{number}" for number in range(99) if shard_of(f"k{number}", SHARDS) == 1)
OTHER = next(f"k{number}" for number in range(99) if shard_of(f"k{number}", SHARDS) == 2)


@pytest.fixture
def board():
    board = Ownership(SHARDS)
    board.trust(FOREVER)
    return board


def test_a_shard_is_owned_while_it_is_held_and_trusted(board):
    """Both are needed."""
    assert not board.owns(1)
    board.hold(1, 7)
    assert board.owns(1)
    assert (board.epoch(1), board.epoch(2), board.count) == (7, 0, 1)
    board.trust(now() - 1)
    assert not board.owns(1)
    assert board.remaining() < 0
    board.trust(now() + 60)
    board.drop(1)
    assert not board.owns(1)
    assert 59 < board.remaining() <= 60


def test_a_suspended_shard_may_go_on_but_begin_nothing(board):
    """Until the grace after the trust is over; then as if it had been dropped."""
    board.grace = 30.0
    board.hold(1, 7)
    assert board.may_go_on(1)
    board.trust(now() - 10)
    assert (board.owns(1), board.may_go_on(1)) == (False, True)
    board.suspend(1)
    board.trust(now() + 10)
    assert (board.owns(1), board.may_go_on(1), board.epoch(1)) == (False, True, 0)
    assert (board.count, board.suspended) == (0, 1)
    board.suspend(1)
    assert board.may_go_on(1)
    board.hold(1, 9)
    assert (board.owns(1), board.epoch(1), board.suspended) == (True, 9, 0)
    board.suspend(1)
    board.trust(now() - 31)
    assert not board.may_go_on(1)
    board.trust(now() + 10)
    board.drop(1)
    assert (board.may_go_on(1), board.suspended) == (False, 0)


def test_without_leases_there_is_no_end(board):
    """Static placement."""
    assert board.remaining() is None


def test_epochs_of_sixteen_digits_are_kept_exactly(board):
    """They are microseconds since 1970, and more."""
    board.hold(1, 2**60 + 1)
    assert board.epoch(1) == 2**60 + 1


def test_a_forked_child_sees_what_its_parent_writes(board):
    """Also while the parent does nothing else."""
    heard, said = os.pipe()
    child = os.fork()
    if not child:
        while not board.owns(3):
            time.sleep(0.001)
        os.write(said, b"seen")
        os._exit(0)
    board.hold(3, 5)
    assert os.read(heard, 4) == b"seen"
    os.waitpid(child, 0)
    os.close(heard)
    os.close(said)


@pytest.fixture
def pool():
    pool = BackendPoolManager(MemoryBackend)
    yield pool
    pool.destroy_all(grace=0)


@pytest.fixture
def guard(board, pool):
    board.hold(1, 5)
    board.hold(2, 5)
    guard, line = Guard(board, pool), Line()
    calls = guard.watch(), line.listen({"look": guard.look})
    yield line
    for call in calls:
        call.abandon()
    line.close()


def test_the_guard_closes_backends_of_dropped_shards_and_no_others(board, pool, guard):
    """In use or not; users are told by BackendClosed."""
    with pool.backend(OTHER):
        pass
    borrowed = pool.acquire_backend(MINE)
    board.drop(1)
    guard.wake()
    wait_until(lambda: board.cleared == board.dropped, "the guard has looked")
    with pytest.raises(BackendClosed):
        borrowed.backend.read("x")
    assert pool.peek(MINE) is None
    assert pool.peek(OTHER) is not None
    borrowed.release()
    board.hold(1, 6)
    with pool.backend(MINE) as again:
        assert again is not borrowed.backend


def test_the_guard_acts_on_its_own_when_the_trust_ends(board, pool, guard):
    """Nobody wakes it: the process that should may be stopped."""
    with pool.backend(MINE):
        pass
    board.trust(now() + 0.2)
    guard.wake()
    wait_until(lambda: pool.peek(MINE) is None, "the backend is closed")


def test_the_guard_acts_though_it_began_before_there_was_any_trust(board, pool):
    """As in a prefork child, which is there before the node has joined; nobody tells it of each renewal."""
    board.hold(1, 5)
    board.trust(0.0)
    guard = Guard(board, pool)
    call = guard.watch()
    wait_until(lambda: board.host, "it watches")
    board.trust(now() + 0.6)
    with pool.backend(MINE):
        pass
    wait_until(lambda: pool.peek(MINE) is None, "the backend is closed")
    call.abandon()


def test_the_guard_acts_though_the_trust_ended_while_it_closed_something_else(board, pool, guard, monkeypatch):
    """What it found then was from before that moment."""
    with pool.backend(MINE):
        pass
    expel, looks = pool.aexpel, []

    async def slowly(match):
        gone = await expel(match)
        looks.append(now())
        if len(looks) == 1:
            board.trust(looks[0])
            while now() == looks[0]:
                pass
        return gone

    board.trust(now() + 60)
    monkeypatch.setattr(pool, "aexpel", slowly)
    guard.wake()
    wait_until(lambda: pool.peek(MINE) is None, "the backend is closed")


class Fenced(MemoryBackend):
    """As if its host ended what runs for a newer owner."""

    fenced = True


def test_the_guard_spares_what_is_fenced_for_the_time_of_the_grace(board, pool, guard):
    """Of a shard that is suspended, or that nobody could suspend; a dropped one is over."""
    fenced = Fenced()
    fenced.run_sync(fenced.connect())
    pool.register(MINE, "default", fenced)
    with pool.backend(MINE, agent="bare") as bare:
        pass
    board.grace = 60.0
    board.trust(now() - 0.1)
    guard.wake()
    wait_until(lambda: not bare.usable, "what nobody fences is closed")
    assert fenced.usable
    board.suspend(1)
    guard.wake()
    wait_until(lambda: board.cleared == board.dropped, "the guard has looked")
    assert fenced.usable
    board.drop(1)
    guard.wake()
    wait_until(lambda: not fenced.usable, "the shard is lost")


def test_the_guard_acts_on_its_own_when_the_grace_ends(board, pool, guard):
    """Nobody wakes it."""
    fenced = Fenced()
    fenced.run_sync(fenced.connect())
    pool.register(MINE, "default", fenced)
    board.grace = 0.4
    board.trust(now() + 0.2)
    guard.wake()
    wait_until(lambda: not fenced.usable, "the grace is over")
    assert not board.may_go_on(1)


def test_a_caller_who_waits_for_a_connect_of_a_dropped_shard_is_told(board, pool):
    """BackendClosed, not a backend that nobody may use."""
    connecting, go = threading.Event(), threading.Event()

    class Slow(MemoryBackend):
        async def open(self):
            connecting.set()
            await asyncio.to_thread(go.wait)
            await super().open()

    slow = BackendPoolManager(Slow)
    errors = []

    def ask():
        try:
            slow.acquire_backend(MINE)
        except BackendClosed as error:
            errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    assert connecting.wait(10)
    gone = loop_thread().spawn(slow.aexpel(lambda key, backend: True)).future.result(10)
    thread.join(10)
    go.set()
    assert len(errors) == 1
    assert [identity[0] for identity in gone] == [MINE]
    wait_until(lambda: slow.health()["size"] == 0, "the late connection is closed")
    slow.destroy_all(grace=0)


class Hub:
    """As much of kombu's hub as calls need."""

    def __init__(self):
        self.ready = set()

    def call_soon(self, function):
        self.ready.add(function)

    def _pop_ready(self):
        ready, self.ready = self.ready, set()
        return ready


def test_calls_reach_the_hub_in_order_with_their_results():
    """Those from before the hub was there, too; one that fails disturbs nobody."""
    calls, hub, said = HubCalls(), Hub(), []
    first = calls.post(lambda: said.append(1) or "one")
    calls.attach(hub)
    second = calls.post(lambda: 1 // 0)
    third = calls.post(lambda: said.append(3))
    for function in hub._pop_ready():
        function()
    assert said == [1, 3]
    assert first.result(0) == "one"
    assert isinstance(second.exception(0), ZeroDivisionError)
    assert third.done()


def test_a_hub_that_has_forgotten_its_callbacks_is_reminded():
    """kombu's drops those that were due together with one that fails; Celery then starts its consumer anew."""
    calls, hub, consumption = HubCalls(), kombu.asynchronous.Hub(), Consumption(ShardRouter(Settings(), {}.get))
    calls.attach(hub)
    hub.run_once()
    done = calls.post(lambda: "done")
    hub._pop_ready()  # as it does before it calls them: of what comes after the one that fails, none is left
    consumer = SimpleNamespace(app=SimpleNamespace(warm_pool=SimpleNamespace(calls=calls, consumption=consumption)))
    consumer.task_consumer = SimpleNamespace(channel=None)
    ConsumptionStep(None).start(consumer)
    hub.run_once()
    assert done.result(0) == "done"
    hub.close()


def test_somebody_can_stand_in_for_a_hub_that_does_not_run_any_more():
    """Acknowledgements wait in the hub itself."""
    calls, hub, said = HubCalls(), Hub(), []
    calls.attach(hub)
    hub.call_soon(lambda: said.append("ack"))
    calls.post(lambda: said.append("call"))
    calls.run_everything()
    assert sorted(said) == ["ack", "call"]


def test_a_stopped_process_owns_nothing_when_it_wakes_up(board):
    """SIGSTOP, longer than the trust: the first look says no."""
    heard, said = os.pipe()
    child = os.fork()
    if not child:
        board.trust(now() + 0.3)
        board.hold(1, 5)
        os.write(said, b"1" if board.owns(1) else b"0")
        os.kill(os.getpid(), signal.SIGSTOP)
        os.write(said, b"1" if board.owns(1) else b"0")
        os._exit(0)
    assert os.read(heard, 1) == b"1"
    os.waitpid(child, os.WUNTRACED)
    wait_until(lambda: board.remaining() < 0, "the trust is over")
    os.kill(child, signal.SIGCONT)
    assert os.read(heard, 1) == b"0"
    os.waitpid(child, 0)
    os.close(heard)
    os.close(said)
