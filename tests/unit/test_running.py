"""The tasks that run in a process: their ends, their progress, what is remembered of them, their time limits."""

import gc
import threading
import weakref
from types import SimpleNamespace

import pytest
from celery.exceptions import Ignore, Reject, Retry, SoftTimeLimitExceeded, TimeLimitExceeded

from pool import CommandFailed, MemoryBackend, TaskCancelled
from pool.backends.output import TAP
from pool.interrupt import check_interrupt
from pool.runtime import loop_thread
from pool.worker import progress, running
from pool.worker.running import Running
from pool.worker.time_limits import TimeLimits, limits_of
from tests.support.waiting import wait_until


class Store:
    """As much of a result backend as progress needs."""

    def __init__(self):
        self.stored = []
        self.go = threading.Event()
        self.go.set()
        self.storing = threading.Event()

    def store_result(self, task_id, meta, state, request):
        self.storing.set()
        assert self.go.wait(60)
        self.stored.append((task_id, state, meta))


def task(task_id="t1", *, progress=False, timelimit=None, **limits):
    request = SimpleNamespace(id=task_id, hostname="n@h", ignore_result=False, timelimit=timelimit, args=(), kwargs={})
    limits = {"time_limit": None, "soft_time_limit": None, **limits}
    own_output = {"same_output": lambda args, kwargs: None}
    return SimpleNamespace(name="a.task", request=request, progress=progress, backend=Store(), **own_output, **limits)


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (None, "SUCCESS"),
        (ValueError(), "FAILURE"),
        (CommandFailed("exit code 3", 3), "FAILURE"),
        (Retry(), "RETRY"),
        (Reject("it goes back", requeue=True), "REJECTED"),
        (Ignore(), "REVOKED"),
        (TaskCancelled("enough"), "REVOKED"),
        (KeyboardInterrupt(), "FAILURE"),
    ],
)
def test_how_a_run_ended_is_remembered(error, state):
    """By what came out of the task; whatever that is, it runs no longer."""
    here = Running()
    try:
        with here.task(task(), "u1"):
            assert [run.key for run in here.runs()] == ["u1"]
            if error is not None:
                raise error
    except BaseException as caught:
        assert caught is error
    assert not here.runs()
    ((last,),) = here.last().values()
    assert (last["task_id"], last["state"], last["key"]) == ("t1", state, "u1")
    assert here.last("u1") == here.last()
    assert here.last("u2") == {}


def test_output_is_counted_for_the_task_that_writes_it():
    """And for no other one; the tap ends with the task."""
    here = Running()
    with here.task(task(), "u1") as run:
        TAP.get()("stdout", b"one\ntwo\n", 0)
        TAP.get()("stderr", b"three", 0)
        assert (run.bytes, run.lines) == (13, 2)
    assert TAP.get() is None


def test_what_is_remembered_has_its_bounds(monkeypatch):
    """The last runs of the keys that were used last."""
    monkeypatch.setattr(running, "REMEMBERED", 3)
    here = Running()
    for n in range(10):
        with here.task(task(f"t{n}"), f"u{n % 4}"):
            pass
    for n in range(10, 20):
        with here.task(task(f"t{n}"), "u0"):
            pass
    last = here.last()
    assert sorted(last) == ["u0", "u1", "u3"]
    assert [run["task_id"] for run in last["u0"]] == ["t19", "t18", "t17", "t16", "t15"]


def test_a_run_is_described_the_same_way_while_it_runs_and_afterwards():
    """Then with how and when it ended; a time is in seconds with three digits."""
    here = Running()
    with here.task(task(), "u1") as run:
        here.uses("t1", "codex")
        TAP.get()("stdout", b"one\n", 0)
        told = run.told()
    ((last,),) = here.last().values()
    assert set(last) - set(told) == {"state", "ended"}
    assert {**last, "seconds": told["seconds"]} == {**told, "state": "SUCCESS", "ended": last["ended"]}
    assert (told["name"], told["agent"], told["bytes"], told["lines"]) == ("a.task", "codex", 4, 1)
    assert all(value == round(value, 3) for value in last.values() if isinstance(value, float))


def test_nothing_keeps_hold_of_the_request_of_a_run_that_has_ended():
    """It has the task's arguments, and a thousand keys are remembered."""

    class Request(SimpleNamespace):
        pass

    here, one = Running(), task()
    one.request = Request(**vars(one.request))
    gone = weakref.ref(one.request)
    with here.task(one, "u1"):
        pass
    del one
    gc.collect()
    assert here.last("u1")
    assert gone() is None


def test_a_cancel_reaches_the_run_of_that_id_and_no_other():
    """An id that does not run here is told so."""
    here = Running()
    with here.task(task("t1"), "u1"):
        assert not here.cancel("t2", "why not")
        check_interrupt()
        assert here.cancel("t1", "why not")
        with pytest.raises(TaskCancelled, match="why not"):
            check_interrupt()
    assert not here.cancel("t1", "again")
    check_interrupt()


