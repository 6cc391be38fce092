"""The loop thread of a process, and the sync door to it."""

import asyncio
import gc
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pool
from pool import runtime
from pool.errors import PoolError
from pool.runtime import LoopThread, fork_count, loop_thread
from tests.support.waiting import wait_until

ROOT = Path(pool.__file__).parents[1]


@pytest.fixture
def loop() -> Iterator[LoopThread]:
    """A loop thread of the test's own."""
    thread = LoopThread("test")
    yield thread
    thread.stop()
    assert not thread.thread.is_alive()


class Job:
    """A coroutine that waits until it is cancelled, and whose clean-up a test holds."""

    def __init__(self) -> None:
        self.started = threading.Event()
        self.cleaning = threading.Event()
        self.may_finish = threading.Event()
        self.cleaned = False

    async def run(self) -> None:
        self.started.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.cleaning.set()
            while not self.may_finish.is_set():
                await asyncio.sleep(0.001)
            self.cleaned = True


async def answer(value: Any = 42) -> Any:
    return value


async def fail() -> None:
    raise ZeroDivisionError("on the loop")


def test_run_returns_the_result(loop):
    """A plain call from any thread."""
    assert loop.run(answer()) == 42


def test_run_raises_what_the_coroutine_raised(loop):
    """The same object, not a copy."""
    with pytest.raises(ZeroDivisionError, match="on the loop"):
        loop.run(fail())


def test_the_coroutine_runs_on_the_loops_thread(loop):
    """Never in the caller's."""

    async def where() -> threading.Thread:
        return threading.current_thread()

    assert loop.run(where()) is loop.thread


def test_run_on_the_loops_own_thread_is_refused(loop):
    """It would wait for itself; the error says what to do, and the coroutine is closed."""

    async def nested() -> None:
        loop.run(answer())

    with pytest.raises(PoolError, match="await the a"):
        loop.run(nested())


def test_an_exception_leaves_no_cycle_behind(loop):
    """What a failed call held is freed at once, without the garbage collector."""

    class Error(Exception):
        pass

    async def raises() -> None:
        raise Error

    gc.disable()
    try:
        try:
            loop.run(raises())
        except Error as error:
            seen = weakref.ref(error)
        wait_until(lambda: seen() is None, "the exception is gone", timeout=5)
    finally:
        gc.enable()


class Interrupted(BaseException):
    """As KeyboardInterrupt, but pytest does not know it."""


def test_an_interrupted_run_waits_for_the_clean_up(loop):
    """The caller goes on only when nothing of its call is left on the loop."""
    job = Job()
    main = threading.get_ident()

    def interrupt(*_: object) -> None:
        raise Interrupted

    def kill() -> None:
        job.started.wait(10)
        signal.pthread_kill(main, signal.SIGUSR1)
        job.cleaning.wait(10)
        job.may_finish.set()

    before = signal.signal(signal.SIGUSR1, interrupt)
    killer = threading.Thread(target=kill)
    try:
        killer.start()
        with pytest.raises(Interrupted):
            loop.run(job.run())
    finally:
        signal.signal(signal.SIGUSR1, before)
        killer.join()
    assert job.cleaned


def test_a_clean_up_that_hangs_holds_an_interrupted_caller_for_a_while_only(loop, monkeypatch):
    """CLEANUP_TIMEOUT bounds it."""
    monkeypatch.setattr(runtime, "CLEANUP_TIMEOUT", 0.01)
    job = Job()
    call = loop.spawn(job.run())
    job.started.wait(10)
    call.abandon()
    assert job.cleaning.wait(10)
    assert not job.cleaned
    job.may_finish.set()


def test_arun_from_another_loop_returns_and_raises(loop):
    """Awaited in one loop, run on the other."""

    async def main() -> None:
        assert await loop.arun(answer()) == 42
        with pytest.raises(ZeroDivisionError):
            await loop.arun(fail())

    asyncio.run(main())


