"""Whose processes are left: by the mark in their environment, and by nothing else."""

import os
import re
import signal
import subprocess
import sys

import psutil
import pytest

from pool.backends import leftovers
from pool.backends.leftovers import owner, sweep_leftovers
from pool.backends.shell import MARK
from tests.support.processes import is_gone, wait_gone, wait_pid

# Its owner was started when no process was: it cannot live.
DEAD = "{machine}.{pid}.1.0123456789abcdef"


@pytest.fixture
def start(monkeypatch):
    """Start processes with a mark; sweep sees no others, whatever runs on the machine."""
    started = []

    def start(mark, command=("sleep", "1000")):
        env = {**os.environ, **({} if mark is None else {MARK: mark})}
        started.append(subprocess.Popen(command, env=env))
        return started[-1].pid

    monkeypatch.setattr(psutil, "process_iter", lambda: [psutil.Process(process.pid) for process in started])
    monkeypatch.setattr(leftovers, "KILL_GRACE", 0.2)
    yield start
    for process in started:
        process.kill()
        process.wait()


def mark(form=DEAD, pid=None):
    machine = owner().rsplit(".", 2)[0]
    return form.format(machine=machine, pid=os.getpid() if pid is None else pid)


def test_the_mark_of_a_process_stays_the_same():
    """It names machine, process and start."""
    assert owner() == owner()
    assert re.fullmatch(rf"[0-9a-f-]+\.{os.getpid()}\.\d+", owner())


def test_another_process_has_another_mark():
    """A forked child too, though it remembers its parent's."""
    owner()
    read, write = os.pipe()
    pid = os.fork()
    if not pid:  # pragma: no cover - in the child
        os.write(write, owner().encode())
        os._exit(0)
    os.waitpid(pid, 0)
    os.close(write)
    with os.fdopen(read) as pipe:
        theirs = pipe.read()
    assert theirs.split(".")[1] == str(pid)
    assert theirs.split(".")[0] == owner().split(".")[0]


def test_what_a_dead_owner_left_is_ended(start):
    """One whose process id is free, and one whose process id belongs to somebody else by now."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    pids = [start(mark(pid=gone.pid)), start(mark())]
    assert sorted(sweep_leftovers()) == sorted(pids)
    assert all(map(is_gone, pids))


def test_the_owner_may_be_a_zombie(start):
    """It does nothing any more, whoever has not reaped it."""
    zombie = subprocess.Popen([sys.executable, "-c", "from pool.backends.leftovers import owner; print(owner())"],
                              stdout=subprocess.PIPE, text=True, cwd=os.getcwd(), env={**os.environ, "PYTHONPATH": os.getcwd()})  # fmt: skip
    with zombie:
        theirs = zombie.stdout.readline().strip()
        os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
        pid = start(f"{theirs}.0123456789abcdef")
        assert sweep_leftovers() == [pid]


def test_what_ignores_term_is_killed(start, tmp_path):
    """After a moment for those who do not."""
    pid = start(mark(), ["sh", "-c", f"trap '' TERM; echo $$ > {tmp_path}/pid; while :; do sleep 1; done"])
    wait_pid(tmp_path / "pid")
    assert sweep_leftovers() == [pid]
    wait_gone(pid)


def test_what_heeds_term_gets_the_chance(start, tmp_path):
    """To clean up behind itself."""
    script = f"trap 'echo 1 > {tmp_path}/cleaned; exit' TERM; echo $$ > {tmp_path}/pid; while :; do sleep 0.01; done"
    pid = start(mark(), ["sh", "-c", script])
    wait_pid(tmp_path / "pid")
    assert sweep_leftovers() == [pid]
    assert (tmp_path / "cleaned").exists()


@pytest.mark.parametrize(
    "theirs",
    [
        None,
        "",
        "nonsense",
        DEAD.removesuffix(".0123456789abcdef"),
        DEAD + ".more",
        "0-{machine}.{pid}.1.0123456789abcdef",
        "{machine}.0x1.1.0123456789abcdef",
        "{machine}.{pid}.-1.0123456789abcdef",
        pytest.param(f"{owner()}.0123456789abcdef", id="this-process"),
    ],
)
def test_nothing_else_is_touched(start, theirs):
    """No mark, a mark that is none, one of another machine, one of an owner that lives."""
    pid = start(None if theirs is None else mark(theirs))
    assert sweep_leftovers() == []
    assert not is_gone(pid)


def test_a_process_that_is_gone_meanwhile_does_no_harm(start, monkeypatch):
    """Between the look and the signal."""
    pid = start(mark())
    is_left = leftovers._is_left

    def look(process):
        found = is_left(process)
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED)
        return found

    monkeypatch.setattr(leftovers, "_is_left", look)
    assert sweep_leftovers() == [pid]


def test_a_worker_never_sweeps_itself_or_what_it_runs_in(start):
    """It may itself have been started by an agent, whose own worker is dead by now."""
    script = (
        "import psutil; from pool.backends.leftovers import sweep_leftovers\n"
        "me = psutil.Process(); psutil.process_iter = lambda: [me, me.parent()]\n"
        "print(sweep_leftovers())"
    )
    env = {**os.environ, MARK: mark(), "PYTHONPATH": os.getcwd()}
    command = ["sh", "-c", '"$@"; :', "sh", sys.executable, "-c", script]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.returncode) == ("[]\n", 0)
