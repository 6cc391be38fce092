"""What becomes of a worker's remote commands when it is frozen or cut off. Over OpenSSH."""

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest

from pool import BackendPoolManager
from pool.backends.base import Claim
from pool.backends.workspace import Place
from pool.errors import BackendUnavailable
from pool.loopback_sshd import LoopbackSshd
from tests.support.leaks import no_leaks
from tests.support.openssh import OpenSshd, sshd_binary
from tests.support.processes import is_gone, wait_gone, wait_pid
from tests.support.rigs import Rig
from tests.support.services import require_service
from tests.support.waiting import wait_until

pytestmark = pytest.mark.openssh

TRUST = 3.0  # seconds
ENDS = 60.0  # seconds within which everything must have ended, on a machine with other things to do


@pytest.fixture
def server(tmp_path):
    require_service("sshd", sshd_binary())
    with OpenSshd(tmp_path / "sshd") as server:
        yield server


@pytest.fixture(params=["ssh", "ssh-channel"])
def rig(server, tmp_path, request):
    """Commands by a helper, which ends itself, or over channels, with a watchdog."""
    with no_leaks(), Rig(request.param, tmp_path, server.info) as rig:
        yield rig


@pytest.fixture
def watched(server, tmp_path):
    """A rig whose connections have a watchdog."""
    with no_leaks(), Rig("ssh-channel", tmp_path, server.info) as rig:
        yield rig


@pytest.fixture
def helped(server, tmp_path):
    """A rig whose connections have a helper."""
    with no_leaks(), Rig("ssh", tmp_path, server.info) as rig:
        yield rig


class Ending:
    """Trust that lasts until `end_in` is called: what has to be there before that has all the time it needs."""

    def __init__(self):
        self.end = None

    def __call__(self):
        return TRUST if self.end is None else self.end - time.monotonic()

    def end_in(self, seconds):
        self.end = time.monotonic() + seconds


def trusted(rig, trust=lambda: TRUST, **config):
    """Return a backend as a pool with this trust makes it."""
    backend = rig.backend(**config)
    backend.trust = trust
    return backend


def connections(server):
    """Return the processes of all connections, their commands included."""
    return psutil.Process(server.pid).children(recursive=True)


def scripts(server):
    """Return the processes of all watchdogs: each has the script, and its clock."""
    found = []
    for each in connections(server):
        with contextlib.suppress(psutil.NoSuchProcess):  # or a zombie: it has just ended
            if "pool-watchdog" in each.cmdline():
                found.append(each)
    return found


def watchdog_of(server):
    """Return the processes of the only watchdog there is, with the clock and its sleep."""

    def find():
        try:
            found = scripts(server)
            return len(found) == 2 and [*found, *found[1].children()]
        except psutil.NoSuchProcess:  # a clock that was replaced meanwhile
            return None

    return wait_until(find, "the script of the watchdog and its clock")


class Running(threading.Thread):
    """A command of a backend in a thread; ``result`` is what it returned or raised."""

    def __init__(self, backend, command):
        super().__init__()
        self.backend, self.command, self.result = backend, command, None
        self.start()

    def run(self):
        try:
            self.result = self.backend.exec(self.command)
        except BaseException as error:
            self.result = error


WORKER = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
from pool import BackendPoolManager, BackendUnavailable, RemoteFilesystemBackend
config, trust, commands = json.loads(sys.stdin.readline())
pool = BackendPoolManager(RemoteFilesystemBackend, config, trust=lambda: trust)
def run(command):
    try:
        with pool.backend("key") as backend:
            return backend.exec(command).stdout
    except BackendUnavailable as error:
        return error.reason
with ThreadPoolExecutor(8) as threads:
    running = [threads.submit(run, command) for command in commands]
    print(run(f"sleep {3 * trust}; echo alive"), end="", flush=True)
    print(json.dumps([each.result() for each in running]), flush=True)
with pool.backend("key") as backend:
    print(backend.exec("echo again").stdout, end="", flush=True)
pool.destroy_all()
"""

COMMANDS = {
    "plain": "echo $$ > plain; exec sleep 1000",
    "deaf": "trap '' TERM; echo $$ > deaf; while :; do sleep 1000; done",
    "parent": "(sleep 1000 & echo $! > grandchild; wait) & echo $! > child; echo $$ > parent; wait",
}
PIDS = ["plain", "deaf", "parent", "child", "grandchild"]


@contextlib.contextmanager
def worker(rig, trust, **config):
    """A process with a pool that runs `COMMANDS`."""
    info = rig.info
    login = {"host": "127.0.0.1", "port": info.port, "username": info.username, "root_dir": str(rig.root)}
    keys = {"client_keys": str(info.client_key), "known_hosts": str(info.known_hosts), "exec_mode": rig.exec_mode}
    process = subprocess.Popen([sys.executable, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        process.stdin.write(json.dumps([{**login, **keys, **config}, trust, list(COMMANDS.values())]) + "\n")
        process.stdin.flush()
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


@pytest.mark.parametrize("user", ["ordinary", "root"])
def test_a_frozen_worker_loses_its_commands(server, rig, user):
    """They run while it may work, and end when that time is over; it hears of it when it wakes up."""
    if user == "root" and os.geteuid() != 0:
        pytest.skip("root only")
    config = {"username": "root"} if user == "root" else {}
    other = Running(rig.backend(**config), "echo $$ > other; exec sleep 1000")  # another worker of the same user
    stranger = wait_pid(rig.root / "other", ENDS)
    with worker(rig, TRUST, **config) as process:
        pids = [wait_pid(rig.root / name, ENDS) for name in PIDS]
        assert process.stdout.readline() == "alive\n"  # after three times the trust
        assert not any(is_gone(pid) for pid in pids)
        process.send_signal(signal.SIGSTOP)
        wait_gone(*pids, timeout=ENDS)
        assert not is_gone(stranger)
        process.send_signal(signal.SIGCONT)
        assert json.loads(process.stdout.readline()) == ["lost"] * len(COMMANDS)
        assert process.stdout.readline() == "again\n"
        assert process.wait(ENDS) == 0
    assert other.result is None
    other.backend.destroy()
    other.join(ENDS)
    wait_until(lambda: not connections(server), "nothing is left of the connections")


class Cable:
    """A way to the server that can be held up in both directions, and let go again."""

    def __init__(self, port):
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._target = port
        self._whole = threading.Event()
        self._whole.set()
        self._ends, self._threads = [self._listener], []
        self._spawn(self._accept)

    def _spawn(self, call, *arguments):
        self._threads.append(threading.Thread(target=call, args=arguments))
        self._threads[-1].start()

    def _accept(self):
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._target))
            self._ends += [client, server]
            self._spawn(self._carry, client, server)
            self._spawn(self._carry, server, client)

    def _carry(self, source, target):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self._whole.wait()
                target.sendall(data)
        self._whole.wait()
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)  # also after a reset: the other side must hear of the end

    def cut(self):
        self._whole.clear()

    def mend(self):
        self._whole.set()

    def close(self):
        self.mend()
        for end in self._ends:
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        for thread in self._threads:
            thread.join(20)
        for end in self._ends:
            end.close()


def test_a_worker_that_is_cut_off_loses_its_commands(server, rig, tmp_path):
    """It lives, and renews its trust, but the host does not hear of it."""
    cable = Cable(rig.info.port)
    hosts = tmp_path / "known_hosts"
    hosts.write_text(rig.info.known_hosts.read_text().replace(str(rig.info.port), str(cable.port)))
    try:
        backend = trusted(rig, port=cable.port, known_hosts=str(hosts))
        running = Running(backend, "echo $$ > pid; sleep 1000")
        pid = wait_pid(rig.root / "pid", ENDS)
        cable.cut()
        wait_gone(pid, timeout=ENDS)
        assert running.result is None
        cable.mend()
        running.join(ENDS)
        assert isinstance(running.result, BackendUnavailable)
        assert running.result.reason == "lost"
        assert backend.exec("echo again").stdout == "again\n"
        backend.destroy()
    finally:
        cable.close()


def test_when_trust_ends_so_do_the_commands(rig):
    """Of a worker that lives and does nothing about it; a connect is refused then, and works when trust is back."""
    trust = Ending()
    backend = trusted(rig, trust)
    running = Running(backend, "echo $$ > pid; sleep 1000")
    pid = wait_pid(rig.root / "pid")
    trust.end_in(1)
    running.join(ENDS)
    assert isinstance(running.result, BackendUnavailable)
    assert running.result.reason == "lost"
    wait_gone(pid)
    with pytest.raises(BackendUnavailable, match="may not work") as refused:
        backend.exec("touch started")
    assert refused.value.retry_after is not None
    assert not (rig.root / "started").exists()
    trust.end_in(1000)
    assert backend.exec("echo again").stdout == "again\n"


def test_what_is_fenced_outlives_the_trust_for_the_time_of_the_grace(server, helped):
    """The host ends it for a newer owner. It does not so end an agent: with one, the connection ends with the trust."""
    trust = Ending()
    fenced, mixed = (trusted(helped, trust) for _ in range(2))
    for backend in (fenced, mixed):
        backend.claim = lambda: Claim("acme", 5, 600.0)
        backend.exec("true")
    mixed.run_sync(mixed.start_process(["sleep", "1000"], Place(mixed.root, "."), {}))
    trust.end_in(2)
    wait_until(lambda: not mixed.usable, "the host has ended the connection of the agent", ENDS)
    assert time.monotonic() >= trust.end - 0.1
    assert fenced.exec("echo on").stdout == "on\n"


def test_without_a_fence_there_is_no_grace(helped, caplog):
    """On a host that cannot keep one, nobody would end the commands for a newer owner."""
    (helped.root / ".pool").write_text("no folder")
    trust = Ending()
    backend = trusted(helped, trust)
    backend.claim = lambda: Claim("acme", 5, 600.0)
    running = Running(backend, "echo $$ > pid; sleep 1000")
    wait_pid(helped.root / "pid")
    trust.end_in(2)
    running.join(ENDS)
    assert isinstance(running.result, BackendUnavailable)
    assert "may go on" in str(running.result)
    assert time.monotonic() >= trust.end - 0.1
    assert "older owners" in caplog.text


def test_an_agent_has_a_watchdog_as_long_as_it_runs(server, helped):
    """Afterwards the helper is enough again; a second agent has its own time."""
    backend = trusted(helped)
    backend.exec("true")
    assert not scripts(server)
    place = Place(backend.root, ".")
    first, second = (backend.run_sync(backend.start_process(["sleep", "1000"], place, {})) for _ in range(2))
    watchdog_of(server)
    backend.run_sync(first.close())
    watchdog = watchdog_of(server)
    backend.run_sync(second.close())
    wait_gone(*(each.pid for each in watchdog))
    assert backend.exec("echo in").stdout == "in\n"


def test_trust_without_limit(rig):
    """A worker that shares its keys with nobody: told as such, and a limit may still come."""
    end = []
    backend = trusted(rig, lambda: end[0] - time.monotonic() if end else None)
    running = Running(backend, "echo $$ > pid; sleep 1000")
    pid = wait_pid(rig.root / "pid")
    assert not is_gone(pid)
    end.append(time.monotonic() + 2)
    running.join(ENDS)
    assert isinstance(running.result, BackendUnavailable)
    wait_gone(pid)


@pytest.mark.parametrize("pause", [0.0, 0.001, 0.005, 0.01, 0.02, 0.05])
def test_an_agent_that_is_given_up_while_it_starts_leaves_no_watchdog(server, helped, pause):
    """Whatever the watchdog was at."""
    backend = trusted(helped)
    backend.exec("true")

    async def give_up():
        starting = asyncio.ensure_future(backend.start_process(["sleep", "1000"], Place(backend.root, "."), {}))
        await asyncio.sleep(pause)
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await (await starting).close()

    backend.run_sync(give_up())
    assert backend.exec("echo in").stdout == "in\n"
    wait_until(lambda: not scripts(server), "the watchdog is gone")
    agent = backend.run_sync(backend.start_process(["sleep", "1000"], Place(backend.root, "."), {}))
    watchdog_of(server)
    backend.run_sync(agent.close())


def test_a_close_leaves_nothing_but_what_was_left_on_purpose(server, watched):
    """The script and its clock end with the connection; a background process of a command that has ended stays."""
    rig, backend = watched, trusted(watched)
    backend.exec("sleep 1000 >/dev/null 2>&1 & echo $! > left")
    left = wait_pid(rig.root / "left")
    try:
        watchdog = watchdog_of(server)
        backend.destroy()
        wait_gone(*(each.pid for each in watchdog))
        wait_until(lambda: not connections(server), "the connection is gone")
        assert not is_gone(left)
    finally:
        psutil.Process(left).kill()


def test_a_watchdog_that_is_killed_ends_its_connection(server, watched):
    """Nothing would cover the commands any more; the next use has a watchdog again."""
    backend = trusted(watched)
    running = Running(backend, "echo $$ > pid; sleep 1000")
    pid = wait_pid(watched.root / "pid")
    watchdog_of(server)[0].kill()
    running.join(ENDS)
    assert isinstance(running.result, BackendUnavailable)
    wait_gone(pid)
    assert backend.exec("echo again").stdout == "again\n"
    watchdog_of(server)


@pytest.mark.parametrize("sessions", [1, 2])
def test_a_server_with_too_few_sessions(tmp_path, sessions, caplog):
    """Work goes on without a watchdog, with one warning; files and commands share what there is."""
    require_service("sshd", sshd_binary())
    with (
        OpenSshd(tmp_path / "sshd", max_sessions=sessions) as server,
        Rig("ssh-channel", tmp_path, server.info) as rig,
        caplog.at_level(logging.WARNING, "pool"),
    ):
        backend = trusted(rig)
        if sessions > 1:
            backend.write("file", "x")
        assert [backend.exec("echo in").stdout for _ in range(3)] == ["in\n"] * 3
        assert rig.logins() == 1
    assert len([record for record in caplog.records if "MaxSessions" in record.message]) == 1


def test_commands_and_files_fill_the_sessions_that_the_watchdog_leaves(tmp_path):
    """Three sessions: the watchdog, the files, one command at a time; the watchdog is kept."""
    require_service("sshd", sshd_binary())
    with OpenSshd(tmp_path / "sshd", max_sessions=3) as server, Rig("ssh-channel", tmp_path, server.info) as rig:
        backend = trusted(rig)
        backend.write("file", "x")
        running = [Running(backend, f"sleep 0.1; echo {number}") for number in range(10)]
        for each in running:
            each.join(ENDS)
        assert [each.result.stdout for each in running] == [f"{number}\n" for number in range(10)]
        watchdog_of(server)


def test_a_host_whose_sessions_have_another_parent(tmp_path, caplog):
    """Nothing is signalled that is not the connection's: work goes on, with one warning that names the parent."""
    require_service("sshd", sshd_binary())
    force = 'ForceCommand /bin/sh -c "$SSH_ORIGINAL_COMMAND"; exit $?'
    with (
        OpenSshd(tmp_path / "sshd", extra_config=[force]) as server,
        Rig("ssh-channel", tmp_path, server.info) as rig,
        caplog.at_level(logging.WARNING, "pool"),
    ):
        backend = trusted(rig)
        assert backend.exec("echo in").stdout == "in\n"
        wait_until(lambda: not scripts(server), "the script has ended")
    assert len([record for record in caplog.records if "'sh'" in record.message]) == 1


@pytest.mark.parametrize("kind", ["with trust", "without"])
def test_a_watchdog_is_there_where_it_is_needed_only(server, rig, kind):
    """Not by default, and not beside a helper: not a process and not a session more."""
    backend = trusted(rig) if kind == "with trust" else rig.backend()
    running = Running(backend, "echo $$ > pid; sleep 1000")
    wait_pid(rig.root / "pid")
    assert bool(scripts(server)) == (kind == "with trust" and rig.exec_mode == "channel")
    backend.destroy()
    running.join(ENDS)


@pytest.mark.parametrize("kind", ["ssh", "ssh-channel"])
def test_the_loopback_server_is_used_without_a_watchdog(tmp_path, caplog, kind):
    """It has no process for each connection, and everybody knows: no warning."""
    with (
        LoopbackSshd(tmp_path / "sshd", home=tmp_path / "home") as server,
        Rig(kind, tmp_path, server.info) as rig,
        caplog.at_level(logging.WARNING, "pool"),
    ):
        assert trusted(rig).exec("echo in").stdout == "in\n"
    assert not caplog.records


def test_a_helper_keeps_the_moment_on_any_server(tmp_path):
    """It needs no process of the server's."""
    with (
        LoopbackSshd(tmp_path / "sshd", home=tmp_path / "home") as server,
        Rig("ssh", tmp_path, server.info) as rig,
    ):
        trust = Ending()
        running = Running(trusted(rig, trust), "echo $$ > pid; sleep 1000")
        pid = wait_pid(rig.root / "pid")
        trust.end_in(1)
        running.join(ENDS)
        assert isinstance(running.result, BackendUnavailable)
        assert "may go on" in str(running.result)
        assert time.monotonic() >= trust.end - 0.1
        wait_gone(pid)


def test_a_pool_hands_its_trust_to_its_backends(rig):
    """Through the manager, as a worker uses it."""
    trust = Ending()
    with no_leaks():
        pool = BackendPoolManager(rig.backend, trust=trust, enable_periodic_cleanup=False)
        with pool.backend("key") as backend, pytest.raises(BackendUnavailable):
            trust.end_in(2)
            backend.exec("sleep 1000")
        pool.destroy_all()
