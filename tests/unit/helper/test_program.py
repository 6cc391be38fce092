"""The helper as a process: commands, their output and their credit."""

import os
import random
import signal
import sys
from pathlib import Path

import psutil
import pytest

from pool.helper import wire
from pool.helper.bundle import bundle
from tests.support.helper_program import Program
from tests.support.processes import is_gone, living_below, wait_gone, wait_pid
from tests.support.waiting import wait_until


@pytest.fixture
def program():
    with Program() as program:
        yield program


def test_stdout_and_stderr_are_told_apart(program):
    """Each with what was written to it, and the exit code."""
    call = program.run("echo out; echo err >&2; exit 7")
    assert (bytes(call.out), bytes(call.err), call.code) == (b"out\n", b"err\n", 7)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_a_death_by_signal_is_told_as_a_shell_would(program, number):
    """128 and the signal's number."""
    assert program.run(f"kill -{number.value} $$").code == 128 + number


def test_the_time_and_the_memory_of_a_command_are_told(program):
    """Of its first process and what that has waited for: seconds of the CPU, and bytes."""
    script = "import time\\nx = bytearray(50 << 20)\\nwhile time.process_time() < 0.3: pass"
    seconds, size = program.run(f"printf '{script}' | {sys.executable} -I -S -").usage
    assert 0.3 <= seconds < 60
    assert 50 << 20 <= size < 500 << 20


def test_a_command_has_an_empty_stdin(program):
    """It neither waits for input nor takes the frames of others."""
    assert program.run("cat; echo read").out == b"read\n"


def test_a_command_leads_a_session_of_its_own(program):
    """So that it can be ended with all it started."""
    pid, session = program.run("echo $$; ps -o sid= -p $$").out.split()
    assert pid == session


def test_a_command_holds_nothing_of_the_helper(program):
    """No descriptor beyond the three, and no signal is blocked or ignored."""
    program.exec("sleep 1000")
    descriptors, status = bytes(program.run("ls /proc/self/fd; echo; cat /proc/self/status").out).decode().split("\n\n")
    assert descriptors.split() == ["0", "1", "2", "3"]  # the last is the folder that ls looks at
    masks = dict(line.split(":\t") for line in status.splitlines() if line.startswith("Sig"))
    assert int(masks["SigBlk"], 16) == 0
    assert int(masks["SigIgn"], 16) & 0x7FFFFFFF == 0


@pytest.mark.parametrize("folder", ["/no/such/folder", "/etc/passwd"])
def test_a_folder_that_is_none_is_refused(program, folder):
    """With its name; nothing was run."""
    assert program.run("echo ran", [folder]).failure == [b"cwd", folder.encode()]


def test_a_command_runs_in_the_last_of_its_folders(program, tmp_path):
    """Each inside the one before it."""
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    assert program.run("pwd -P", [str(tmp_path), str(inner)]).out.decode() == f"{inner.resolve()}\n"


def test_a_symlink_out_of_the_root_is_refused(program, tmp_path):
    """And told where it leads to."""
    (tmp_path / "root").mkdir()
    (tmp_path / "rooted").mkdir()
    (tmp_path / "root" / "way").symlink_to(tmp_path / "rooted")
    call = program.run("echo ran", [str(tmp_path / "root"), str(tmp_path / "root" / "way")])
    assert call.failure == [b"escape", bytes((tmp_path / "rooted").resolve())]


def test_a_refused_folder_is_not_held(program, tmp_path):
    """The helper works in no folder of anybody: it could not be removed, or its disk not be unmounted."""
    outside = tmp_path / "outside"
    outside.mkdir()
    assert program.run("true", [str(tmp_path), "/usr"]).failure == [b"escape", b"/usr"]
    assert os.readlink(f"/proc/{program.pid}/cwd") == "/"
    assert program.run("true", [str(outside), str(outside / "none")]).failure[0] == b"cwd"
    assert os.readlink(f"/proc/{program.pid}/cwd") == "/"


