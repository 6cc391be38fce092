"""`BackendPoolManager` with a backend whose connects, checks and closes the test holds in its hands."""

import asyncio
import contextlib
import logging
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic
from typing import Any

import psutil
import pytest

import pool as package
from pool import SHARED, BackendPoolManager, MemoryBackend, PoolConfig, PoolStats, interrupt
from pool.backends.output import TAP
from pool.connector import Connector
from pool.errors import (
    AcquireTimeout,
    BackendClosed,
    BackendUnavailable,
    ConfigError,
    InvalidKey,
    PoolError,
    PoolExhausted,
)
from pool.manager import DEFAULT_AGENT
from pool.runtime import loop_thread
from tests.support.fakes import FakeBackend, Farm, TickingFarm
from tests.support.waiting import wait_until

ROOT = Path(package.__file__).parents[1]
Pools = Callable[..., BackendPoolManager[Any]]


@pytest.fixture
def farm() -> Farm:
    return Farm()


@pytest.fixture
def pools(farm: Farm) -> Iterator[Pools]:
    """Makes pools over the farm; after the test they are closed, sound and have leaked nothing."""
    made: list[BackendPoolManager[Any]] = []

    def make(factory: Any = None, **settings: Any) -> BackendPoolManager[Any]:
        settings = {"enable_periodic_cleanup": False, "acquire_timeout": 30.0, **settings}
        made.append(BackendPoolManager(factory or farm, **settings))
        return made[-1]

    yield make
    for gate in (farm.connects, farm.checks, farm.closes):
        gate.open()
    for pool in made:
        with pool._lock:
            pool._life.check_invariants()
        pool.dispose()
        assert pool.get_stats().total_backends == 0
        assert pool.get_stats().waiting == 0
    assert farm.leaked == []


class Crowd:
    """Threads that do the same at the same time; `join` raises what one of them raised."""

    def __init__(self, number: int, work: Callable[[int], Any]) -> None:
        self._start = threading.Barrier(number)
        self._pool = ThreadPoolExecutor(number)
        self._futures = [self._pool.submit(self._run, work, n) for n in range(number)]

    def _run(self, work: Callable[[int], Any], number: int) -> Any:
        self._start.wait(30)
        return work(number)

    def join(self) -> list[Any]:
        try:
            return [future.result(60) for future in self._futures]
        finally:
            self._pool.shutdown()


def in_thread(work: Callable[[], Any]) -> Crowd:
    return Crowd(1, lambda _: work())


def waiting(pool: BackendPoolManager[Any], number: int) -> None:
    wait_until(lambda: pool.get_stats().waiting == number, f"{number} callers wait")


def run_script(text: str, *args: str) -> str:
    """Run a Python script in a process of its own; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", text, *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# -- many callers


def test_two_hundred_threads_share_one_connect(farm, pools):
    """Single flight: one key, one backend, however many ask for it at once."""
    pool = pools()
    farm.connects.shut()
    crowd = Crowd(200, lambda _: pool.acquire_backend("a"))
    waiting(pool, 200)
    farm.connects.open()
    borrowed = crowd.join()
    assert farm.connect_calls == 1
    assert {id(b.backend) for b in borrowed} == {id(farm.made[0])}
    assert pool._life.entries["a", DEFAULT_AGENT].users == 200
    for b in borrowed:
        b.release()
    assert pool.get_stats().idle_backends == 1


def test_the_cap_holds_under_many_threads_and_keys_and_all_are_served(farm, pools):
    """50 threads on 9 keys with room for 4: never more than 4 open, nobody is refused."""
    pool = pools(max_backends=4)

    def work(number: int) -> int:
        dice = random.Random(number)
        for _ in range(10):
            key = dice.choice("abcdefgh") if dice.random() < 0.9 else None
            with pool.backend(key) as backend:
                assert backend.work() == "worked"
                if dice.random() < 0.3:
                    threading.Event().wait(dice.random() / 500)
        return 10

    assert sum(Crowd(50, work).join()) == 500
    assert farm.most_open <= 4
    assert pool.get_stats().active_backends == 0


def test_turns_hold_under_many_threads(pools):
    """A backend for one user at a time is used by one at a time."""
    farm = Farm(max_users=1)
    pool = pools(farm)
    inside = threading.Semaphore(1)

    def work(_: int) -> None:
        for _ in range(20):
            with pool.backend("a"):
                assert inside.acquire(blocking=False), "two users at once"
                inside.release()

    Crowd(20, work).join()
    assert farm.connect_calls == 1


def test_several_event_loops_share_one_backend(farm, pools):
    """An acquire can be awaited on any loop; the connect happens once, on the pool's own."""
    pool = pools()
    farm.connects.shut()

    async def one() -> Any:
        async with pool.abackend("a") as backend:
            return backend

    async def several() -> list[Any]:
        return await asyncio.gather(*(one() for _ in range(10)))

    crowd = Crowd(4, lambda _: asyncio.run(several()))
    waiting(pool, 40)
    farm.connects.open()
    found = [backend for backends in crowd.join() for backend in backends]
    assert found == farm.made * 40


def test_the_pools_own_loop_can_acquire_too(farm, pools):
    """A coroutine on the pool's loop awaits like any other."""
    pool = pools()

    async def use() -> str:
        async with pool.abackend("a") as backend:
            return backend.work()

    assert loop_thread().run(use()) == "worked"


def test_a_blocking_acquire_on_the_pools_loop_is_refused(farm, pools):
    """It would wait for itself; the error says what to call instead."""
    pool = pools(acquire_timeout=1.0)

    async def use() -> None:
        pool.acquire_backend("a")

    with pytest.raises(PoolError, match="await the a"):
        loop_thread().run(use())
    assert farm.made == []


# -- cancellation and time


