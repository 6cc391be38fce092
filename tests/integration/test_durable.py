"""Commands that outlive the connection and the worker: started once, followed by whoever comes."""

import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from pool.errors import (
    BackendUnavailable,
    CommandFailed,
    CommandLost,
    CommandTimeout,
    ConfigError,
    FileMissing,
    FileOperationFailed,
)
from tests.support.processes import has_pid, wait_gone, wait_pid
from tests.support.rigs import Rig, login
from tests.support.waiting import PATIENCE, wait_until


class Running:
    """A call in a thread of its own."""

    def __init__(self, backend, command, **options):
        self.result, self.seen = None, b""
        self._arguments = backend, command, options
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self):
        backend, command, options = self._arguments
        try:
            self.result = backend.exec(command, on_output=self._see, encoding=None, **options)
        except BaseException as error:
            self.result = error

    def _see(self, data, _stream):
        self.seen += data

    def join(self):
        self.thread.join(60)
        assert not self.thread.is_alive()
        return self.result


def keeper_of(rig, name):
    return int((rig.root / ".pool" / "durable" / name / "keeper").read_text().split()[0])


STEPS = (
    "echo once >> ran; echo $$ > pid; echo one; echo err >&2; until [ -e go ]; do sleep 0.01; done; echo two; exit 3"
)


def test_a_durable_command_is_like_any_other(rig):
    """Output by stream, exit code, usage; asked for again by its name it is not run again."""
    backend = rig.backend()
    (rig.root / "go").touch()
    for _ in range(2):
        result = backend.exec(STEPS, durable="task-1", check=False)
        assert (result.exit_code, result.stdout, result.stderr) == (3, "one\ntwo\n", "err\n")
        assert result.cpu_seconds > 0
        assert result.max_rss > 1 << 16
    with pytest.raises(CommandFailed, match="exit code 3"):
        backend.exec(STEPS, durable="task-1")
    assert (rig.root / "ran").read_text() == "once\n"
    assert (rig.root / ".pool" / "durable" / "task-1").stat().st_mode & 0o777 == 0o700


def test_a_durable_command_reads_what_it_was_given_first(rig):
    """It ran once, with that; with other things to read it would be another command."""
    backend, big = rig.backend(), "line\n" * 100_000
    for _ in range(2):
        result = backend.exec("echo once >> ran; wc -l; head -n 1 <&0", durable="task-1", stdin=big)
        assert result.stdout.split() == ["100000"]
    with pytest.raises(ConfigError, match="another command"):
        backend.exec("echo once >> ran; wc -l; head -n 1 <&0", durable="task-1", stdin="line\n")
    assert (rig.root / "ran").read_text() == "once\n"


def test_the_connection_goes_and_the_command_stays(rig):
    """Who follows is told; the next call goes on with the same command, from its first byte."""
    backend = rig.backend()
    first = Running(backend, STEPS, durable="task-1", check=False)
    pid = wait_pid(rig.root / "pid")
    wait_until(lambda: first.seen.count(b"\n") == 2, "the first output")
    backend.destroy()
    assert isinstance(first.join(), Exception)
    assert psutil.pid_exists(pid)
    second = Running(rig.backend(), STEPS, durable="task-1", check=False)
    wait_until(lambda: second.seen.count(b"\n") == 2, "the output again")
    (rig.root / "go").touch()
    result = second.join()
    assert (result.exit_code, result.stdout, result.stderr) == (3, b"one\ntwo\n", b"err\n")
    assert (rig.root / "ran").read_text() == "once\n"
    wait_gone(pid)


def test_two_nodes_follow_the_same_command(rig):
    """However many ask for it at once, one command runs, and all see it whole."""
    backends = [rig.backend() for _ in range(4)]
    for backend in backends:
        backend.exec("true")
    runs = [Running(backend, STEPS, durable="task-1", check=False) for backend in backends * 2]
    wait_until(lambda: all(run.seen.count(b"\n") == 2 for run in runs), "all follow")
    (rig.root / "go").touch()
    assert [(run.join().exit_code, run.seen.count(b"\n")) for run in runs] == [(3, 3)] * 8
    assert (rig.root / "ran").read_text() == "once\n"


def test_a_timeout_ends_it_for_good(rig):
    """Also what it left in sessions of their own; and whoever asks again is told the same."""
    backend = rig.backend()
    command = "trap '' TERM; setsid sleep 1000 & echo $! > other; echo $$ > pid; echo last words; sleep 1000"
    for seconds in PATIENCE:
        for _ in range(2):
            with pytest.raises(CommandTimeout, match=f"killed after {seconds:g} s") as told:
                backend.exec(command, durable=f"task-{seconds:g}", timeout=seconds)
        if told.value.tail and has_pid(rig.root / "pid"):
            break
    assert told.value.tail == "last words"
    wait_gone(wait_pid(rig.root / "pid"), wait_pid(rig.root / "other"))


