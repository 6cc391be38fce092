"""The shell before a process that talks through its stdin, by each shell that may run it."""

import os
import shutil
import signal
import subprocess

import pytest

from pool.backends.shell import EOF_GRACE, KILL_GRACE, MARK, PipedCommand
from pool.errors import FileOperationFailed, PathEscapeError
from tests.support.processes import is_gone, wait_gone, wait_pid
from tests.support.services import require_service

SHELLS = [["dash"], ["bash"], ["bash", "--posix"], ["busybox", "sh"]]


@pytest.fixture(params=SHELLS, ids=" ".join)
def shell(request):
    require_service(request.param[0], shutil.which(request.param[0]))
    return request.param


class Piped:
    """A command under way; a context manager that kills what a failed test has left.

    *eof_grace*, *kill_grace*: other than its own. At first it has a minute to end by itself when its input has ended.
    """

    def __init__(self, shell, argv, folders, env=None, login_shell="sh", eof_grace=60, kill_grace=KILL_GRACE):
        self.command = PipedCommand(argv, [str(folder) for folder in folders], env or {}, "owner")
        self.line = self.command.line(login_shell)
        for place, grace in ((f"sleep {EOF_GRACE}", eof_grace), (f"sleep {KILL_GRACE}", kill_grace)):
            assert self.line.count(place) == 1
            self.line = self.line.replace(place, f"sleep {grace}")
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [*shell, "-c", self.line], stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
        )
        self.send(self.command.setup)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()

    def send(self, data):
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def end(self, data=b""):
        """Send the last of its input; returns what it wrote."""
        self.stdout, self.stderr = self.process.communicate(data, timeout=60)
        return self.stdout

    @property
    def exit_code(self):
        return self.command.exit_code(self.stderr.decode())

    @property
    def said(self):
        return self.command.said(self.stderr.decode())


@pytest.mark.parametrize("code", [0, 254])
def test_an_exit_code_is_told_and_no_notice(shell, tmp_path, code):
    """At the end of stderr, which is the process's own otherwise. 254 is also that of a notice."""
    with Piped(shell, ["sh", "-c", f"echo oops >&2; exit {code}"], [tmp_path]) as piped:
        piped.process.wait(60)  # by itself, though its input goes on
        piped.end()
        assert (piped.exit_code, piped.said) == (code, "oops")
        piped.command.raise_notice(254, piped.stderr.decode())


def test_a_login_shell_of_another_family_starts_a_bourne_shell(tmp_path):
    """Which then is the same."""
    with Piped(["sh"], ["sh", "-c", "cat; exit 7"], [tmp_path], {"A": "b"}, login_shell="fish") as piped:
        assert piped.line.startswith("exec /bin/sh -c ")
        assert piped.end(b"data") == b"data"
        assert piped.exit_code == 7


def test_a_signal_is_told_as_shells_do(shell, tmp_path):
    """128 + its number."""
    with Piped(shell, ["sh", "-c", "kill -KILL $$"], [tmp_path]) as piped:
        piped.process.wait(60)
        piped.end()
        assert piped.exit_code == 137


def test_a_process_that_is_cut_off_tells_no_code():
    """Nor one that has said what looks like one."""
    command = PipedCommand(["true"], ["/"], {}, "owner")
    assert command.exit_code("") is None
    assert command.exit_code("exit 3\n") is None
    assert command.exit_code(f"{command.token} exit ") is None
    assert command.exit_code(f"talk\n{command.token} exit 3\n") == 3


def test_bytes_go_through_unharmed(shell, tmp_path):
    """A megabyte of all of them, in at stdin and out at stdout."""
    data = os.urandom(1 << 20) + bytes(range(256))
    with Piped(shell, ["cat"], [tmp_path]) as piped:
        assert piped.end(data) == data
        assert piped.exit_code == 0
        assert piped.said == ""


def test_it_answers_before_its_input_ends(shell, tmp_path):
    """Nothing holds back what was written."""
    with Piped(shell, ["cat"], [tmp_path]) as piped:
        for text in (b"one\n", b"two\n"):
            piped.send(text)
            assert piped.process.stdout.readline() == text


def test_arguments_arrive_as_they_are(shell, tmp_path):
    """Quotes, newlines, dollars, empty ones."""
    words = ["a b", "", "'", '"', "$HOME", "\n", "`x`", "\\n", "ü", "*"]
    with Piped(shell, ["printf", "%s|", *words], [tmp_path]) as piped:
        assert piped.end().decode() == "".join(f"{word}|" for word in words)


def test_it_runs_in_the_folder_with_its_environment(shell, tmp_path):
    """And the mark, which names the owner."""
    (tmp_path / "a b").mkdir()
    env = {"SECRET": "it's\n$x"}
    with Piped(shell, ["sh", "-c", 'pwd; printf "%s" "$SECRET"'], [tmp_path, tmp_path / "a b"], env) as piped:
        assert piped.end().decode() == f"{tmp_path}/a b\nit's\n$x"
    with Piped(shell, ["env"], [tmp_path]) as piped:
        assert f"{MARK}=owner.{piped.command.token}\n" in piped.end().decode()


