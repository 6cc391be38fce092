"""The script of a watchdog in each shell there is, below a parent that looks like a connection's sshd."""

import os
import shutil
import subprocess

import psutil
import pytest

from pool.backends.watchdog import _MARK, _SCRIPT
from tests.support.processes import wait_gone
from tests.support.services import require_service
from tests.support.waiting import wait_until

SHELLS = {"dash": ["dash"], "bash": ["bash", "--posix"], "busybox": ["busybox", "ash"]}
AHEAD = (100, 800, 3000)
"""Hundredths of seconds to a moment that another word must come before: more, if the machine was too slow."""
PARENT = '"$@"; code=$?; echo "parent lives $code"'


@pytest.fixture(params=SHELLS)
def shell(request):
    argv = SHELLS[request.param]
    path = shutil.which(argv[0])
    require_service(argv[0], path)
    return [path, *argv[1:]]


@pytest.fixture
def start(shell, tmp_path):
    """``start(name)``: the script as a child of a process of that name; ended with all below it."""
    started = []

    def start(name="sshd"):
        parent = tmp_path / name
        shutil.copy(os.path.realpath("/bin/sh"), parent)
        process = subprocess.Popen(
            [parent, "-c", PARENT, "parent", *shell, "-c", _SCRIPT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        below = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.stdin.close()
        for each in [process, *below]:
            try:
                each.kill()
            except psutil.NoSuchProcess:
                pass
        process.wait()
        process.stdout.close()


def now(process):
    """Return the moment that the script tells."""
    line = process.stdout.readline()
    assert line.startswith(_MARK), line
    return int(line.removeprefix(_MARK))


def tell(process, line):
    """Send a line and return the moment of its answer."""
    process.stdin.write(f"{line}\n")
    process.stdin.flush()
    return now(process)


def below(process):
    return psutil.Process(process.pid).children(recursive=True)


def sleeper(process):
    """Return the clock's `sleep` once there is one."""

    def is_one(each):
        try:
            sleeps = each.name() == "sleep" or "sleep" in each.cmdline()[:2]
            return sleeps and each.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    return wait_until(lambda: [each for each in below(process) if is_one(each)], "the clock runs")[0]


def test_the_parent_ends_when_the_moment_has_come(start):
    """And not before; nothing of the script is left."""
    process = start()
    moment = now(process) + 100
    tell(process, moment)
    script = [each.pid for each in below(process)]
    process.wait(20)
    process.stdin.close()  # as an sshd's end does
    assert process.stdout.read() == ""
    wait_gone(*script)
    with open("/proc/uptime") as uptime:
        assert float(uptime.read().split()[0]) * 100 >= moment


def test_a_later_moment_replaces_the_one_before(start):
    """Each line stops the former clock, whole: one sleep at a time, and no zombie."""
    for ahead in AHEAD:
        process = start()
        first = now(process)
        for step in range(20):
            tell(process, first + ahead + step)
        if tell(process, first + 100_000) < first + ahead:
            break
    sleeper(process)
    wait_until(lambda: len(below(process)) == 3, "the script, its clock and one sleep")
    past = first
    while past < first + ahead + 100:  # the script's own time
        past = tell(process, first + 100_000)
    assert process.poll() is None


def test_no_limit_stops_the_clock(start):
    """A worker that may work for ever again."""
    for ahead in AHEAD:
        process = start()
        first = now(process)
        tell(process, first + ahead)
        past = tell(process, "no limit")
        if past < first + ahead:
            break
    while past < first + ahead + 100:
        past = tell(process, "no limit")
    assert process.poll() is None
    assert len(below(process)) == 1


def test_the_end_of_stdin_ends_the_script_alone(start):
    """A connection that closes in order: nothing is killed, nothing stays."""
    process = start()
    tell(process, now(process) + 100_000)
    sleeper(process)
    script = [each.pid for each in below(process)]
    process.stdin.close()
    process.wait(20)
    assert process.stdout.read() == "parent lives 0\n"
    wait_gone(*script)


def test_a_moment_that_has_passed_ends_the_parent_at_once(start):
    """A worker that slept through it."""
    process = start()
    process.stdin.write(f"{now(process) - 100}\n")
    process.stdin.flush()
    process.wait(20)


def test_a_sleep_that_somebody_kills_does_no_harm(start):
    """A build may well say `pkill sleep`: the clock goes on, and still keeps its moment."""
    process = start()
    first = now(process)
    tell(process, first + 300)
    for _ in range(3):
        victim = sleeper(process)
        victim.kill()
        wait_gone(victim.pid)
    assert sleeper(process).pid != victim.pid
    assert process.poll() is None
    process.wait(20)


@pytest.mark.parametrize("name", ["python3", "sh", "notsshd", "sshdx"])
def test_another_parent_is_let_alone(start, name):
    """Whatever is not an SSH server's: the script names it and ends."""
    process = start(name)
    process.stdin.close()
    assert process.stdout.read() == f"{_MARK}{name}\nparent lives 0\n"


@pytest.mark.parametrize("name", ["sshd-session", "sshd.pam", "dropbear"])
def test_names_of_servers(start, name):
    """OpenSSH since 9.8, Alpine's, Dropbear."""
    process = start(name)
    tell(process, now(process) + 10)
    process.wait(20)