def test_the_timeout_goes_on_while_nobody_follows(rig):
    """It counts from the start of the command, whoever asks, and without anybody."""
    backend = rig.backend()
    first = Running(backend, "echo $$ > pid; sleep 1000", durable="task-1", timeout=5)
    pid = wait_pid(rig.root / "pid")
    backend.destroy()
    first.join()
    wait_gone(pid)
    with pytest.raises(CommandTimeout, match="killed after 5 s"):
        rig.backend().exec("echo $$ > pid; sleep 1000", durable="task-1", timeout=5)
    with pytest.raises(CommandTimeout, match="killed when its time was over"):
        rig.backend().exec("echo $$ > pid; sleep 1000", durable="task-1")


def test_a_cancel_ends_it(rig):
    """An exception in on_output cancels the call, and that the command."""

    def refuse(*_):
        raise KeyError("enough")

    backend = rig.backend()
    with pytest.raises(KeyError):
        backend.exec("echo $$ > pid; echo out; sleep 1000", durable="task-1", on_output=refuse)
    wait_gone(wait_pid(rig.root / "pid"))
    assert backend.exec("echo $$ > pid; echo out; sleep 1000", durable="task-1", check=False).exit_code == 143


def test_a_name_belongs_to_one_command(rig):
    """Never another one's output."""
    backend = rig.backend()
    assert backend.exec("echo mine", durable="task-1").stdout == "mine\n"
    with pytest.raises(ConfigError, match="another command"):
        backend.exec("echo yours", durable="task-1")
    assert backend.exec("echo yours", durable="task-2").stdout == "yours\n"


@pytest.mark.parametrize("name", ["", ".", "../x", "a/b", "x" * 201, 7, "a b"])
def test_a_bad_name_is_refused(rig, name):
    """It becomes the name of a folder."""
    with pytest.raises(ConfigError, match="durable="):
        rig.backend().exec("true", durable=name)


def test_a_folder_that_is_missing_is_told_each_time(rig):
    """What could not be started is not started by the next call either."""
    backend = rig.backend()
    for _ in range(2):
        with pytest.raises(FileMissing):
            backend.exec("true", cwd="nowhere", durable="task-1")


def test_a_lost_keeper_is_told(rig):
    """After a restart of the host, or a kill -9 of the keeper: a clear error, each time, and no second run."""
    backend = rig.backend()
    running = Running(backend, STEPS, durable="task-1")
    pid = wait_pid(rig.root / "pid")
    os.kill(keeper_of(rig, "task-1"), signal.SIGKILL)
    assert isinstance(running.join(), CommandLost)
    with pytest.raises(CommandLost, match="restarted"):
        backend.exec(STEPS, durable="task-1")
    assert (rig.root / "ran").read_text() == "once\n"
    os.kill(pid, signal.SIGKILL)


def test_another_boot_is_no_boot_of_this_machine(rig):
    """A keeper of before the restart has a number that may be another's now."""
    backend = rig.backend()
    running = Running(backend, STEPS, durable="task-1", check=False)
    wait_until(lambda: b"one" in running.seen, "it follows: its keeper it knows by then, and looks up no more")
    file = rig.root / ".pool" / "durable" / "task-1" / "keeper"
    pid, start, _boot, digest = file.read_text().split()
    file.write_text(f"{pid} {start} another-boot {digest}")
    with pytest.raises(CommandLost):
        rig.backend().exec(STEPS, durable="task-1")
    (rig.root / "go").touch()
    assert running.join().exit_code == 3


def test_much_output_is_kept_head_and_tail(rig):
    """The host's files are bounded; what is left out is told, and the command waits for nobody."""
    backend = rig.backend(max_output=100_000)
    command = "echo first; head -c 20000000 /dev/zero | tr '\\0' x; echo; echo last"
    for _ in range(2):
        result = backend.exec(command, durable="task-1")
        assert result.truncated
        assert result.stdout.startswith("first\nxxx")
        assert result.stdout.endswith("xxx\nlast\n")
    files = list((rig.root / ".pool" / "durable" / "task-1").glob("*.out"))
    assert len(files) <= 8
    assert sum(file.stat().st_size for file in files) < 2_000_000


