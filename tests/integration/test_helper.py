"""The helper of an SSH host: hosts that cannot run it, helpers that are killed, and crowds. Loopback server and OpenSSH."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

import asyncssh
import psutil
import pytest

from pool.backends import helper, helper_start
from pool.backends.ssh import RemoteFilesystemBackend
from pool.errors import BackendClosed, BackendUnavailable, CommandTimeout, PoolError
from pool.loopback_sshd import LoopbackSshd
from pool.runtime import loop_thread
from tests.support.leaks import no_leaks
from tests.support.openssh import OpenSshd, sshd_binary
from tests.support.processes import has_pid, is_gone, wait_gone, wait_pid
from tests.support.rigs import Rig, login
from tests.support.services import require_service
from tests.support.ssh_servers import KINDS
from tests.support.waiting import PATIENCE, wait_until

PYTHON = shutil.which("python3", path="/usr/bin:/bin:/usr/local/bin") or sys.executable


@pytest.fixture(autouse=True)
def no_memories():
    """What is known of hosts is of this test."""
    helper_start._without.clear()
    yield
    helper_start._without.clear()


@contextmanager
def serving(kind, folder, path=None, **options):
    """A server whose commands have *path* as their PATH."""
    if kind == "openssh":
        require_service("sshd", sshd_binary())
        extra = options.pop("extra_config", [])
        with OpenSshd(folder, extra_config=[*extra, *([f"SetEnv PATH={path}"] if path else [])], **options) as server:
            yield server
    else:
        with pytest.MonkeyPatch.context() as patch:
            if path:
                patch.setenv("PATH", str(path))
            options.pop("max_startups", None)  # it has no such limit
            with LoopbackSshd(folder, home=folder / "home", **options) as server:
                yield server


@pytest.fixture(params=KINDS)
def make(request, tmp_path):
    """``with make(python3=text of a script, **options of the server) as rig``."""

    @contextmanager
    def make(python3=None, **options):
        tools = Path(tempfile.mkdtemp(prefix="pool-tools-"))  # not below pytest's: sshd's user has to see it
        try:
            tools.chmod(0o755)
            for file in Path("/usr/bin").iterdir():
                if not file.name.startswith("python"):
                    (tools / file.name).symlink_to(file)
            if python3:
                (tools / "python3").write_text(f"#!/bin/sh\n{python3}\n")
                (tools / "python3").chmod(0o755)
            with (
                serving(request.param, tmp_path / "sshd", tools if python3 is not None else None, **options) as server,
                no_leaks(),
                Rig("ssh", tmp_path, server.info) as rig,
            ):
                yield rig
        finally:
            shutil.rmtree(tools)

    return make


def describe(backend):
    return backend._launcher.describe


def old(version):
    """A python3 that says it is *version*."""
    script = f"import sys; sys.version_info = {version}; exec(sys.argv.pop(1))"
    return f'shift 3; exec {PYTHON} -I -S -c "{script}" "$@"'


UNABLE = {
    "none": ("", "not found"),
    "too old": (old((3, 5)), "its python3 is 3.5, 3.6 is needed"),
    "broken": (f'exec {PYTHON} -I -c "import no_such_module"', "No module named 'no_such_module'"),
    "says nothing and ends": ("exit 0", "exit code 0"),
    "killed": ("kill -9 $$", "KILL"),
    "hangs": ("sleep 1000", "did not begin within"),
    "hangs and reads": ("exec cat > /dev/null", "did not begin within"),
    "talks without end": ("exec yes", "did not begin within"),
}


@pytest.mark.parametrize("why", UNABLE)
def test_a_host_that_cannot_run_a_helper(make, why, monkeypatch):
    """Its commands and files go over channels of their own; the reason is found once for all connections, and told."""
    monkeypatch.setattr(helper, "START_TIMEOUT", 1.0 if "within" in UNABLE[why][1] else 20.0)
    script, reason = UNABLE[why]
    with make(script and f"echo $$ >> ~/starts-{os.getpid()}\n{script}") as rig:
        starts = rig.info.home / f"starts-{os.getpid()}"
        starts.unlink(missing_ok=True)
        backend, other = (rig.backend(exec_mode="auto") for _ in range(2))
        assert backend.exec("echo on").stdout == "on\n"
        assert describe(backend).startswith("channel: its python3 did not begin")
        assert reason in describe(backend)
        backend.write("file", "content")
        assert other.exec("cat file").stdout == "content"
        assert describe(other) == describe(backend)
        strict = rig.backend(exec_mode="helper")
        with pytest.raises(BackendUnavailable, match="exec_mode='helper'") as caught:
            strict.exec("echo on")
        assert (caught.value.reason, caught.value.retry_after) == ("setup", None)
        assert reason in str(caught.value)
        if script:
            pids = [int(pid) for pid in starts.read_text().split()] if starts.exists() else []
            starts.unlink(missing_ok=True)
            assert len(pids) <= 2  # that of auto, and that of helper
            assert len(pids) == 2 or "within" in reason  # so short a time may end before the script has begun
            for each in (backend, strict):
                each.destroy()
            wait_gone(*pids)


def test_a_host_is_asked_again_after_a_while(make, monkeypatch):
    """Somebody may have installed a python3."""
    with make("[ -e ~/now ] || exit 1; rm ~/now; exec " + PYTHON + ' "$@"') as rig:
        assert rig.backend(exec_mode="auto").exec("echo on").stdout == "on\n"
        (rig.info.home / "now").touch()
        os.chmod(rig.info.home / "now", 0o666)
        monkeypatch.setattr(helper_start, "monotonic", lambda: 1e9)
        backend = rig.backend(exec_mode="auto")
        assert backend.exec("echo on").stdout == "on\n"
        assert describe(backend) == "helper"


@pytest.mark.parametrize("noise", ["echo Welcome; echo warning >&2", "head -c 3000000 /dev/zero"])
def test_a_host_that_talks_first(make, noise):
    """What start-up files print is not taken for the helper's word, nor for a command's."""
    with make(f'{noise}; exec {PYTHON} "$@"') as rig:
        backend = rig.backend(exec_mode="helper")
        result = backend.exec("echo on; echo err >&2")
        assert (result.stdout, result.stderr) == ("on\n", "err\n")


def test_a_helper_that_always_dies_after_its_start(make):
    """Each use says so, none hangs, and it is not started without end."""
    clock = r"\111\0\0\0\0\0\0\0\0010"  # one digit
    greeting = f'printf "pool-helper 1 %s\\n{clock}" "$6"'
    with make(f'printf "%s\\n" $$ >> ~/deaths; head -c "$5" > /dev/null; {greeting}; exit 9') as rig:
        deaths = rig.info.home / "deaths"
        deaths.unlink(missing_ok=True)
        backend = rig.backend(exec_mode="helper")
        for _ in range(3):
            with pytest.raises(BackendUnavailable, match="its helper ended: exit code 9"):
                backend.exec("echo on")
        assert len(deaths.read_text().split()) <= 6  # a use may begin one, and find that the next has died idle
        deaths.unlink()


@pytest.mark.openssh
def test_a_talkative_login_shell(tmp_path):
    """What it prints before every command does no harm to the helper."""
    force = "ForceCommand echo 'Welcome to /nowhere'; echo warning >&2; eval \"$SSH_ORIGINAL_COMMAND\""
    with (
        serving("openssh", tmp_path / "sshd", extra_config=[force]) as server,
        Rig("ssh", tmp_path, server.info) as rig,
    ):
        backend = rig.backend(exec_mode="helper")
        assert backend.exec("pwd -P").stdout == f"{os.path.realpath(rig.root)}\n"
        backend.write("file", "content")
        assert backend.read("file") == "content"


@pytest.mark.openssh
@pytest.mark.parametrize("how", ["exit 0", "exit 1", "kill -9 $$"])
def test_a_login_shell_that_ends_before_the_helper(tmp_path, how):
    """As by a start-up file that leaves when there is no terminal."""
    force = f'ForceCommand case "$SSH_ORIGINAL_COMMAND" in *python3*) {how};; esac; eval "$SSH_ORIGINAL_COMMAND"'
    with (
        serving("openssh", tmp_path / "sshd", extra_config=[force]) as server,
        Rig("ssh", tmp_path, server.info) as rig,
    ):
        backend = rig.backend(exec_mode="auto")
        assert backend.exec("echo on").stdout == "on\n"
        assert describe(backend).startswith("channel: its python3 did not begin")


class HastyServer(asyncssh.SSHServer):
    """Ends every command at once; the reply and the end arrive in one piece. *leaves*: and so does the server, then."""

    leaves = False

    def begin_auth(self, username):
        return False

    def session_requested(self):
        return HastySession()


class HastySession(asyncssh.SSHServerSession):
    said = {"pool-root:": "pool-root:/\n", "pool-watchdog": "pool-watchdog:100\n"}

    def connection_made(self, chan):
        self.chan = chan

    def exec_requested(self, command):
        self.words = [words for mark, words in self.said.items() if mark in command]
        return True

    def session_started(self):
        self.chan.write("".join(self.words))
        self.chan.exit(0 if self.words else 127)
        if HastyServer.leaves:
            asyncio.get_running_loop().call_later(0, self.chan.get_connection().close)


async def use_hasty(use, **options):
    """Await ``use(backend)`` with a backend at such a server, on its own event loop: nothing comes between the two."""
    key = asyncssh.generate_private_key("ssh-ed25519")
    acceptor = await asyncssh.listen("127.0.0.1", 0, server_factory=HastyServer, server_host_keys=[key])
    login = {"port": acceptor.get_port(), "username": "u", "insecure": True, "client_keys": []}
    backend = RemoteFilesystemBackend("127.0.0.1", root_dir="/", **login, **options)
    try:
        await use(backend)
    finally:
        await backend.adestroy()
        acceptor.close()
        await acceptor.wait_closed()


@pytest.mark.parametrize("mode", ["auto", "helper"])
def test_a_helper_that_ends_as_soon_as_its_channel_is_open(mode):
    """No python3, told in the same breath as the channel: the same as a little later."""

    async def use(backend):
        if mode == "auto":
            assert (await backend.aexec("true", check=False)).exit_code == 127
            assert describe(backend) == "channel: its python3 did not begin: exit code 127"
        else:
            for _ in range(20):  # more than there are channels
                with pytest.raises(BackendUnavailable, match="exit code 127"):
                    await backend.aexec("true")

    with no_leaks():
        loop_thread().run(use_hasty(use, exec_mode=mode))


@pytest.mark.parametrize("given", [{}, {"env": {"NAME": "value"}}, {"stdin": "words"}])
def test_a_command_that_ends_as_soon_as_its_channel_is_open(given):
    """What it would have read is dropped; how it ended is told, and its channel is free again."""

    async def use(backend):
        for _ in range(20):
            assert (await backend.aexec("true", check=False, **given)).exit_code == 127

    with no_leaks():
        loop_thread().run(use_hasty(use, exec_mode="channel"))


def test_a_process_that_ends_as_soon_as_its_channel_is_open():
    """As an agent that cannot start."""

    async def use(backend):
        for _ in range(20):
            process = await backend.astart(["true"], env={"NAME": "value"})
            assert await process.receive() == b""
            assert await process.last_words() == "it was cut off"
            await process.close()
            await process.closed

    with no_leaks():
        loop_thread().run(use_hasty(use))


def test_a_connection_that_is_lost_as_soon_as_it_was_made(monkeypatch):
    """It is not taken for one that works."""
    monkeypatch.setattr(HastyServer, "leaves", True)

    async def use(backend):
        for _ in range(3):
            with pytest.raises(BackendUnavailable) as caught:
                await backend.connect()
            assert caught.value.reason == "lost"
            assert not backend.usable

    with no_leaks():
        loop_thread().run(use_hasty(use, exec_mode="channel"))


def test_a_watchdog_that_ends_as_soon_as_it_has_told_the_time(caplog):
    """The host cannot have one: commands go without, and that is said once."""

    async def use(backend):
        backend.trust = lambda: 60.0
        for _ in range(3):
            assert (await backend.aexec("true", check=False)).exit_code == 127

    with no_leaks():
        loop_thread().run(use_hasty(use, exec_mode="channel"))
    assert len([record for record in caplog.records if "the script ended" in record.message]) == 1


# -- the helper that runs


@pytest.fixture(scope="module", params=KINDS)
def server(request, tmp_path_factory):
    """A healthy server, shared by the tests that leave it so."""
    with serving(request.param, tmp_path_factory.mktemp(request.param) / "sshd", max_sessions=2) as server:
        yield server


def helpers(backend):
    """Processes of the backend's helper."""
    token = backend._launcher._helper._token
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            line = process.cmdline()
            if line and line[-1] == token and "python" in line[0]:
                found.append(process)
    return found


STUBBORN = """setsid sh -c 'trap "" TERM; echo $$ > {name}; while :; do sleep 1; done' & wait"""


def test_a_killed_helper_ends_its_commands_and_no_others(rig):
    """Who ran one is told so; its processes end; the connection stays, and gets another helper."""
    backend = rig.backend(exec_mode="helper")
    backend.exec("true")
    logins = rig.logins()

    async def main():
        tasks = [asyncio.create_task(backend.aexec(STUBBORN.format(name=f"pid{n}"))) for n in range(2)]
        pids = [await asyncio.to_thread(wait_pid, rig.root / f"pid{n}") for n in range(2)]
        for process in await asyncio.to_thread(helpers, backend):
            process.kill()
        return pids, await asyncio.gather(*tasks, return_exceptions=True)

    pids, errors = loop_thread().run(main())
    for error in errors:
        assert isinstance(error, BackendUnavailable)
        assert (error.reason, error.retry_after) == ("lost", 0.0)
        assert "helper" in str(error)
    wait_gone(*pids)
    assert backend.exec("echo again").stdout == "again\n"
    assert describe(backend) == "helper"
    assert rig.logins() == logins


def test_a_helper_that_was_killed_idle_is_replaced_on_use(rig):
    """Nobody notices."""
    backend = rig.backend(exec_mode="helper")
    for _ in range(3):
        backend.write("file", "content")
        first = backend._launcher._helper
        for process in helpers(backend):
            process.kill()
        wait_until(lambda: first.closed, "its end is noticed")
        assert backend.exec("cat file").stdout == "content"


def test_a_helper_killed_under_a_transfer(rig):
    """The write fails and is not half done; no temporary file stays for a reader to see as the file."""
    backend = rig.backend(exec_mode="helper")
    backend.write("file", "old")

    async def main():
        task = asyncio.create_task(backend.awrite("file", bytes(200 << 20)))
        pids = await asyncio.to_thread(helpers, backend)
        await asyncio.to_thread(wait_until, lambda: len(os.listdir(rig.root)) > 1, "it writes")
        for process in pids:
            process.kill()
        with pytest.raises(BackendUnavailable):
            await task

    loop_thread().run(main())
    assert backend.read("file") == "old"


def test_five_hundred_commands_at_once(rig):
    """On one connection, with two sessions: all succeed, each with its own output."""
    backend, logins = rig.backend(exec_mode="helper"), rig.logins()

    async def main():
        return await asyncio.gather(*(backend.aexec(f"echo {n}; sleep 0.1; echo {n}") for n in range(500)))

    assert [result.stdout for result in loop_thread().run(main())] == [f"{n}\n{n}\n" for n in range(500)]
    assert rig.logins() == logins + 1
    assert describe(backend) == "helper"


def test_a_slow_reader_holds_nobody_up(rig):
    """Its own command waits, on the host; others, and files, go on; then it gets everything."""
    backend, go, got, results = rig.backend(exec_mode="helper"), threading.Event(), [0], []

    def slow(text, _stream):
        go.wait(60)
        got[0] += len(text)

    def run():
        results.append(backend.exec("yes | head -c 50000000; echo > end", on_output=slow))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        wait_until(lambda: backend._launcher is not None and backend._launcher.running is not None, "it runs")
        for n in range(50):
            assert backend.exec(f"echo {n}").stdout == f"{n}\n"
        backend.write("file", "x" * 5_000_000)
        assert len(backend.read("file")) == 5_000_000
        assert not (rig.root / "end").exists()
    finally:
        go.set()
        thread.join(60)
    assert got == [50_000_000]
    assert results[0].exit_code == 0


def test_a_slow_reader_of_a_command_that_is_cancelled(rig):
    """The command ends although its output was waiting."""
    backend = rig.backend(exec_mode="helper")
    for seconds in PATIENCE:
        go = threading.Event()
        release = threading.Timer(seconds + 2, go.set)
        release.start()
        with pytest.raises(CommandTimeout):
            backend.exec("echo $$ > pid; yes", timeout=seconds, on_output=lambda *_, go=go: go.wait(60))
        release.join()
        if has_pid(rig.root / "pid"):
            break
    wait_gone(wait_pid(rig.root / "pid"))
    assert backend.exec("echo usable").stdout == "usable\n"


def test_starts_that_are_cancelled_at_any_moment(rig):
    """The next use finds a helper, or starts one; nothing of the cancelled command runs."""

    async def main():
        for n in range(20):
            backend = rig.backend(exec_mode="helper")
            await backend.live_connection()
            task = asyncio.create_task(backend.aexec(f"echo $$ > pid{n}; sleep 1000"))
            await asyncio.sleep(0.004 * n)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (await backend.aexec("echo on")).stdout == "on\n"
            await backend.adestroy()

    loop_thread().run(main())
    for file in rig.root.glob("pid*"):
        if text := file.read_text().strip():
            wait_gone(int(text))


def test_destroyed_while_the_helper_starts(rig):
    """At any moment: no process stays, and who waits is told."""

    async def main():
        errors = set()
        for n in range(20):
            backend = rig.backend(exec_mode="helper")
            await backend.live_connection()
            task = asyncio.create_task(backend.aexec("sleep 1000"))
            await asyncio.sleep(0.004 * n)
            await backend.adestroy()
            with pytest.raises(PoolError) as caught:
                await task
            errors.add(type(caught.value))
        return errors

    assert loop_thread().run(main()) == {BackendClosed}


def test_many_backends_start_their_helpers_at_once(make):
    """Each has its own."""
    with make(max_startups=200) as rig:
        backends = [rig.backend(exec_mode="helper") for _ in range(20)]

        async def main():
            for backend in backends:
                await backend.live_connection()
            return await asyncio.gather(*(backend.aexec("echo $PPID") for backend in backends))

        assert len({result.stdout for result in loop_thread().run(main())}) == 20


def test_timeouts_leave_nothing(rig):
    """A hundred, twenty-five at a time: when the timeout is told, every process is gone, deaf and astray or not."""
    backend = rig.backend(exec_mode="helper")
    backend.exec("true")

    async def one(n):
        family = f"""setsid sh -c 'trap "" TERM; echo $$ > a{n}; while :; do sleep 1; done' &
            sh -c 'sleep 1000 & echo $! > b{n}; wait' & echo $$ > c{n}; wait"""
        names = [rig.root / f"{letter}{n}" for letter in "abc"]
        for seconds in (1, 4, 16):
            with pytest.raises(CommandTimeout):
                await backend.aexec(family, timeout=seconds)
            left = [pid for name in names if name.exists() and not is_gone(pid := int(name.read_text() or 0))]
            assert left == []
            if all(name.exists() for name in names):
                return

    async def main():
        for first in range(0, 100, 25):
            await asyncio.gather(*(one(n) for n in range(first, first + 25)))

    loop_thread().run(main())
    assert len(list(rig.root.iterdir())) == 300


WORKER = """
import asyncio, json, sys
from pool.backends.ssh import RemoteFilesystemBackend
async def main():
    backend = RemoteFilesystemBackend(exec_mode="helper", **json.loads(sys.argv[1]))
    await asyncio.gather(*(backend.aexec(command) for command in sys.argv[2:]))
asyncio.run(main())
"""


def test_a_killed_worker_leaves_no_command(rig):
    """Of several at a time, in sessions of their own and deaf to TERM."""
    config = {**login(rig.info), "root_dir": str(rig.root)}
    commands = [STUBBORN.format(name=f"pid{n}") for n in range(5)]
    worker = subprocess.Popen([sys.executable, "-c", WORKER, json.dumps(config), *commands])
    try:
        pids = [wait_pid(rig.root / f"pid{n}", 60) for n in range(5)]
    finally:
        worker.send_signal(signal.SIGKILL)
        worker.wait()
    wait_gone(*pids)