def test_the_environment_is_the_login_s_with_what_the_command_adds():
    """A name that is there already gets the new value, for this command only."""
    with Program(env={"PATH": os.environ["PATH"], "A": "old", "B": "kept", "LINES": "a\nb"}) as program:
        assert program.run('echo "$A $B $C"; echo "$LINES"', A="new", C="x=y z").out == b"new kept x=y z\na\nb\n"
        assert program.run('echo "$A $B $C"').out == b"old kept \n"
        names = {line.split(b"=")[0] for line in bytes(program.run("env").out).splitlines()}
        assert names - {b"PWD", b"OLDPWD", b"SHLVL", b"_"} == {b"PATH", b"A", b"B", b"LINES", b"b", b"WARM_COMMAND"}


def test_a_megabyte_of_environment(program):
    """In many variables: one may have 128 KiB on Linux."""
    variables = {f"V{number}": "x" * 100_000 for number in range(10)}
    assert program.run('echo "$V0$V9" | wc -c', **variables).out.split() == [b"200001"]


def test_more_environment_than_a_process_may_have(program):
    """Is refused as too big, and hurts nobody else."""
    assert program.run("true", V="x" * 200_000).failure == [b"toobig"]
    assert program.run("echo fine").out == b"fine\n"


@pytest.mark.parametrize("size", [99_999, 100_001, 200_000, 3_000_000])
def test_a_command_of_any_length(program, size):
    """Longer ones than an argument may be are read from a file that has no name."""
    call = program.run(f"exit 3; : {'x' * size}")
    assert (call.code, call.out, call.err) == (3, b"", b"")


def test_a_long_command_is_as_any_other(program):
    """Its parameters, its stdin and its output."""
    call = program.run(f'echo "$# $0"; cat; false; echo $?; : {"x" * 150_000}')
    assert call.out == b"0 /bin/sh\n1\n"


def test_bytes_that_look_like_frames_stay_output(program):
    """Whatever a command writes, it cannot speak for the helper."""
    noise = random.Random(7).randbytes(300_000)
    frames = b"".join(wire.frame(kind, 1, b"0 0 0") for kind in (wire.EXIT, wire.DONE, wire.FAILED, wire.OUT))
    data = frames + noise + frames
    script = f"import os, random; f = {frames!r}; os.write(1, f); "
    script += "n = random.Random(7).randbytes(300000); "
    script += "[os.write(1, n[i:i + 4096]) for i in range(0, len(n), 4096)]; os.write(1, f)"
    number = program.exec('exec "$PYTHON" -c "$SCRIPT"', PYTHON=sys.executable, SCRIPT=script)
    assert bytes(program.wait(number).out) == data


def test_a_command_that_closes_its_output_goes_on(program, tmp_path):
    """Its end is its process's end, not its output's."""
    os.mkfifo(tmp_path / "fifo")
    number = program.exec("exec >&- 2>&-; echo $$ > pid; read x < fifo; echo $x > got; exit 5", [str(tmp_path)])
    wait_pid(tmp_path / "pid")
    assert program.calls[number].kind == 0
    (tmp_path / "fifo").write_text("go\n")
    assert program.wait(number).code == 5
    assert (tmp_path / "got").read_text() == "go\n"


def test_output_of_a_child_that_lives_longer_belongs_to_the_command(program):
    """The end is told when nobody writes any more, with the code of the first process."""
    call = program.run("(while kill -0 $$ 2>/dev/null; do sleep 0.05; done; echo late) & echo early; exit 4")
    assert (bytes(call.out), call.code) == (b"early\nlate\n", 4)


