"""The helper as a process: until when it believes that its worker may work."""

import signal
import time

import psutil
import pytest

from pool.helper import wire
from tests.support.helper_program import Program
from tests.support.processes import is_gone, wait_pid
from tests.support.waiting import wait_until


@pytest.fixture
def program():
    with Program() as program:
        yield program


def in_time(use):
    """Call ``use(program, ahead)``, with more hundredths of seconds as long as their end comes before the next word."""
    for ahead in (50, 400, 3000):
        with Program() as program:
            try:
                use(program, ahead)
            except (EOFError, BrokenPipeError):
                assert ahead < 3000, program.errors()
            else:
                return


def tell(program, moment):
    """Say until when the worker may work; None: without limit. Return the helper's time then."""
    program.clock = 0
    program.send(wire.UNTIL, 0, b"" if moment is None else b"%d" % moment)
    while not program.clock:
        program.pump()
    return program.clock


def wait_past(program, moment):
    """Ask for the time, with a moment far ahead, until it is past *moment*."""
    while tell(program, program.clock + 100_000) <= moment:
        time.sleep(0.01)


def now():
    """The machine's time as the helper tells it."""
    return int(100 * time.clock_gettime(time.CLOCK_BOOTTIME))


def test_everything_ends_when_the_moment_has_come(program, tmp_path):
    """And not before: deaf commands too, and what has a session of its own; it says why."""
    deaf = program.exec("trap '' TERM; echo $$ > deaf; while :; do sleep 0.1; done", [str(tmp_path)])
    program.exec("setsid sh -c 'echo $$ > session; sleep 1000' & wait", [str(tmp_path)])
    pids = [wait_pid(tmp_path / name) for name in ("deaf", "session")]
    moment = now() + 50
    program.send(wire.UNTIL, 0, b"%d" % moment)
    assert program.end() == wire.OVER
    assert now() >= moment
    assert all(map(is_gone, pids))
    assert "may go on" in program.errors()
    assert not program.calls[deaf].kind


def test_an_idle_helper_ends_as_well(program):
    """It waits for nothing else than that moment."""
    moment = now() + 10
    program.send(wire.UNTIL, 0, b"%d" % moment)
    assert program.end() == wire.OVER
    assert now() >= moment


def test_a_later_moment_takes_the_place_of_the_one_before():
    """As long as it is told in time."""

    def use(program, ahead):
        first = program.clock + ahead
        tell(program, first)
        wait_past(program, first)
        assert program.run("exit 7").code == 7

    in_time(use)


def test_without_a_limit_again():
    """A worker that shares its keys with nobody any more."""

    def use(program, ahead):
        moment = program.clock + ahead
        tell(program, moment)
        while tell(program, None) <= moment:
            time.sleep(0.01)
        assert program.run("exit 7").code == 7

    in_time(use)


def test_nothing_starts_for_a_worker_whose_word_comes_too_late(program, tmp_path):
    """What was held up on its way, all of it in one piece: the moment is past, the command that follows never starts."""
    late = wire.frame(wire.UNTIL, 0, b"%d" % (program.clock - 1))
    program._write(late + wire.frame(wire.EXEC, 1, b"touch started\0" + b"1\0" + bytes(tmp_path)))
    assert program.end() == wire.OVER
    assert list(tmp_path.iterdir()) == []


def test_nothing_starts_when_the_moment_came_while_the_helper_was_stopped(tmp_path):
    """A machine that slept: what came in the meantime is not done."""
    stopped, ended = psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE

    def use(program, ahead):
        moment = program.clock + ahead
        tell(program, moment)
        program.process.send_signal(signal.SIGSTOP)
        process = psutil.Process(program.pid)
        if wait_until(lambda: process.status() in (stopped, ended) and process.status(), "it is stopped") == ended:
            raise EOFError
        program.send(wire.EXEC, 1, b"touch started\0" + b"1\0" + bytes(tmp_path))
        while now() <= moment:
            time.sleep(0.01)
        program.process.send_signal(signal.SIGCONT)
        assert program.end() == wire.OVER
        assert list(tmp_path.iterdir()) == []

    in_time(use)


@pytest.mark.parametrize("moment", [b"soon", b"1.5", b"-"])
def test_a_moment_that_is_none_ends_it(program, moment):
    """Better than to believe anything."""
    program.send(wire.UNTIL, 0, moment)
    assert program.end() == 1
    assert "ValueError" in program.errors()