def test_arun_on_the_own_loop_awaits_directly(loop):
    """No detour, no deadlock."""

    async def main() -> Any:
        return await loop.arun(answer(threading.current_thread()))

    assert loop.run(main()) is loop.thread


def test_a_cancelled_arun_waits_for_the_clean_up(loop):
    """As an interrupted `run` does."""
    job = Job()

    async def main() -> None:
        task = asyncio.ensure_future(loop.arun(job.run()))
        while not job.started.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        while not job.cleaning.is_set():
            await asyncio.sleep(0.001)
        assert not task.done()
        job.may_finish.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert job.cleaned

    asyncio.run(main())


def test_spawn_does_not_wait(loop):
    """The future tells when it is done."""
    job = Job()
    call = loop.spawn(job.run())
    job.started.wait(10)
    assert not call.future.done()
    job.may_finish.set()
    call.cancel()
    with pytest.raises(PoolError, match="cancelled"):
        call.wait()


def test_a_call_that_is_cancelled_before_it_starts_never_runs(loop):
    """Cancelling is safe at any time."""
    hold = threading.Event()
    loop.loop.call_soon_threadsafe(hold.wait, 10)
    ran = []

    async def run() -> None:
        ran.append(1)

    call = loop.spawn(run())
    call.cancel()
    hold.set()
    with pytest.raises(PoolError):
        call.wait()


def test_stop_cancels_what_runs_and_waits_for_its_clean_up():
    """Then the thread has ended, and a call raises at once."""
    loop, job = LoopThread("test"), Job()
    job.may_finish.set()
    call = loop.spawn(job.run())
    job.started.wait(10)
    loop.stop()
    assert job.cleaned
    assert not loop.thread.is_alive()
    with pytest.raises(PoolError, match="stopped"):
        call.wait()
    with pytest.raises(PoolError, match="closed"):
        loop.run(answer())
    loop.stop()


def test_a_process_has_one_loop_thread():
    """However many threads ask for it first."""
    found: list[LoopThread] = []
    barrier = threading.Barrier(20)

    def ask() -> None:
        barrier.wait(10)
        found.append(loop_thread())

    threads = [threading.Thread(target=ask) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(found) == {loop_thread()}
    assert loop_thread().thread.daemon


FORKING = """
import os, threading
from pool.runtime import fork_count, loop_thread

async def answer():
    return os.getpid()

assert loop_thread().run(answer()) == os.getpid()
before = loop_thread()
def fork_and_check(depth):
    child = os.fork()
    if child == 0:
        assert fork_count() == depth
        assert loop_thread() is not before
        assert loop_thread().run(answer()) == os.getpid()
        if depth < 2:
            fork_and_check(depth + 1)
        print("child", depth, flush=True)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status == 0, status
fork_and_check(1)
assert fork_count() == 0
assert loop_thread() is before
assert before.run(answer()) == os.getpid()
print("parent", flush=True)
"""


def test_a_forked_child_has_a_loop_of_its_own():
    """And so has its child; the parent's goes on."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKING],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.split("\n") == ["child 2", "child 1", "parent", ""], done.stderr
    assert fork_count() == 0


@pytest.mark.parametrize("handed_over", [False, True])
def test_a_run_that_is_interrupted_while_it_begins_leaves_nothing_running(handed_over, loop, monkeypatch):
    """A signal does not wait until the caller is ready for it."""
    job = Job()
    job.may_finish.set()
    hand_over = loop.loop.call_soon_threadsafe

    def interrupted(*args: Any) -> None:
        monkeypatch.setattr(loop.loop, "call_soon_threadsafe", hand_over)
        if handed_over:
            hand_over(*args)
        raise Interrupted

    monkeypatch.setattr(loop.loop, "call_soon_threadsafe", interrupted)
    with pytest.raises(Interrupted):
        loop.run(job.run())
    assert job.cleaned == job.started.is_set()

    async def others() -> int:
        return len(asyncio.all_tasks()) - 1

    assert loop.run(others()) == 0