@pytest.mark.parametrize("phase", ["connect", "room", "turn"])
def test_a_cancelled_task_leaks_nothing_in_any_phase(phase, pools):
    """Neither a waiter nor a backend stays behind, and the next caller is served."""
    farm = Farm(max_users=1)
    pool = pools(farm, max_backends=1)
    holder = None
    if phase == "connect":
        farm.connects.shut()
    else:
        holder = pool.acquire_backend("a")

    async def cancel() -> None:
        task = asyncio.ensure_future(pool.aacquire_backend("b" if phase == "room" else "a"))
        while not pool.get_stats().waiting:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert pool.get_stats().waiting == 0
    farm.connects.open()
    if holder is not None:
        holder.release()
    with pool.backend("b" if phase == "room" else "a") as backend:
        assert backend.work() == "worked"
    wait_until(lambda: pool.get_stats().active_backends == 0, "nobody uses a backend")
    pool.dispose()
    assert farm.leaked == []


@pytest.mark.parametrize("steps", range(7))
def test_a_cancellation_at_the_moment_of_the_grant_is_not_swallowed(steps, farm, pools):
    """A task that could be cancelled is cancelled, and what it was granted goes back."""
    pool = pools()

    async def race() -> None:
        farm.connects.shut()
        task = asyncio.ensure_future(pool.aacquire_backend("a"))
        await asyncio.sleep(0)
        farm.connects.open()
        while not pool.get_stats().active_backends:  # spins, so that the grant's wake-up is still to come
            pass
        for _ in range(steps):
            await asyncio.sleep(0)
        if task.cancel():
            await asyncio.wait({task})
            assert task.cancelled()
        else:
            task.result().release()

    asyncio.run(race())
    wait_until(lambda: pool.get_stats().active_backends == 0, "nobody uses a backend")


class Interrupted(BaseException):
    """As KeyboardInterrupt, but pytest does not know it."""