def test_of_two_runs_of_one_id_each_is_known_to_its_end():
    """RabbitMQ delivers again what it has lost sight of, while the first one runs on."""
    here = Running()
    with here.task(task("t1"), "u1") as second:
        with here.task(task("t1"), "u1") as first:
            assert here.cancel("t1", "both")
            assert first.interrupt.is_set and second.interrupt.is_set
        assert here.runs() == [second]
        assert here.cancel("t1", "again")
    assert not here.runs()


def test_a_run_that_has_ended_keeps_nothing_of_its_request():
    """What it has begun on the event loop may keep the run itself for long."""
    here, own = Running(), task()
    with here.task(own, "u1") as run:
        assert run.request is own.request
    run.feed("stdout", b"late", 0)
    assert run.request is None


def test_a_cancel_that_comes_before_the_run_is_kept_for_it(monkeypatch):
    """Celery takes a task for running a moment before it is here. Of those that never come, the last few are kept."""
    monkeypatch.setattr(running, "EARLY", 2)
    here = Running()
    for task_id in ("gone", "t1", "t2"):
        assert not here.cancel(task_id, "too early")
    with here.task(task("gone"), "u1"):
        check_interrupt()
    for task_id in ("t1", "t2"):
        with here.task(task(task_id), "u1"), pytest.raises(TaskCancelled, match="too early"):
            check_interrupt()
    with here.task(task("t1"), "u1"):
        check_interrupt()


def test_no_progress_comes_after_the_end_of_a_task(monkeypatch):
    """A report that is on its way is waited for, or a slow one would undo the task's own state."""
    monkeypatch.setattr(progress, "INTERVAL", 0.01)
    here, slow = Running(), task(progress=True)
    slow.backend.go.clear()
    ended = threading.Event()
    wanted = here._progress.wanted
    monkeypatch.setattr(here._progress, "wanted", lambda: None)  # by the run itself, when it has something to report

    def run():
        with here.task(slow, "u1") as run:
            run.feed("stdout", b"line\n", 0)
            wanted()
            assert slow.backend.storing.wait(60)
        ended.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert slow.backend.storing.wait(60)
    wait_until(here.runs()[0].ending.locked, "a report is on its way")
    assert not ended.wait(0.2)
    slow.backend.go.set()
    thread.join(60)
    count = len(slow.backend.stored)
    assert count >= 1
    task_id, state, meta = slow.backend.stored[0]
    assert (task_id, state, meta["bytes"], meta["lines"], meta["key"]) == ("t1", "PROGRESS", 5, 1, "u1")
    other = task("t2", progress=True)
    monkeypatch.setattr(here._progress, "wanted", wanted)
    with here.task(other, "u1"):
        assert other.backend.storing.wait(60)  # the reporter goes on, for those who run
    assert len(slow.backend.stored) == count


def test_a_task_that_wants_no_progress_reports_none(monkeypatch):
    """Nor does one whose result is ignored."""
    monkeypatch.setattr(progress, "INTERVAL", 0.01)
    here, quiet, ignored, loud = Running(), task("q"), task("i", progress=True), task("l", progress=True)
    ignored.request.ignore_result = True
    with here.task(quiet, "u1"), here.task(ignored, "u1"), here.task(loud, "u1"):
        wait_until(lambda: len(loud.backend.stored) > 2, "the one that wants to reports")
    assert not quiet.backend.stored
    assert not ignored.backend.stored


def test_the_limits_of_the_message_come_before_the_tasks_and_those_before_the_workers():
    """As Celery has it; each of the two on its own."""
    own = task(timelimit=[5, None], time_limit=20, soft_time_limit=10)
    assert limits_of(own, own.request, (30, 15)) == (5, 10)
    none = task()
    assert limits_of(none, none.request, (30, 15)) == (30, 15)
    assert limits_of(none, none.request, (None, None)) == (None, None)


@pytest.mark.parametrize(
    ("limits", "error"), [([0.05, None], TimeLimitExceeded), ([None, 0.05], SoftTimeLimitExceeded)]
)
def test_a_run_that_exceeds_its_limit_is_interrupted(limits, error):
    """With Celery's own exception, at the next door; the hard one stays."""
    here = Running(limits=(None, None))
    with here.task(task(timelimit=limits), "u1") as run:
        wait_until(lambda: run.interrupt.is_set, "the time is over")
        with pytest.raises(error):
            check_interrupt()
        assert run.interrupt.is_set == (error is TimeLimitExceeded)
    backend = MemoryBackend()
    backend.write("f", "a later use is not concerned")
    backend.destroy()


def test_a_run_that_ends_in_time_is_not():
    """Its timers end with it, also those that had not been set yet."""
    here = Running(limits=(600, 300))

    async def timers():
        handles = loop_thread().loop._scheduled
        return [each for each in handles if isinstance(getattr(each._callback, "__self__", None), TimeLimits)]

    for n in range(20):
        with here.task(task(f"t{n}"), "u1"):
            pass
    with here.task(task("last"), "u1"):
        going = [each for each in loop_thread().run(timers()) if not each.cancelled()]
        assert sorted(each._callback.__name__ for each in going) == ["_hard", "_soft"]
    assert all(each.cancelled() for each in loop_thread().run(timers()))