def test_the_environment_is_seen_by_nobody_else(shell, tmp_path):
    """Neither in the arguments nor in the environment of the shells before it."""
    script = "echo $$; read -r line"
    with Piped(shell, ["sh", "-c", script, "argument-5ecret"], [tmp_path], {"SECRET": "value-5ecret"}) as piped:
        own = int(piped.process.stdout.readline())
        assert "5ecret" not in piped.line
        family = [int(pid) for pid in os.listdir("/proc") if pid.isdigit()]
        seen = []
        for pid in family:
            for file in ("cmdline", "environ"):
                try:
                    with open(f"/proc/{pid}/{file}", "rb") as proc:
                        if b"5ecret" in proc.read():
                            seen.append((pid, file))
                except OSError:
                    continue
        assert set(seen) == {(own, "cmdline"), (own, "environ")}
        piped.end(b"\n")


def test_no_variable_of_the_script_reaches_the_process(shell, tmp_path):
    """Its environment is the caller's."""
    with Piped(shell, ["env"], [tmp_path], {"A": "b"}) as piped:
        assert b"_pool" not in piped.end()


def test_a_missing_folder_is_told_at_once(shell, tmp_path):
    """Though nobody has ended its input; nothing runs."""
    with Piped(shell, ["touch", str(tmp_path / "ran")], [tmp_path, tmp_path / "no"]) as piped:
        piped.process.wait(60)
        piped.end()
        with pytest.raises(FileOperationFailed, match="no such folder"):
            piped.command.raise_notice(254, piped.stderr.decode())
        assert piped.exit_code is None
        assert not (tmp_path / "ran").exists()


def test_a_folder_outside_of_its_root_is_told_at_once(shell, tmp_path):
    """By a symlink; nothing runs."""
    (tmp_path / "root").mkdir()
    (tmp_path / "root/link").symlink_to(tmp_path)
    folders = [tmp_path / "root", tmp_path / "root/link"]
    with Piped(shell, ["touch", str(tmp_path / "ran")], folders) as piped:
        piped.process.wait(60)
        piped.end()
        with pytest.raises(PathEscapeError, match=f"through a symlink, to '{tmp_path}'"):
            piped.command.raise_notice(254, piped.stderr.decode())
        assert not (tmp_path / "ran").exists()


def test_a_process_that_does_not_end_with_its_input_is_killed(shell, tmp_path):
    """TERM, then KILL; with what it has started, in whatever session."""
    script = f"""
trap '' TERM HUP
setsid sh -c "trap '' TERM; echo \\$\\$ > {tmp_path}/child; while :; do sleep 1; done" &
echo $$ > {tmp_path}/main
while :; do sleep 1; done"""
    with Piped(shell, ["sh", "-c", script], [tmp_path], eof_grace=EOF_GRACE) as piped:
        pids = [wait_pid(tmp_path / name) for name in ("main", "child")]
        piped.end()
        wait_gone(*pids)


def test_a_process_may_clean_up_when_its_input_ends(shell, tmp_path):
    """TERM comes after a moment, KILL after another."""
    clean_up = f"sleep 0.1; echo bye; touch {tmp_path}/cleaned; exit 5"
    script = f"trap '{clean_up}' TERM; echo ready; while :; do sleep 0.01; done"
    with Piped(shell, ["sh", "-c", script], [tmp_path], eof_grace=EOF_GRACE, kill_grace=60) as piped:
        assert piped.process.stdout.readline() == b"ready\n"
        assert piped.end() == b"bye\n"
        assert (tmp_path / "cleaned").exists()
        assert piped.exit_code == 5


def test_what_a_process_leaves_ends_with_it(shell, tmp_path):
    """Though its input goes on, and though its children hold its output."""
    script = f"setsid sleep 1000 & echo $! > {tmp_path}/a; sleep 1000 & echo $! > {tmp_path}/b; exit 3"
    with Piped(shell, ["sh", "-c", script], [tmp_path]) as piped:
        pids = [wait_pid(tmp_path / name) for name in ("a", "b")]
        piped.process.wait(60)
        piped.end()
        assert piped.exit_code == 3
        wait_gone(*pids)


def test_another_process_is_not_taken_for_its_own(shell, tmp_path):
    """Two of one owner, of which one ends."""
    with Piped(shell, ["cat"], [tmp_path]) as lives, Piped(shell, ["cat"], [tmp_path]) as ends:
        ends.end()
        lives.send(b"there\n")
        assert lives.process.stdout.readline() == b"there\n"
        assert not is_gone(lives.process.pid)