def test_a_follower_that_does_not_read_holds_up_nobody(rig):
    """Neither the command nor another call on the connection."""
    backend, block = rig.backend(), threading.Event()

    def slow(*_):
        block.wait(60)

    command = "head -c 30000000 /dev/zero; touch done"
    result = []
    thread = threading.Thread(target=lambda: result.append(backend.exec(command, durable="task-1", on_output=slow)))
    thread.start()
    try:
        wait_until((rig.root / "done").exists, "the command has ended", 30)
        assert backend.exec("echo other").stdout == "other\n"
    finally:
        block.set()
        thread.join(60)
    assert result[0].exit_code == 0


def test_what_ended_long_ago_is_removed(rig):
    """A day after the end; what runs stays."""
    backend = rig.backend()
    backend.exec("true", durable="old")
    running = Running(backend, STEPS, durable="runs", check=False)
    wait_pid(rig.root / "pid")
    folder = rig.root / ".pool" / "durable"
    long_ago = time.time() - 86_401
    for name in ("old", "runs"):
        for file in [*(folder / name).iterdir(), folder / name]:
            os.utime(file, (long_ago, long_ago))
    backend.exec("true", durable="new")
    wait_until(lambda: not (folder / "old").exists(), "the old one is gone")
    assert (folder / "runs").exists()
    (rig.root / "go").touch()
    assert running.join().exit_code == 3


def test_a_kind_without_durable_commands_says_so(tmp_path):
    """A clear error, and nothing runs."""
    with Rig("local", tmp_path) as rig, pytest.raises(ConfigError, match="no durable commands"):
        rig.backend().exec("touch ran", durable="task-1")
    assert not (rig.root / "ran").exists()


def test_by_channel_there_is_none(server, tmp_path):
    """The error names the way that commands travel."""
    with Rig("ssh-channel", tmp_path, server.info) as rig, pytest.raises(ConfigError, match=r"no helper \(channel\)"):
        rig.backend().exec("true", durable="task-1")


WORKER = """
import json, sys
from pool.backends.ssh import RemoteFilesystemBackend
config = json.loads(sys.argv[1])
print(RemoteFilesystemBackend(**config).exec(sys.argv[2], durable="task-1", check=False).output, flush=True)
"""


def test_a_killed_worker_leaves_it_running_and_the_next_one_goes_on(rig, server):
    """Kill -9, several times in a row: it ran once, and whoever comes last has all of it."""
    import json

    config = {**login(server.info), "root_dir": str(rig.root)}
    arguments = [sys.executable, "-c", WORKER, json.dumps(config), STEPS]
    for _ in range(3):
        worker = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
        wait_pid(rig.root / "pid")
        worker.kill()
        worker.wait()
    (rig.root / "go").touch()
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=60)
    assert sorted(done.stdout.split()) == ["err", "one", "two"]
    assert (rig.root / "ran").read_text() == "once\n"


def test_the_helper_is_killed_and_the_command_stays(rig, server):
    """It is not what the helper ran that ends with it."""
    backend = rig.backend()
    running = Running(backend, STEPS, durable="task-1", check=False)
    pid = wait_pid(rig.root / "pid")
    helper = psutil.Process(keeper_of(rig, "task-1")).parent()
    helper.kill()
    assert isinstance(running.join(), BackendUnavailable)
    (rig.root / "go").touch()
    assert backend.exec(STEPS, durable="task-1", check=False).stdout == "one\ntwo\n"
    wait_gone(pid)
    assert (rig.root / "ran").read_text() == "once\n"


def test_a_folder_that_cannot_be_made_is_no_lost_command(rig):
    """The reason is told, and when it is gone the same name works."""
    backend = rig.backend()
    backend.write(".pool/durable", "in the way")
    with pytest.raises(FileOperationFailed, match="start of"):
        backend.exec("echo in", durable="task-1")
    backend.rm(".pool/durable")
    assert backend.exec("echo in", durable="task-1").stdout == "in\n"


def test_a_root_that_is_gone_is_not_made_again(rig):
    """A request that comes late, from a worker that was killed, starts nothing where nothing is any more."""
    backend = rig.backend()
    backend.exec("true")
    rig.root.rename(rig.root.with_name("moved"))
    with pytest.raises(FileMissing):
        backend.exec("true", durable="task-1")
    assert not rig.root.exists()


def test_the_first_commands_of_new_connections_end(rig):
    """A short command may have ended before its keeper looks, or close its output before it ends."""
    for number in range(12):
        backend = rig.backend()
        for command in ("true", "exec >&- 2>&-; sleep 0.01"):
            assert backend.exec(command, durable=f"{len(command)}-{number}", timeout=30).exit_code == 0
        backend.destroy()
