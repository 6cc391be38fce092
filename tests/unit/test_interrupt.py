"""Interrupts: a task that waits at a door of the pool is ended there, whatever it waits for."""

import asyncio
import threading

import pytest

from pool import BackendPoolManager, LocalFilesystemBackend, MemoryBackend, TaskCancelled
from pool.interrupt import Interrupt, check_interrupt, interruptible
from pool.runtime import loop_thread
from tests.support.processes import wait_gone, wait_pid
from tests.support.waiting import wait_until

STOP = TaskCancelled("enough")


class Task:
    """A function in a thread, as a task: under an interrupt."""

    def __init__(self, function):
        self.interrupt = Interrupt()
        self.result = self.error = None
        self.waits = threading.Event()

        def run():
            try:
                with self.interrupt:
                    self.result = function()
            except BaseException as error:
                self.error = error

        self.thread = threading.Thread(target=run)
        self.thread.start()

    def end(self):
        self.thread.join(60)
        assert not self.thread.is_alive()
        return self.error


@pytest.fixture
def backend(tmp_path):
    backend = LocalFilesystemBackend(root_dir=str(tmp_path / "root"))
    backend.exec("true")
    yield backend
    backend.destroy()


@pytest.mark.parametrize("on_output", [None, lambda *_: None], ids=["plain", "followed"])
def test_a_command_is_killed_and_its_backend_goes_on(backend, tmp_path, on_output):
    """The error is the interrupt's; the process group is gone when it is raised."""
    task = Task(lambda: backend.exec(f"echo $$ > {tmp_path}/pid; sleep 1000", on_output=on_output))
    pid = wait_pid(tmp_path / "pid")
    task.interrupt.set(STOP)
    assert task.end() is STOP
    wait_gone(pid)
    assert backend.exec("echo usable").stdout == "usable\n"


def test_a_command_that_is_awaited_on_an_event_loop_of_the_tasks_own(backend, tmp_path):
    """``asyncio.run`` in a task: the same."""
    task = Task(lambda: asyncio.run(backend.aexec(f"echo $$ > {tmp_path}/pid; sleep 1000")))
    pid = wait_pid(tmp_path / "pid")
    task.interrupt.set(STOP)
    assert task.end() is STOP
    wait_gone(pid)


@pytest.mark.parametrize("acquire", ["thread", "loop"])
def test_who_waits_for_a_backend_waits_no_longer(acquire):
    """And leaves the line: the backend, once it is there, goes to somebody else."""
    go = threading.Event()

    class Slow(MemoryBackend):
        async def open(self):
            await asyncio.to_thread(go.wait)
            await super().open()

    pool = BackendPoolManager(Slow)

    async def wait():
        await pool.aacquire_backend("a")

    task = Task((lambda: pool.acquire_backend("a")) if acquire == "thread" else lambda: asyncio.run(wait()))
    wait_until(lambda: pool.get_stats().waiting == 1, "it waits")
    task.interrupt.set(STOP)
    assert task.end() is STOP
    assert pool.get_stats().waiting == 0
    go.set()
    with pool.backend("a"):
        assert pool.get_stats().total_backends == 1
    assert pool.get_stats().active_backends == 0
    pool.destroy_all(grace=0)


def test_one_that_stays_is_raised_at_each_door_and_before_anything_begins(backend, tmp_path):
    """A task that catches it comes no further."""
    errors = []

    def stubborn():
        for _ in range(3):
            try:
                backend.exec(f"touch {tmp_path}/began")
            except TaskCancelled as error:
                errors.append(error)

    begun = threading.Event()
    task = Task(lambda: (begun.wait(), stubborn()))
    task.interrupt.set(STOP)
    begun.set()
    assert task.end() is None
    assert errors == [STOP] * 3
    assert not (tmp_path / "began").exists()


def test_one_that_comes_once_leaves_the_task_to_clean_up(backend, tmp_path):
    """As a soft time limit does; one that stays takes its place, not the other way round."""

    def tidy():
        try:
            backend.exec(f"echo $$ > {tmp_path}/pid; sleep 1000")
        except TimeoutError:
            return backend.exec("echo tidied").stdout

    task = Task(tidy)
    wait_pid(tmp_path / "pid")
    task.interrupt.set(TimeoutError("soft"), once=True)
    assert task.end() is None
    assert task.result == "tidied\n"
    interrupt = Interrupt()
    interrupt.set(TimeoutError("soft"), once=True)
    interrupt.set(STOP)
    interrupt.set(TimeoutError("soft again"), once=True)
    for _ in range(2):
        with pytest.raises(TaskCancelled):
            interrupt.check()


def test_what_others_share_is_not_interrupted():
    """The connect that a cancelled task began goes on for those who wait with it."""
    go = threading.Event()

    class Slow(MemoryBackend):
        async def open(self):
            await asyncio.to_thread(go.wait)
            await super().open()

    pool = BackendPoolManager(Slow)
    first = Task(lambda: pool.acquire_backend("a"))
    wait_until(lambda: pool.get_stats().waiting == 1, "it waits")
    second = Task(lambda: pool.acquire_backend("a").release())
    wait_until(lambda: pool.get_stats().waiting == 2, "both wait")
    first.interrupt.set(STOP)
    assert first.end() is STOP
    go.set()
    assert second.end() is None
    assert pool.get_stats().connects == 1
    pool.destroy_all(grace=0)


def test_a_result_that_came_all_the_same_is_kept():
    """Nothing that was done is thrown away; the next door raises."""
    interrupt = Interrupt()

    async def both():
        interrupt.set(STOP, once=True)
        return "done"

    with interrupt:
        assert loop_thread().run(both()) == "done"
        interrupt.set(STOP)
        with pytest.raises(TaskCancelled), interruptible(lambda: None):
            pass


def test_without_a_task_nothing_changes(backend):
    """Plain users of the pool have no interrupt."""
    check_interrupt()
    with interruptible(lambda: None):
        assert backend.exec("echo plain").stdout == "plain\n"


def test_the_doors_own_errors_stay(backend):
    """An interrupt that never came hides nothing."""
    task = Task(lambda: backend.exec("exit 3"))
    assert task.end().exit_code == 3