def test_without_credit_a_command_waits(program, tmp_path):
    """It can write what its window takes and a pipe holds, while another command runs."""
    program.credit = False
    program.exec("exec 2>/dev/null; yes | { head -c 8388608; echo done > end; }", [str(tmp_path)])
    while len(program.calls[1].out) < wire.WINDOW:
        program.pump()
    for _ in range(20):
        assert program.run("echo meanwhile").out == b"meanwhile\n"
    assert len(program.calls[1].out) == wire.WINDOW
    assert not (tmp_path / "end").exists()
    program.credit = True
    program.send(wire.CREDIT, 1, wire.COUNT.pack(wire.WINDOW))
    assert program.wait(1).code == 0
    assert len(program.calls[1].out) == 8 << 20


def test_the_window_is_for_both_streams_together(program):
    """A command that floods both gets no more than one that floods one."""
    program.credit = False
    number = program.exec("yes & yes >&2")
    call = program.calls[number]
    while len(call.out) + len(call.err) < wire.WINDOW:
        program.pump()
    program.ping()
    assert len(call.out) + len(call.err) == wire.WINDOW
    program.send(wire.KILL, number)
    assert program.wait(number).code == 128 + signal.SIGTERM


def test_a_channel_that_nobody_reads_fills_no_memory(program):
    """The helper reads no output while the channel takes none, and hears its worker all the same."""
    before = psutil.Process(program.pid).memory_info().rss
    numbers = [program.exec("yes") for _ in range(8)]
    wait_until(lambda: len(psutil.Process(program.pid).children()) == 8, "all run")
    for number in numbers:
        program.send(wire.CREDIT, number, wire.COUNT.pack(64 << 20))
    used = []

    def still():
        used.append(psutil.Process(program.pid).cpu_times()[:2])
        return len(used) > 20 and used[-1] == used[-20]

    wait_until(still, "it has taken what it takes")
    assert psutil.Process(program.pid).memory_info().rss - before < 20 << 20
    for number in numbers:
        program.send(wire.KILL, number)
    wait_until(lambda: not psutil.Process(program.pid).children(), "all are ended")
    assert {program.wait(number).code for number in numbers} == {128 + signal.SIGTERM}


def test_more_commands_than_descriptors():
    """Those for which there is none wait for those that run; all succeed, in the order in which they were asked for."""
    with Program(limit_files=64) as program:
        numbers = [program.exec(f"sleep 0.02; echo {number}") for number in range(150)]
        for number in numbers:
            assert program.wait(number).out == b"%d\n" % (number - 1)


def test_commands_leave_descriptors_to_the_rest(tmp_path):
    """With as many commands as there can be, files can be read, and families be found and ended."""
    (tmp_path / "file").write_bytes(bytes(3 * wire.WINDOW))
    with Program(limit_files=64) as program:
        numbers = [program.exec("setsid sleep 1000 & wait") for _ in range(60)]
        wait_until(lambda: living_below(program.pid).count("sleep") > 10, "many run")
        program.credit = False
        reads = [program.file("read", tmp_path / "file", tmp_path) for _ in range(4)]
        while any(len(program.calls[read].out) < wire.WINDOW for read in reads):
            program.pump()
        for number in reversed(numbers):
            program.send(wire.KILL, number)
        assert {program.wait(number).code for number in numbers} <= {128 + signal.SIGTERM, 128 + signal.SIGKILL}
        assert "sleep" not in living_below(program.pid)


def test_a_command_that_waits_can_be_given_up(tmp_path):
    """It is never started."""
    with Program(limit_files=64) as program:
        os.mkfifo(tmp_path / "fifo")
        numbers = [program.exec("read x < fifo", [str(tmp_path)]) for _ in range(60)]
        last = program.exec("echo ran > ran", [str(tmp_path)])
        program.send(wire.KILL, last)
        assert program.wait(last).code == 128 + signal.SIGTERM
        for number in numbers:
            program.send(wire.KILL, number)
        for number in numbers:
            program.wait(number)
        program.ping()
        assert not (tmp_path / "ran").exists()


def test_the_process_of_a_command_that_takes_longer_is_told(program):
    """Its number and since when it runs: after that nobody can be taken for it."""
    number = program.exec("echo $$; exec sleep 1000")
    pid, start = program.wait_told(number).split()
    fields = Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()
    assert int(start) == int(fields[19])
    program.wait_out(number, pid + b"\n")


@pytest.mark.parametrize(
    "nonsense",
    [
        wire.frame(99, 1, b"what"),
        wire.frame(wire.EXEC, 1, b"no count"),
        wire.frame(wire.CREDIT, 1, b"x"),
        wire.frame(wire.SWEEP, 0, b"no process"),
        b"GET / HTTP/1.1\r\nHost: helper\r\n\r\n",
    ],
)
def test_nonsense_from_the_worker_ends_the_helper(program, nonsense):
    """With a line that says so, and with the commands that run."""
    number = program.exec("echo $$; trap '' TERM; while :; do sleep 0.1; done")
    program.wait_out(number, b"\n")
    pid = int(program.calls[number].out)
    program._write(nonsense)
    assert program.end() != 0
    wait_gone(pid)
    assert len(program.errors().splitlines()) == 1
    assert "pool-helper" in program.errors()


FALLBACKS = {
    "missing": (b"os.posix_spawn(", b"os.no_such_spawn("),
    "unable": (b"return os.posix_spawn(", b"raise NotImplementedError\n        return os.posix_spawn("),
}


@pytest.fixture(params=list(FALLBACKS))
def forking(request):
    """A helper on a system where a session cannot be begun by posix_spawn."""
    old, new = FALLBACKS[request.param]
    old, new = (repr(text.decode())[1:-1].encode() for text in (old, new))
    source = bundle().replace(old, new)
    assert source != bundle()
    with Program(source=source) as program:
        yield program


def test_a_durable_command_can_be_ended_though_nobody_reads_what_it_writes(program, tmp_path):
    """Its follower has no credit left, and gets no more."""
    program.credit = False
    command = b"head -c 6000000 /dev/zero; echo $$ > pid; sleep 1000"
    request = [b"name", b"digest", b"100000000", b"0.0", command, b"1", bytes(tmp_path)]
    number = program.open(wire.DURABLE, b"\0".join(request))
    while len(program.calls[number].out) < wire.WINDOW:
        program.pump()
    pid = wait_pid(tmp_path / "pid")
    program.send(wire.KILL, number)
    assert program.wait(number).code == 128 + signal.SIGTERM
    wait_gone(pid)


@pytest.mark.parametrize("name", ["keeper", "refused", "ended"])
def test_a_durable_command_of_which_only_names_are_left_is_gone(program, tmp_path, name):
    """As after a power cut: nobody can tell how it ended, and nothing else is concerned."""
    folder = tmp_path / ".pool" / "durable" / "name"
    folder.mkdir(parents=True)
    if name != "keeper":
        (folder / "keeper").write_text("999999 1 another-boot digest")
    (folder / name).touch()
    request = [b"name", b"digest", b"1000000", b"0.0", b"true", b"1", bytes(tmp_path)]
    call = program.wait(program.open(wire.DURABLE, b"\0".join(request)))
    assert (call.kind, call.payload) == (wire.FAILED, b"gone")
    assert program.run("echo on").out == b"on\n"


def test_without_posix_spawn_it_forks(forking, tmp_path):
    """The same in all that a command can see."""
    call = forking.run('echo out; echo err >&2; cat; echo "$A"; ps -o sid= -p $$; echo $$; exit 7', A="x")
    out, a, session, pid = call.out.split()
    assert (out, a, session, bytes(call.err), call.code) == (b"out", b"x", pid, b"err\n", 7)
    assert forking.run(f"exit 3; : {'x' * 200_000}").code == 3
    assert forking.run("true", V="x" * 200_000).failure == [b"toobig"]
    number = forking.exec("echo $$; sleep 1000 & wait")
    forking.wait_out(number, b"\n")
    forking.send(wire.KILL, number)
    assert forking.wait(number).code == 128 + signal.SIGTERM
    assert is_gone(int(forking.calls[number].out))
    assert not living_below(forking.pid)