@pytest.mark.parametrize("phase", ["connect", "room", "turn"])
def test_an_exception_from_a_signal_gives_up_the_wait(phase, pools):
    """Ctrl-C or a soft time limit in the waiting thread: it leaves, and nothing is left behind."""
    farm = Farm(max_users=1)
    pool = pools(farm, max_backends=1)
    if phase == "connect":
        farm.connects.shut()
    else:
        holder = pool.acquire_backend("a")
    main = threading.get_ident()

    def interrupt(*_: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:

        def kill() -> None:
            waiting(pool, 1)
            if phase == "connect":
                farm.wait_for_connects(1)
            signal.pthread_kill(main, signal.SIGUSR1)

        killer = in_thread(kill)
        with pytest.raises(Interrupted):
            pool.acquire_backend("b" if phase == "room" else "a")
        killer.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert pool.get_stats().waiting == 0
    farm.connects.open()
    if phase != "connect":
        holder.release()
    wait_until(lambda: pool.get_stats().idle_backends == 1, "the backend is idle")
    pool.dispose()
    assert farm.leaked == []


def test_what_a_task_causes_is_apart_from_it(pools):
    """Its interrupt and its output are its own: a connect, a close and the reaper serve others, and live longer."""
    seen = []

    class Seen(FakeBackend):
        async def open(self) -> None:
            seen.append((interrupt._CURRENT.get(), TAP.get()))
            await super().open()

        async def close(self) -> None:
            seen.append((interrupt._CURRENT.get(), TAP.get()))
            await super().close()

    farm = Farm()
    pool = pools(lambda **config: Seen(farm, config), idle_timeout=0.01, cleanup_interval=0.01)
    token = TAP.set(lambda *_: None)
    try:
        with interrupt.Interrupt():
            pool.acquire_backend("a").release()
            pool.start_reaper()
    finally:
        TAP.reset(token)
    wait_until(lambda: len(seen) == 2, "the reaper has evicted it")
    assert seen == [(None, None)] * 2


def test_a_sweep_that_is_interrupted_has_swept(farm, pools):
    """What it has decided is done, though nobody waits for it."""
    pool = pools(idle_timeout=10.0)
    pool.acquire_backend("a").release()
    with interrupt.Interrupt() as stop:
        stop.set(Interrupted())
        with pytest.raises(Interrupted):
            pool.sweep(monotonic() + 60)
    wait_until(lambda: pool.get_stats().total_backends == 0, "its place is free")
    assert farm.leaked == []


def test_what_is_expelled_while_it_connects_is_gone(farm, pools):
    """Nothing of it works beside the next owner."""
    pool = pools()
    farm.connects.shut()
    errors = []

    def ask() -> None:
        try:
            pool.acquire_backend("a")
        except BackendClosed as error:
            errors.append(error)

    thread = in_thread(ask)
    farm.wait_for_connects(1)
    assert loop_thread().run(pool.aexpel(lambda *_: True)) == [("a", DEFAULT_AGENT)]
    assert farm.leaked == []
    thread.join()
    assert len(errors) == 1
    wait_until(lambda: pool.get_stats().total_backends == 0, "its place is free")


def test_all_that_makes_way_is_closed_though_the_connect_is_given_up(farm):
    """They are in the pool no more: nobody else would."""
    victims = tuple(farm() for _ in range(2))

    async def main() -> None:
        for victim in victims:
            await victim.connect()
        connector: Connector[Any] = Connector(farm, PoolConfig)
        farm.closes.shut()
        making = asyncio.create_task(connector.make_way(victims))
        while not victims[0].close_calls:
            await asyncio.sleep(0.001)
        making.cancel()
        farm.closes.open()
        with pytest.raises(asyncio.CancelledError):
            await making

    asyncio.run(main())
    assert farm.leaked == []


def test_an_exception_from_a_signal_has_a_close_counted_once(farm, pools, monkeypatch):
    """It comes between the step and the note that it is done."""
    pool = pools(max_backends=2)
    borrowed = pool.acquire_backend(None)
    spawn, destroy, closed = loop_thread().spawn, pool._connector.destroy, []

    async def counted(backend: Any) -> None:
        await destroy(backend)
        closed.append(backend)

    monkeypatch.setattr(pool._connector, "destroy", counted)

    def interrupted(coroutine: Any) -> None:
        monkeypatch.setattr(loop_thread(), "spawn", spawn)
        spawn(coroutine)
        raise Interrupted

    monkeypatch.setattr(loop_thread(), "spawn", interrupted)
    with pytest.raises(Interrupted):
        borrowed.release()
    wait_until(lambda: len(closed) == 2, "it was closed twice")
    loop_thread().run(asyncio.sleep(0))
    assert pool._life.groups.closing == 0


def test_an_exception_from_a_signal_keeps_nothing_from_being_done(farm, pools, monkeypatch):
    """It may come before the first connect is begun: the next one who asks gets its backend all the same."""
    pool = pools()
    carry_out = pool._carry_out

    def interrupted(effects: Any) -> None:
        monkeypatch.setattr(pool, "_carry_out", carry_out)
        raise Interrupted

    monkeypatch.setattr(pool, "_carry_out", interrupted)
    with pytest.raises(Interrupted):
        pool.acquire_backend("a")
    with pool.backend("a") as backend:
        assert backend.work() == "worked"
    assert len(farm.made) == 1


def test_an_exception_from_a_signal_has_nothing_done_twice(farm, pools, monkeypatch):
    """It may come between a step and the note that it is done."""
    pool = pools()
    spawn = loop_thread().spawn

    def interrupted(coroutine: Any) -> None:
        monkeypatch.undo()
        spawn(coroutine)
        raise Interrupted

    monkeypatch.setattr(loop_thread(), "spawn", interrupted)
    farm.connects.shut()
    with pytest.raises(Interrupted):
        pool.acquire_backend("a")
    farm.wait_for_connects(1)
    loop_thread().run(asyncio.sleep(0))  # what else was begun has begun to connect, too
    farm.connects.open()
    wait_until(lambda: pool.get_stats().idle_backends == 1, "the backend is idle")
    with pool.backend("a") as backend:
        assert backend.work() == "worked"
    assert len(farm.made) == 1


def test_an_exception_from_a_signal_before_the_wait_leaves_no_waiter_behind(farm, pools, monkeypatch):
    """It may come as soon as the request is queued."""
    pool = pools()
    carry_out = pool._carry_out

    def interrupted(effects: Any) -> None:
        monkeypatch.setattr(pool, "_carry_out", carry_out)
        carry_out(effects)
        raise Interrupted

    monkeypatch.setattr(pool, "_carry_out", interrupted)
    with pytest.raises(Interrupted):
        pool.acquire_backend("a")
    wait_until(lambda: pool.get_stats().idle_backends == 1, "the backend is idle")
    assert pool.get_stats().active_backends == 0


def test_a_waiter_whose_loop_was_closed_gives_back(farm, pools):
    """Its wake-up finds nobody; the backend is free for others."""
    pool = pools()
    farm.connects.shut()
    loop = asyncio.new_event_loop()
    task = loop.create_task(pool.aacquire_backend("a"))
    loop.run_until_complete(asyncio.sleep(0))
    waiting(pool, 1)
    loop.close()
    farm.connects.open()
    wait_until(lambda: pool.get_stats().idle_backends == 1, "the backend is idle")
    task._log_destroy_pending = False
    coroutine = task.get_coro()
    with contextlib.suppress(RuntimeError):
        coroutine.close()


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("phase", ["connect", "room", "turn"])
def test_an_acquire_ends_after_its_timeout_and_names_the_phase(phase, asynchronous, pools):
    """Connect and turn: AcquireTimeout; room: PoolExhausted; each with counts."""
    farm = Farm(max_users=1)
    pool = pools(farm, max_backends=1)
    holder = None
    if phase == "connect":
        farm.connects.shut()
    else:
        holder = pool.acquire_backend("a")
    pool.configure(acquire_timeout=0.05)
    key = "b" if phase == "room" else "a"
    with pytest.raises(PoolExhausted if phase == "room" else AcquireTimeout) as caught:
        if asynchronous:
            asyncio.run(pool.aacquire_backend(key))
        else:
            pool.acquire_backend(key)
    assert caught.value.phase == phase
    assert caught.value.counts["total"] == 1
    assert caught.value.counts["waiting"] == 0
    farm.connects.open()
    if holder is not None:
        holder.release()


@pytest.mark.parametrize("timeout", [float("inf"), 1e12])
def test_an_endless_acquire_timeout_waits(timeout, farm, pools):
    """More seconds than the platform can count mean: as long as it takes."""
    pool = pools(acquire_timeout=timeout)
    with pool.backend("a") as backend:
        assert backend.work() == "worked"
    pool.destroy_all(grace=timeout)


def test_a_connect_that_hangs_ends_in_a_timeout_and_is_closed(farm, pools):
    """The half-made backend is destroyed by who made it; the error has a reason."""
    farm.connects.shut()
    pool = pools(settings=PoolConfig(connect_timeout=0.05))
    with pytest.raises(BackendUnavailable, match=r"no connection within 0\.05 s") as caught:
        pool.acquire_backend("a")
    assert caught.value.reason == "timeout"
    assert caught.value.retry_after is not None
    assert farm.leaked == []
    assert pool.get_stats().total_backends == 0


@pytest.mark.parametrize("error", [ValueError("odd"), RuntimeError(), OSError(111, "refused"), KeyError("x")])
def test_any_exception_of_a_connect_becomes_backend_unavailable(error, farm, pools):
    """Its type and text are told, it is the cause, and nothing stays open."""
    farm.connect_error = error
    pool = pools()
    with pytest.raises(BackendUnavailable) as caught:
        pool.acquire_backend("a")
    assert caught.value.reason == "setup"
    assert caught.value.__cause__ is error
    assert type(error).__name__ in str(caught.value)
    assert farm.leaked == []
    assert pool.get_stats().connect_failures == 1


def test_a_factory_that_raises_fails_the_acquire(pools):
    """A wrong config reaches the caller."""
    pool = pools(MemoryBackend, default_config={"colour": "red"})
    with pytest.raises(BackendUnavailable, match="colour"):
        pool.acquire_backend("a")


def test_a_pool_error_of_a_connect_arrives_as_it_is(farm, pools):
    """Nothing is wrapped that is the pool's own already."""
    farm.connect_error = ConfigError("field 'host': missing")
    pool = pools()
    with pytest.raises(ConfigError, match="field 'host': missing"):
        pool.acquire_backend("a")


def test_a_failed_connect_is_remembered(farm, pools):
    """The second caller hears of it without a connect of its own."""
    farm.connect_error = BackendUnavailable("down", "refused", 0.0)
    pool = pools(settings=PoolConfig(backoff_base=30.0))
    for _ in range(2):
        with pytest.raises(BackendUnavailable) as caught:
            pool.acquire_backend("a")
        assert caught.value.retry_after > 10
    assert farm.connect_calls == 1
    assert pool.get_stats().failures == {"refused": 1}


def test_a_backend_that_is_lost_is_replaced(farm, pools):
    """The next caller gets a new one; the old one is closed."""
    pool = pools()
    with pool.backend("a") as old:
        pass
    old._set_status("lost")
    with pool.backend("a") as new:
        assert new is not old
    wait_until(lambda: old.closed, "the lost one is closed")


def test_a_long_idle_backend_is_checked_and_kept(farm, pools):
    """A check that passes costs no connect."""
    pool = pools(settings=PoolConfig(check_after=0.0))
    with pool.backend("a"):
        pass
    borrowed = pool.acquire_backend("a")
    assert borrowed.warm
    assert (farm.check_calls, farm.connect_calls) == (1, 1)
    borrowed.release()


@pytest.mark.parametrize("how", ["raises", "hangs"])
def test_a_backend_that_fails_its_check_is_replaced(how, farm, pools):
    """The dead one is closed before the new one comes; the caller notices nothing but the time."""
    pool = pools(max_backends=1, settings=PoolConfig(check_after=0.0, connect_timeout=0.5))
    with pool.backend("a"):
        pass
    if how == "raises":
        farm.check_error = OSError("gone")
    else:
        farm.checks.shut()
    borrowed = pool.acquire_backend("a")
    assert not borrowed.warm
    assert borrowed.backend is farm.made[1]
    assert farm.made[0].closed
    assert farm.most_open == 1
    borrowed.release()


# -- closing one


def test_a_close_that_fails_is_logged_and_frees_the_place(farm, pools, caplog):
    """One bad backend does not shrink the pool."""
    pool = pools(max_backends=1)
    farm.close_error = OSError("stuck")
    with pool.backend(None):
        pass
    wait_until(lambda: pool.get_stats().total_backends == 0, "its place is free")
    assert "closing <FakeBackend closed> failed" in caplog.text
    farm.close_error = None
    with pool.backend("a"):
        pass
    farm.made[0].closed = True


def test_a_close_that_lets_a_cancellation_out_frees_the_place(farm, pools, caplog):
    """``task.cancel(); await task`` in a close raises CancelledError: nobody cancelled the pool."""
    pool = pools(max_backends=1)
    farm.close_error = asyncio.CancelledError()
    with pool.backend(None):
        pass
    wait_until(lambda: pool.get_stats().total_backends == 0, "its place is free")
    farm.made[0].closed = True
    with pool.backend("a"):
        pass
    with pool.backend("b"):  # a is its victim, closed in the same connect
        pass
    farm.made[1].closed = True
    assert caplog.text.count("failed") == 2
    farm.close_error = None


def test_a_close_that_hangs_is_given_up_after_its_timeout(farm, pools, caplog):
    """``close_timeout`` bounds it, and the place is free."""
    pool = pools(max_backends=1, settings=PoolConfig(close_timeout=0.05))
    farm.closes.shut()
    with pool.backend(None):
        pass
    with pool.backend("a") as backend:
        assert backend.work() == "worked"
    assert "closing <FakeBackend closed> failed" in caplog.text
    farm.closes.open()
    farm.made[0].closed = True


def test_a_victim_is_gone_before_the_next_backend_opens(farm, pools):
    """The remote side never sees more than ``max_backends``."""
    pool = pools(max_backends=1)
    for key in "abab":
        with pool.backend(key):
            pass
    assert farm.most_open == 1
    assert pool.get_stats().evicted_lru == 3


def test_a_cancelled_close_key_still_closes(farm, pools):
    """Only the waiting is cancelled: the backend goes, and its place is free."""
    pool = pools(max_backends=1)
    with pool.backend("a") as backend:
        pass
    farm.closes.shut()

    async def cancel() -> None:
        task = asyncio.ensure_future(pool.aclose_key("a"))
        while not backend.close_calls:
            await asyncio.sleep(0.001)
        task.cancel()
        done, _ = await asyncio.wait({task}, timeout=5)
        assert done

    asyncio.run(cancel())
    farm.closes.open()
    wait_until(lambda: backend.closed, "it is closed")
    wait_until(lambda: pool.get_stats().total_backends == 0, "its place is free")


# -- config


class Curious(FakeBackend):
    """Looks at what the pool told it, while it connects."""

    async def open(self):
        self.told = (self.pool_key, self.open_clock is not None and not self.open_clock.expired())
        await super().open()


def test_a_backend_knows_its_key_and_the_limit_of_its_connect(farm, pools):
    """Whoever connects can be fair between keys, and have the limit stand still; afterwards there is none."""
    pool = pools(lambda **config: Curious(farm, config))
    with pool.backend("u1") as backend, pool.backend(None) as keyless:
        assert (backend.told, keyless.told) == (("u1", True), ("", True))
        assert backend.open_clock is None


def test_a_config_is_laid_over_the_default(farm, pools):
    """default_config, then config_for, then the caller's."""
    pool = pools(
        default_config={"a": 1, "b": 1, "c": 1},
        config_for=lambda primary, agent: {"b": 2, "c": 2, "who": (primary, agent)},
    )
    with pool.backend("k", "x", {"c": 3}) as backend:
        assert backend.config == {"a": 1, "b": 2, "c": 3, "who": ("k", "x")}


@pytest.mark.parametrize("config", [None, {}, {"host": "one"}])
def test_the_same_effective_config_reuses_the_backend(config, farm, pools):
    """None, an empty one, or what is the default anyway."""
    pool = pools(default_config={"host": "one"})
    with pool.backend("a"):
        pass
    borrowed = pool.acquire_backend("a", config=config)
    assert borrowed.warm
    borrowed.release()
    assert farm.connect_calls == 1


def test_a_different_config_is_not_ignored(farm, pools):
    """The old backend's user finishes; the caller gets what it asked for; then the old one is closed."""
    pool = pools(default_config={"host": "one"})
    with pool.backend("a") as old:
        with pool.backend("a", config={"host": "two"}) as new:
            assert new.config == {"host": "two"}
            assert old.work() == "worked"
            assert pool.get_stats().retired == 1
        with pool.backend("a", config={"host": "two"}) as again:
            assert again is new
    wait_until(lambda: old.closed, "the old one is closed")
    assert not new.closed


def test_changing_the_callers_dict_afterwards_changes_nothing(farm, pools):
    """The pool keeps a copy."""
    pool = pools()
    config = {"n": 1}
    with pool.backend("a", config=config):
        config["n"] = 2
    assert pool.acquire_backend("a", config={"n": 1}).release() is None
    assert farm.connect_calls == 1


def test_an_error_of_config_for_reaches_the_caller(farm, pools):
    """No rule fits the key: nothing is queued."""

    def refuse(primary: str, agent: str) -> dict[str, Any]:
        raise ConfigError(f"no [[match]] fits key {primary!r}")

    pool = pools(config_for=refuse)
    with pytest.raises(ConfigError, match="'a'"):
        pool.acquire_backend("a")
    assert pool.get_stats().waiting == 0


# -- the doors


def test_warm_tells_whether_the_backend_was_there(farm, pools):
    """False for who made it, true for the next."""
    pool = pools()
    first = pool.acquire_backend("a")
    second = pool.acquire_backend("a")
    assert (first.warm, second.warm) == (False, True)
    first.release()
    second.release()


def test_the_doors_give_the_backend_and_take_it_back(farm, pools):
    """``backend``, ``with_backend``, ``abackend`` and the handle as a context manager."""
    pool = pools()
    with pool.backend("a") as backend:
        assert pool.get_stats().active_backends == 1
    assert pool.with_backend("a", lambda given: (given is backend, pool.get_stats().active_backends)) == (True, 1)

    async def use() -> bool:
        async with pool.abackend("a") as given:
            return given is backend and pool.get_stats().active_backends == 1

    assert asyncio.run(use())
    with pool.acquire_backend("a") as borrowed:
        assert borrowed.backend is backend
    assert pool.get_stats().active_backends == 0


@pytest.mark.parametrize("door", ["backend", "with_backend", "abackend"])
def test_the_doors_give_back_when_the_block_raises(door, farm, pools):
    """And the exception passes."""
    pool = pools()

    def fail(_: Any) -> None:
        raise ZeroDivisionError

    async def block() -> None:
        async with pool.abackend("a") as backend:
            fail(backend)

    with pytest.raises(ZeroDivisionError):
        if door == "backend":
            with pool.backend("a") as backend:
                fail(backend)
        elif door == "with_backend":
            pool.with_backend("a", fail)
        else:
            asyncio.run(block())
    assert pool.get_stats().idle_backends == 1


def test_a_second_release_does_nothing(farm, pools):
    """It does not give back what somebody else holds."""
    pool = pools()
    first, second = pool.acquire_backend("a"), pool.acquire_backend("a")
    first.release()
    first.release()
    assert pool.get_stats().active_backends == 1
    second.release()
    assert pool.get_stats().idle_backends == 1


def test_a_keyless_backend_is_fresh_and_closed_at_release(farm, pools):
    """Nobody else ever sees it."""
    pool = pools()
    with pool.backend(None) as first, pool.backend(None) as second:
        assert first is not second
        assert pool.get_stats().backends_by_key == {}
    wait_until(lambda: first.closed and second.closed, "both are closed")
    assert pool.get_stats().total_backends == 0


@pytest.mark.parametrize("key", ["", 5, b"a", "a\nb", "x" * 257, "\x00shared2", ["a"], {}, True])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_unusable_key_is_refused(key, asynchronous, farm, pools):
    """Whatever it is, the answer is InvalidKey."""
    pool = pools()
    with pytest.raises(InvalidKey):
        if asynchronous:
            asyncio.run(pool.aacquire_backend(key))
        else:
            pool.acquire_backend(key)
    assert farm.made == []


def test_a_shared_backend_survives_the_close_of_a_key(farm, pools):
    """It lives under a primary that no key can be."""
    pool = pools()
    with pool.backend(SHARED, "server") as shared, pool.backend("a"):
        pass
    pool.close_key("a")
    assert not shared.closed
    assert pool.peek(SHARED, "server") is shared


def test_a_backend_class_that_cannot_be_called_is_refused():
    """At once, not at the first acquire."""
    with pytest.raises(ConfigError, match="backend_class='ssh'"):
        BackendPoolManager("ssh")  # type: ignore[arg-type]


# -- looking after it


def test_get_marks_as_used_and_peek_does_not(farm, pools):
    """The one that was only peeked at is evicted first."""
    pool = pools(max_backends=2)
    for key in "ab":
        with pool.backend(key):
            pass
    assert pool.peek("a") is farm.made[0]
    assert pool.get("a") is farm.made[0]
    assert pool.get("zzz") is None
    assert pool.peek("a", "other agent") is None
    with pool.backend("c"):
        pass
    assert pool.get_stats().backends_by_key == {"a": 1, "c": 1}


def test_touch_marks_as_used(farm, pools):
    """Also when nothing is there."""
    pool = pools(max_backends=2)
    for key in "ab":
        with pool.backend(key):
            pass
    pool.touch("a")
    pool.touch("nobody")
    with pool.backend("c"):
        pass
    assert pool.get_stats().backends_by_key == {"a": 1, "c": 1}


def test_register_adopts_a_connected_backend(farm, pools):
    """It is warm for the next caller, and closed with the pool."""
    pool = pools()
    backend = farm()
    loop_thread().run(backend.connect())
    pool.register("a", DEFAULT_AGENT, backend)
    with pool.acquire_backend("a") as borrowed:
        assert borrowed.backend is backend
        assert borrowed.warm
    pool.dispose()
    assert backend.closed


def test_stats_and_health_count_what_there_is(farm, pools):
    """A frozen snapshot with documented fields."""
    pool = pools()
    with pool.backend("a"), pool.backend("a", "x"), pool.backend("b"), pool.backend(None):
        with pool.backend("b"):
            pass
        stats = pool.get_stats()
        assert pool.health() == {"size": 4, "busy": 4}
    assert isinstance(stats, PoolStats)
    assert (stats.total_backends, stats.active_backends, stats.idle_backends) == (4, 4, 0)
    assert stats.backends_by_key == {"a": 2, "b": 1}
    assert (stats.connects, stats.hits, stats.waiting, stats.connecting) == (4, 1, 0, 0)
    assert stats.oldest_busy >= 0
    with pytest.raises(AttributeError):
        stats.hits = 3  # type: ignore[misc]
    assert "busy" in repr(pool)


def test_configure_lets_in_who_waits_for_room(farm, pools):
    """A raised cap is felt at once."""
    pool = pools(max_backends=1)
    holder = pool.acquire_backend("a")
    crowd = in_thread(lambda: pool.acquire_backend("b").release())
    waiting(pool, 1)
    pool.configure(max_backends=2)
    crowd.join()
    holder.release()


@pytest.mark.parametrize("changes", [{"max_backends": 0}, {"colour": "red"}])
def test_configure_refuses_what_breaks_a_rule(changes, farm, pools):
    """And changes nothing."""
    pool = pools(max_backends=3)
    with pytest.raises(ConfigError):
        pool.configure(**changes)
    assert pool._life.config.max_backends == 3


def test_a_sweep_evicts_exactly_what_is_due(farm, pools):
    """By the clock that it is given; gone when it returns."""
    pool = pools(idle_timeout=100.0)
    with pool.backend("busy"):
        for key in "abc":
            with pool.backend(key):
                pass
        assert pool.sweep(monotonic() + 50) == []
        assert pool.sweep(monotonic() + 101) == [(key, DEFAULT_AGENT) for key in "abc"]
        assert [backend.closed for backend in farm.made] == [False, True, True, True]
        assert pool.get_stats().evicted_idle == 3


def test_a_sweep_spares_a_backend_that_works_for_nobody(farm, pools):
    """It says that it is busy, so it is not evicted."""
    pool = pools(idle_timeout=1e-9)
    with pool.backend("a") as backend:
        backend.working = True
    assert pool.sweep() == []
    backend.working = False
    assert pool.sweep() == [("a", DEFAULT_AGENT)]


def test_a_sweep_can_be_awaited_on_any_loop(farm, pools):
    """`asweep` does the same."""
    pool = pools(idle_timeout=100.0)
    with pool.backend("a"):
        pass
    assert asyncio.run(pool.asweep(monotonic() + 101)) == [("a", DEFAULT_AGENT)]


def test_idle_keys_are_those_all_of_whose_backends_rest(farm, pools):
    """One busy backend keeps its key; shared ones are never named."""
    pool = pools()
    for key, agent in (("b", "x"), ("a", "x"), ("a", "y"), (SHARED, "x"), ("c", "x")):
        with pool.backend(key, agent):
            pass
    with pool.backend("c", "y"):
        assert pool.idle_keys(0.0) == ["a", "b"]
        assert pool.idle_keys(1000.0) == []


def test_close_key_closes_what_is_idle_and_retires_what_is_busy(farm, pools):
    """It tells which agents; the closed ones are gone when it returns."""
    pool = pools()
    with pool.backend("a", "idle") as idle, pool.backend("b") as other:
        pass
    with pool.backend("a", "busy") as busy:
        assert pool.close_key("a") == {"closed": ["idle"], "retired": ["busy"]}
        assert idle.closed
        assert not busy.closed
        assert busy.work() == "worked"
    wait_until(lambda: busy.closed, "the busy one is closed after its release")
    assert not other.closed
    assert pool.close_key("a") == {"closed": [], "retired": []}


def test_every_sweep_lets_backends_look_after_themselves(pools):
    """Those that want to, adopted ones too, until they are closed: by a release, by the cap, by anything."""
    farm = TickingFarm()
    pool = pools(farm, max_backends=2)
    for key in "abc":  # c's place was a's
        with pool.backend(key):
            pass
    pool.sweep()
    assert farm.ticks == 2
    adopted = farm()
    loop_thread().run(adopted.connect())
    pool.register("b", DEFAULT_AGENT, adopted)
    wait_until(lambda: farm.made[1].closed, "the former b is closed")
    pool.sweep()
    assert farm.ticks == 4
    pool.dispose()
    assert not pool._connector._watched


def test_a_failing_health_check_stops_no_sweep(pools, caplog, monkeypatch):
    """It is logged; the eviction goes on."""
    farm = TickingFarm()
    pool = pools(farm, idle_timeout=100.0)
    with pool.backend("a") as backend:
        pass
    monkeypatch.setattr(type(backend), "tick_health", lambda self, now: 1 / 0)
    assert pool.sweep(monotonic() + 101) == [("a", DEFAULT_AGENT)]
    assert "health check" in caplog.text


# -- the reaper


def test_the_reaper_sweeps_on_its_own(farm, pools):
    """From the first acquire on."""
    pool = pools(enable_periodic_cleanup=True, idle_timeout=0.01, cleanup_interval=0.01)
    with pool.backend("a") as backend:
        pass
    wait_until(lambda: backend.closed, "the reaper has evicted it")


def test_the_reaper_goes_on_after_a_sweep_that_failed(farm, pools, monkeypatch, caplog):
    """One failure is not the last sweep."""
    pool = pools(idle_timeout=0.01, cleanup_interval=0.01)
    sweep, calls = pool._life.sweep, []

    def failing(*args: Any) -> Any:
        calls.append(args)
        if len(calls) < 3:
            raise ZeroDivisionError
        return sweep(*args)

    monkeypatch.setattr(pool._life, "sweep", failing)
    with pool.backend("a") as backend:
        pass
    pool.start_reaper()
    wait_until(lambda: backend.closed, "the third sweep has evicted it")
    assert caplog.text.count("sweep failed") == 2


def reapers(pool: BackendPoolManager[Any]) -> int:
    """How many of the pool's there are; one of an earlier test's may be about to end."""

    def is_one(coroutine: Any) -> bool:
        frame = coroutine.cr_frame
        return "_reap" in repr(coroutine) and frame is not None and frame.f_locals.get("self") is pool

    async def count() -> int:
        return sum(is_one(task.get_coro()) for task in asyncio.all_tasks())

    return loop_thread().run(count())


def test_many_first_acquires_start_one_reaper(farm, pools):
    """And closing the pool ends it."""
    pool = pools(enable_periodic_cleanup=True)
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        Crowd(50, lambda n: pool.acquire_backend(f"k{n}").release()).join()
    finally:
        sys.setswitchinterval(switch)
    assert reapers(pool) == 1
    pool.dispose()
    wait_until(lambda: not reapers(pool), "the reaper has ended")
    pool.start_reaper()
    assert not reapers(pool)


def test_a_stopped_reaper_stays_stopped(farm, pools):
    """Until somebody starts it; acquires do not."""
    pool = pools(enable_periodic_cleanup=True)
    pool.acquire_backend("a").release()
    pool.stop_reaper()
    wait_until(lambda: not reapers(pool), "the reaper has ended")
    pool.acquire_backend("b").release()
    assert not reapers(pool)
    pool.start_reaper()
    pool.start_reaper()
    assert reapers(pool) == 1


def test_a_reaper_that_is_stopped_in_the_middle_of_a_close_lets_it_finish(farm, pools):
    """No place is lost."""
    pool = pools(idle_timeout=0.01, cleanup_interval=0.01)
    with pool.backend("a") as backend:
        pass
    farm.closes.shut()
    pool.start_reaper()
    wait_until(lambda: backend.close_calls, "the reaper is closing it")
    pool.stop_reaper()
    farm.closes.open()
    wait_until(lambda: backend.closed, "it is closed")
    wait_until(lambda: pool.get_stats().total_backends == 0, "its place is free")


# -- the end


def test_destroy_all_waits_for_those_in_use(farm, pools):
    """Within the grace nobody is disturbed; when it returns everything is closed."""
    pool = pools()
    borrowed = pool.acquire_backend("a")
    with pool.backend("b"):
        pass
    crowd = in_thread(lambda: pool.destroy_all(grace=60))
    wait_until(lambda: farm.made[1].closed, "the idle one is closed")
    assert borrowed.backend.work() == "worked"
    with pytest.raises(BackendClosed):
        pool.acquire_backend("a")
    borrowed.release()
    crowd.join()
    assert farm.leaked == []
    assert pool.get_stats().total_backends == 0


def test_destroy_all_closes_under_those_who_do_not_come_back(farm, pools, caplog):
    """After the grace; they see `BackendClosed`, and their release does no harm."""
    pool = pools()
    borrowed = pool.acquire_backend("a")
    pool.destroy_all(grace=0.01)
    assert farm.leaked == []
    with pytest.raises(BackendClosed):
        borrowed.backend.work()
    borrowed.release()
    assert "still in use" in caplog.text


def test_a_closed_pool_refuses_every_caller(farm, pools):
    """Keyed, keyless, async and adopting; closing again does nothing."""
    pool = pools()
    with pool.backend("a"):
        pass
    pool.destroy_all()
    for call in (
        lambda: pool.acquire_backend("a"),
        lambda: pool.acquire_backend(None),
        lambda: asyncio.run(pool.aacquire_backend("a")),
        lambda: pool.register("a", "x", farm()),
    ):
        with pytest.raises(BackendClosed):
            call()
    pool.destroy_all()
    assert pool.sweep() == []


def test_destroy_all_sends_away_who_waits(farm, pools):
    """For a connect, for a turn, for room: none of them waits for its timeout."""
    pool = pools(max_backends=1)
    farm.connects.shut()

    def ask(number: int) -> bool:
        with pytest.raises(BackendClosed):
            pool.acquire_backend("ab"[number % 2])
        return True

    crowd = Crowd(4, ask)
    waiting(pool, 4)
    pool.configure(close_timeout=1e6)  # returns because all is gone, not because time is up
    pool.destroy_all(grace=0)
    assert crowd.join() == [True] * 4


@pytest.mark.parametrize("phase", ["connects", "checks"])
def test_destroy_all_returns_after_half_made_backends_are_closed(phase, farm, pools):
    """A connect or check under way is broken off, and what it made is gone."""
    pool = pools(settings=PoolConfig(check_after=0.0))
    if phase == "checks":
        pool.acquire_backend("a").release()
    getattr(farm, phase).shut()

    def ask() -> None:
        with pytest.raises(BackendClosed):
            pool.acquire_backend("a")

    crowd = in_thread(ask)
    waiting(pool, 1)
    wait_until(lambda: farm.check_calls if phase == "checks" else farm.connect_calls, f"{phase} are under way")
    pool.destroy_all(grace=0)
    assert [backend.closed for backend in farm.made] == [True]
    crowd.join()


def test_destroy_all_lets_the_close_of_a_victim_finish(farm, pools):
    """A connect that is making room is broken off; the victim is closed to the end, and no new backend comes."""
    pool = pools(max_backends=1)
    pool.acquire_backend("a").release()
    farm.closes.shut()

    def ask() -> None:
        with pytest.raises(BackendClosed):
            pool.acquire_backend("b")

    crowd = in_thread(ask)
    wait_until(lambda: farm.made[0].close_calls, "the victim is being closed")
    ending = in_thread(lambda: pool.destroy_all(grace=0))
    crowd.join()
    farm.closes.open()
    ending.join()
    assert [backend.closed for backend in farm.made] == [True]


def test_backends_that_hang_in_their_close_end_together(farm, pools, caplog):
    """One ``close_timeout`` for all, not one after the other."""
    pool = pools(settings=PoolConfig(close_timeout=0.2))
    for number in range(50):
        pool.acquire_backend(f"k{number}").release()
    farm.closes.shut()
    pool.dispose()
    wait_until(lambda: pool.get_stats().total_backends == 0, "all are given up", 8)  # one by one it would take 10 s
    assert caplog.text.count("closing <FakeBackend closed> failed") == 50
    farm.closes.open()
    for backend in farm.made:
        backend.closed = True


def test_concurrent_destroy_alls_all_return_when_it_is_done(farm, pools):
    """Whoever calls it may rely on it."""
    pool = pools()
    for number in range(10):
        pool.acquire_backend(f"k{number}").release()

    def end(_: int) -> bool:
        pool.destroy_all(grace=1)
        return farm.leaked == []

    assert Crowd(8, end).join() == [True] * 8


# -- forks

FORBIDDEN = "acquire keyless sweep close_key destroy_all configure register get_stats health peek idle_keys start_reaper".split()
FORKING = """
import os, sys, threading
from pool import BackendPoolManager, MemoryBackend, PoolError
pool = BackendPoolManager(MemoryBackend)
borrowed = pool.acquire_backend("a")
pool.acquire_backend("idle").release()
print("parent", borrowed.backend.status, flush=True)
held = sys.argv[1] == "held"
if held:  # as another thread of the parent may, at the moment of the fork
    pool._lock.acquire()
child = os.fork()
if child == 0:
    calls = {
        "acquire": lambda: pool.acquire_backend("a"), "keyless": lambda: pool.acquire_backend(None),
        "sweep": pool.sweep, "close_key": lambda: pool.close_key("idle"), "destroy_all": pool.destroy_all,
        "configure": lambda: pool.configure(max_backends=3),
        "register": lambda: pool.register("r", "x", MemoryBackend()),
        "get_stats": pool.get_stats, "health": pool.health, "peek": lambda: pool.peek("a"),
        "idle_keys": lambda: pool.idle_keys(0), "start_reaper": pool.start_reaper,
    }
    for name, call in calls.items():
        try:
            call()
        except PoolError as error:
            print(name, "own" if "a pool of its own in each forked child" in str(error) else error, flush=True)
    borrowed.release()
    own = BackendPoolManager(MemoryBackend)
    with own.backend("a") as backend:
        backend.write("f", "child")
        print("child", backend.read("f"), flush=True)
    own.destroy_all()
    os._exit(0)
_, status = os.waitpid(child, 0)
if held:
    pool._lock.release()
print("child ended", os.waitstatus_to_exitcode(status), flush=True)
print("parent", borrowed.backend.status, pool.get_stats().idle_backends, flush=True)
borrowed.release()
pool.destroy_all()
"""


@pytest.mark.parametrize("lock", ["free", "held"])
def test_a_forked_child_is_told_to_make_a_pool_of_its_own(lock):
    """The parent's pool answers with a clear error and is not touched; one of the child's own works."""
    lines = run_script(FORKING, lock).splitlines()
    assert lines == [
        "parent connected",
        *(f"{name} own" for name in FORBIDDEN),
        "child child",
        "child ended 0",
        "parent connected 1",
    ]


# -- what backends track


class Resource:
    """Says when it was closed, in which order."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def close(self) -> None:
        self.log.append(self.name)


class AsyncResource(Resource):
    async def aclose(self) -> None:
        self.log.append(self.name)


def test_tracked_resources_are_closed_with_the_backend_last_first(farm, pools):
    """Plain and async ones; one that raises does not keep the others open."""
    pool = pools()
    log: list[str] = []
    with pool.backend("a") as backend:
        backend.track_closeable(Resource(log, "first"))
        backend.track_closeable(AsyncResource(log, "second"))
        broken = backend.track_closeable(Resource(log, "third"))
        broken.close = lambda: 1 / 0
        cancelled = backend.track_closeable(AsyncResource(log, "fourth"))

        async def aclose() -> None:
            raise asyncio.CancelledError

        cancelled.aclose = aclose
        with pytest.raises(TypeError, match="neither"):
            backend.track_closeable(object())
    pool.dispose()
    assert log == ["second", "first"]
    assert backend.closed


def test_a_closed_backend_tracks_nothing_more(farm, pools):
    """It could never close it; the caller is told, and a context is not even entered."""
    pool = pools()
    log: list[str] = []
    with pool.backend("a") as backend:
        pass
    pool.dispose()
    with pytest.raises(BackendClosed):
        backend.track_closeable(Resource(log, "late"))

    @contextlib.asynccontextmanager
    async def context() -> Any:
        log.append("entered")
        yield 1

    with pytest.raises(BackendClosed):
        backend.enter_context(context())
    assert log == []


MCP_SERVER = """
import os
from mcp.server import MCPServer

server = MCPServer("numbers")

@server.tool()
def add(a: int, b: int) -> int:
    return a + b

@server.tool()
def pid() -> int:
    return os.getpid()

server.run("stdio")
"""


@pytest.mark.parametrize("style", ["client", "session over a transport"])
def test_an_mcp_client_and_its_server_process_end_with_the_backend(style, farm, pools, tmp_path, caplog):
    """Entered on one thread, used from another, left at destroy_all: without an error, and the process is gone."""
    from mcp import ClientSession, StdioServerParameters
    from mcp.client import Client
    from mcp.client.stdio import stdio_client

    script = tmp_path / "server.py"
    script.write_text(MCP_SERVER)
    parameters = StdioServerParameters(command=sys.executable, args=[str(script)])
    pool = pools()
    with pool.backend("a") as backend:
        if style == "client":
            client: Any = backend.enter_context(Client(parameters))
        else:
            read, write = backend.enter_context(stdio_client(parameters))
            client = backend.enter_context(ClientSession(read, write))
            loop_thread().run(client.initialize())

        def call(tool: str, **arguments: int) -> int:
            result = loop_thread().run(client.call_tool(tool, arguments))
            return int(result.content[0].text)

        assert in_thread(lambda: call("add", a=2, b=3)).join() == [5]
        server = call("pid")
        assert psutil.pid_exists(server)
        assert server != os.getpid()
    pool.destroy_all()
    assert not psutil.pid_exists(server)
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []
