"""The helper as a process: how commands are ended, by a KILL, with the helper, and after it was killed."""

import os
import signal
import sys

import psutil
import pytest

from pool.helper import family, wire
from pool.helper.bundle import bundle
from tests.support.helper_program import Program
from tests.support.processes import is_gone, living_below, wait_gone, wait_pid
from tests.support.waiting import wait_until

TERMINATED, KILLED = 128 + signal.SIGTERM, 128 + signal.SIGKILL

# Forks twice, begins a session of its own in between, keeps no output; writes its process id to $1. Deaf to TERM.
DAEMON = (
    "import os, signal, sys, time; os.fork() and os._exit(0); os.setsid(); os.fork() and os._exit(0); "
    "null = os.open('/dev/null', os.O_RDWR); [os.dup2(null, n) for n in range(3)]; "
    "signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "open('new', 'w').write('%d\\n' % os.getpid()); os.rename('new', sys.argv[1]); time.sleep(1000)"
)


def daemon(name):
    """A command line that starts one and goes on."""
    return f'{sys.executable} -I -S -c "{DAEMON}" {name}'


@pytest.fixture
def program():
    with Program() as program:
        yield program


FAMILIES = {
    "plain": "sleep 1000 & echo $! > pid; wait",
    "a leader that has gone": "sleep 1000 & echo $! > pid",
    "deaf to TERM": "sh -c 'trap \"\" TERM; echo $$ > pid; while :; do sleep 0.1; done' & wait",
    "stopped": "sleep 1000 & kill -STOP $!; echo $! > pid; wait",
    "stopped and deaf": "sh -c 'trap \"\" TERM; kill -STOP $$; while :; do sleep 0.1; done' & echo $! > pid; wait",
    "a session of its own": "setsid sh -c 'echo $$ > pid; trap \"\" TERM; sleep 1000' & wait",
    "a session in a session": "setsid sh -c 'setsid sh -c \"echo \\$\\$ > pid; sleep 1000\" & wait' & wait",
    "without output": "exec >&- 2>&-; sleep 1000 & echo $! > pid; wait",
    "a daemon": f"{daemon('pid')}; sleep 1000",
    "in a loop": "while :; do (sleep 1000 & echo $! > pid); sleep 0.01; done",
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_kill_ends_the_whole_family(program, name, tmp_path):
    """What the command has started, wherever it went; before the end is told."""
    number = program.exec(f"echo $$; {FAMILIES[name]}", [str(tmp_path)])
    program.wait_out(number, b"\n")
    pid = wait_pid(tmp_path / "pid")
    program.send(wire.KILL, number)
    assert program.wait(number).code in (0, TERMINATED, KILLED)
    assert is_gone(pid)
    assert is_gone(int(program.calls[number].out))
    assert not living_below(program.pid)
    assert program.run("echo usable").out == b"usable\n"


@pytest.fixture
def patient():
    """A helper that waits long between TERM and KILL: for what must not depend on the speed of this machine."""
    source = bundle().replace(b"KILL_GRACE = 0.1", b"KILL_GRACE = 20")
    assert source != bundle()
    with Program(source=source) as program:
        yield program


def test_who_hears_a_term_may_tidy_up(patient, tmp_path):
    """There is a moment between TERM and KILL, also for a command that had filled its window and says more."""
    patient.credit = False
    trap = "trap 'head -c 200000 /dev/zero; echo tidy > tidy; exit 9' TERM"
    command = f"{trap}; head -c {wire.WINDOW + 60_000} /dev/zero; sleep 1000 & wait"
    number = patient.exec(command, [str(tmp_path)])
    while len(patient.calls[number].out) < wire.WINDOW:
        patient.pump()
    wait_until(lambda: "sleep" in living_below(patient.pid), "it has written all")
    patient.send(wire.KILL, number)
    assert patient.wait(number).code == 9
    assert (tmp_path / "tidy").read_text() == "tidy\n"


def two_with_daemons(program, folder, first=""):
    """Run two commands at a time, each with a daemon; return their numbers and those of the daemons."""
    numbers, pids = [], []
    for how, name in ((first, "a"), ("", "b")):
        numbers.append(program.exec(f"{how} {daemon(name)}; sleep 1000", [str(folder)]))
        pids.append(wait_pid(folder / name))
        wait_until(lambda: psutil.Process(pids[-1]).ppid() == program.pid, "it is an orphan")
    return numbers, pids


def test_a_daemon_of_another_command_is_spared(program, tmp_path):
    """Two at a time: each has its mark."""
    (first, second), (its, other) = two_with_daemons(program, tmp_path)
    program.send(wire.KILL, first)
    assert program.wait(first).code == TERMINATED
    assert (is_gone(its), is_gone(other)) == (True, False)
    program.send(wire.KILL, second)
    program.wait(second)
    assert is_gone(other)


@pytest.mark.parametrize("unmarked", ["env -i", "WARM_COMMAND="])
def test_a_daemon_without_the_mark_is_spared_beside_another_command(program, unmarked, tmp_path):
    """Whose it is nobody can tell; who wants it to live can do so on purpose."""
    (first, _), (its, other) = two_with_daemons(program, tmp_path, unmarked)
    program.send(wire.KILL, first)
    program.wait(first)
    assert (is_gone(its), is_gone(other)) == (False, False)


def test_the_daemons_of_all_commands_end_with_the_helper(program, tmp_path):
    """None is left because there were several."""
    _, pids = two_with_daemons(program, tmp_path)
    assert program.hang_up() == 0
    assert [pid for pid in pids if not is_gone(pid)] == []


def test_what_a_killed_helper_has_left_is_found_by_its_mark(program, tmp_path):
    """Also what nobody was told of, and what is in a session of its own without a parent."""
    numbers, pids = two_with_daemons(program, tmp_path)
    os.kill(program.pid, signal.SIGKILL)
    with Program() as other:
        other.send(wire.SWEEP, 0, wire.join(*(wire.command_mark("token", number) for number in numbers)))
        wait_gone(*pids)


def test_a_daemon_of_an_earlier_command_is_spared(program, tmp_path):
    """What a command that has ended left on purpose is nobody's any more."""
    program.run(f"{daemon('pid')}; while [ ! -e pid ]; do sleep 0.01; done", [str(tmp_path)])
    pid = wait_pid(tmp_path / "pid")
    number = program.exec("sleep 1000")
    program.wait_told(number)
    program.send(wire.KILL, number)
    program.wait(number)
    assert not is_gone(pid)


def test_an_orphan_of_an_earlier_command_is_spared_when_it_gets_one_late(program, tmp_path):
    """It was born before the command that is killed now, and lost its parent while that runs."""
    os.mkfifo(tmp_path / "fifo")
    inner = "sh -c 'exec >/dev/null 2>&1; setsid sleep 1000 & echo $! > pid; read x < fifo' >/dev/null 2>&1 &"
    program.run(f"setsid {inner} while [ ! -e pid ]; do sleep 0.01; done", [str(tmp_path)])
    pid = wait_pid(tmp_path / "pid")
    program.run("sleep 0.05")  # the clock of processes has ticks of 10 ms
    number = program.exec("sleep 1000")
    program.wait_told(number)
    (tmp_path / "fifo").write_text("go\n")
    wait_until(lambda: psutil.Process(pid).ppid() == program.pid, "it has lost its parent")
    program.send(wire.KILL, number)
    program.wait(number)
    assert not is_gone(pid)


def test_a_family_is_looked_for_without_a_leader_whose_number_is_taken():
    """A process that got the number of a leader long gone, and its children, are somebody else's."""

    def process(pid, parent, session):
        return family.Process(pid, [b"S", b"%d" % parent, b"%d" % pid, b"%d" % session, *[b"0"] * 15, b"7"])

    reused, child, orphan = process(500, 1, 500), process(501, 500, 500), process(502, os.getpid(), 400)
    stray = process(503, 1, 500)
    everyone = [reused, child, orphan]
    for start in (family.ANY, 7):
        assert family.members({500: start}, everyone, lambda p: p is orphan) == everyone
    for start in (family.GONE, 6):
        assert family.members({500: start}, everyone, lambda p: p is orphan) == [orphan]
    assert family.members({500: family.GONE}, [orphan, stray], family.nobodys) == [stray]


@pytest.mark.parametrize("how", ["the channel is closed", "SIGTERM", "stdout is closed"])
def test_the_end_of_the_helper_ends_what_runs(program, how, tmp_path):
    """Deaf to TERM, in sessions of their own, waiting for credit: all of it. What has ended left its daemon: that lives."""
    program.run(f"{daemon('daemon')}; while [ ! -e daemon ]; do sleep 0.01; done", [str(tmp_path)])
    program.credit = False
    names = ["deaf to TERM", "a session of its own", "stopped"]
    for name in names:
        command = FAMILIES[name].replace("pid", name.replace(" ", ""))
        program.exec(command, [str(tmp_path)])
    program.exec("echo $$ > flood; trap '' TERM; while :; do echo x; done", [str(tmp_path)])
    pids = [wait_pid(tmp_path / name.replace(" ", "")) for name in [*names, "flood"]]
    if how == "the channel is closed":
        assert program.hang_up() == 0
    elif how == "SIGTERM":
        program.process.terminate()
        assert program.end() == 0
    else:
        program.process.stdout.close()
        program.process.wait(30)
        program.process.stdout = open(os.devnull, "rb")
    assert [pid for pid in pids if not is_gone(pid)] == []
    os.kill(wait_pid(tmp_path / "daemon"), signal.SIGKILL)


def test_what_waits_for_descriptors_is_not_started_when_the_helper_ends(tmp_path):
    """Not even when those that run are gone, and there is room."""
    with Program(limit_files=64) as program:
        for number in range(60):
            program.exec(f"echo ran > ran{number}; sleep 1000", [str(tmp_path)])
        wait_until((tmp_path / "ran10").exists, "some run")
        program.ping()
        assert program.hang_up() == 0
        assert len(list(tmp_path.iterdir())) < 40


def test_signals_that_a_terminal_sends_do_not_end_the_helper(program):
    """It ends with its channel, or when it is told to."""
    for number in (signal.SIGHUP, signal.SIGINT):
        program.process.send_signal(number)
    assert program.run("echo on").out == b"on\n"


@pytest.fixture
def blind():
    """A helper on a system without /proc."""
    source = bundle().replace(b"PROC = '/proc'", b"PROC = '/no/proc'")
    assert source != bundle()
    with Program(source=source) as program:
        yield program


def test_without_proc_the_group_is_ended(blind, tmp_path):
    """Deaf to TERM, stopped: all that stays in the command's process group."""
    command = "; ".join(
        FAMILIES[name].replace("; wait", "").replace("& wait", "&").replace("pid", name[:4])
        for name in ("plain", "deaf to TERM", "stopped")
    )
    number = blind.exec(f"{command.replace('&;', '&')}; wait", [str(tmp_path)])
    pids = [wait_pid(tmp_path / name[:4]) for name in ("plain", "deaf to TERM", "stopped")]
    assert b" " not in blind.wait_told(number)
    blind.send(wire.KILL, number)
    assert blind.wait(number).code in (TERMINATED, KILLED)
    wait_gone(*pids)
    assert blind.run("echo usable").out == b"usable\n"


def test_a_sweep_ends_what_a_killed_helper_ran(tmp_path, program):
    """As the killed one told of it."""
    told, pids = leave(tmp_path)
    assert not any(map(is_gone, pids))
    program.send(wire.SWEEP, 0, wire.join(*told))
    program.ping()
    wait_gone(*pids)


def leave(folder):
    """Have a helper killed while two commands run; return what it told of them, and processes of them."""
    program = Program().__enter__()
    names = ("deaf to TERM", "a session of its own")
    for name in names:
        (folder / name).mkdir()
    numbers = [program.exec(FAMILIES[name], [str(folder / name)]) for name in names]
    told = [program.wait_told(number) for number in numbers]
    pids = [wait_pid(folder / name / "pid") for name in names]
    program.process.kill()
    program.process.wait()
    program.__exit__(None, None, None)
    return told, pids


def test_a_sweep_spares_a_process_that_got_the_number(program):
    """It began at another time."""
    other = program.exec("echo $$; sleep 1000")
    pid, start = program.wait_told(other).split()
    with Program() as sweeper:
        sweeper.send(wire.SWEEP, 0, wire.join(b"%s %d" % (pid, int(start) - 1), b"%s %d" % (pid, int(start) + 1)))
        sweeper.ping()
        assert not is_gone(int(pid))
        sweeper.send(wire.SWEEP, 0, b"%s %s" % (pid, start))
        sweeper.ping()
    assert program.wait(other).code == KILLED


def test_a_sweep_finds_the_session_of_a_leader_that_has_gone(program, tmp_path):
    """Its number cannot have been given to another while the session lives."""
    helper = Program().__enter__()
    os.mkfifo(tmp_path / "fifo")
    number = helper.exec("sleep 1000 & echo $! > pid; read x < fifo", [str(tmp_path)])
    told = helper.wait_told(number)
    pid = wait_pid(tmp_path / "pid")
    (tmp_path / "fifo").write_text("go\n")
    wait_gone(int(told.split()[0]))
    helper.process.kill()
    helper.process.wait()
    helper.__exit__(None, None, None)
    program.send(wire.SWEEP, 0, told)
    program.ping()
    wait_gone(pid)
