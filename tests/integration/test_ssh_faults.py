"""What goes wrong between a worker and an SSH host, and how it is told. Over the loopback server and OpenSSH."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import asyncssh
import psutil
import pytest

from pool.backends.base import BackendStatus
from pool.backends.ssh import RemoteFilesystemBackend
from pool.errors import BackendUnavailable, CommandFailed, CommandTimeout, ConfigError, FileOperationFailed
from tests.support.leaks import no_leaks
from tests.support.openssh import OpenSshd, sshd_binary
from tests.support.processes import wait_gone, wait_pid
from tests.support.rigs import Rig, login
from tests.support.services import require_service
from tests.support.ssh_servers import KINDS, serving
from tests.support.waiting import wait_until

BY_CHANNEL = pytest.param("openssh-channel", marks=pytest.mark.openssh)


def freeze(server):
    """Hold every connection still; what they are is thawed or killed at the server's end."""
    if isinstance(server, OpenSshd):
        server.freeze()
    else:
        os.kill(server.pid, signal.SIGSTOP)


def thaw(server):
    if isinstance(server, OpenSshd):
        server.thaw()
    else:
        os.kill(server.pid, signal.SIGCONT)


def cut(server):
    """End every connection without a word, and be there again for the next."""
    if isinstance(server, OpenSshd):
        server.kill_sessions()
    else:
        port = server.info.port
        os.kill(server.pid, signal.SIGKILL)
        server.stop()
        server._command = [f"--port={port}" if part.startswith("--port=") else part for part in server._command]
        server.start()


@pytest.fixture(params=[*KINDS, BY_CHANNEL])
def make(request, tmp_path):
    """A server of the test's own, to be broken: ``with make(**options) as (server, rig)``."""
    mode = "ssh-channel" if request.param.endswith("-channel") else "ssh"

    @contextmanager
    def make(**options):
        with (
            serving(request.param, tmp_path / "server", **options) as server,
            Rig(mode, tmp_path, server.info) as rig,
        ):
            yield server, rig

    return make


@pytest.fixture(autouse=True, scope="module")
def signals_are_delivered():
    """Nothing of a server that was stopped stays behind."""
    yield
    assert not [child for child in psutil.Process().children() if child.status() == psutil.STATUS_STOPPED]


def refusal(backend, use=lambda backend: backend.exec("true")):
    """Return the error of a use, once without and once with file operations: they connect alike."""
    with pytest.raises((BackendUnavailable, ConfigError)) as first:
        use(backend)
    assert backend.status is BackendStatus.LOST
    with pytest.raises((BackendUnavailable, ConfigError)) as second:
        backend.readdir()
    assert (type(first.value), str(first.value)) == (type(second.value), str(second.value))
    return first.value


@pytest.fixture
def closed_port():
    with socket.socket() as taken:  # bound and never listening: refuses, and nobody else gets it
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def test_an_unknown_host_name():
    """Worth another try: name servers come back."""
    with no_leaks():
        backend = RemoteFilesystemBackend("no-such-host.invalid", username="u", insecure=True)
        error = refusal(backend)
        backend.destroy()
    assert (error.reason, error.retry_after is not None) == ("resolve", True)
    assert "no-such-host.invalid" in str(error)


def test_a_refused_connection(closed_port):
    """Worth another try; the message names the port."""
    with no_leaks():
        backend = RemoteFilesystemBackend("127.0.0.1", port=closed_port, username="u", insecure=True)
        error = refusal(backend)
        backend.destroy()
    assert (error.reason, error.retry_after is not None) == ("refused", True)
    assert f"127.0.0.1:{closed_port}" in str(error)


def test_a_host_that_accepts_and_never_speaks():
    """A connect is bounded by connect_timeout, on first use and on every other."""
    with socket.create_server(("127.0.0.1", 0)) as silent, no_leaks():
        backend = RemoteFilesystemBackend(
            "127.0.0.1", port=silent.getsockname()[1], username="u", insecure=True, connect_timeout=0.5
        )
        error = refusal(backend)
        backend.destroy()
    assert (error.reason, error.retry_after is not None) == ("timeout", True)
    assert "no answer" in str(error)


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-x\r\n", os.urandom(4096)])
def test_a_port_where_something_else_listens(answer):
    """Not an SSH server, or one that hangs up: unavailable, whatever it says."""
    with socket.create_server(("127.0.0.1", 0)) as stranger:

        def serve():
            while True:
                try:
                    client, _ = stranger.accept()
                except OSError:
                    return
                with client:
                    client.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            with no_leaks():
                backend = RemoteFilesystemBackend(
                    "127.0.0.1", port=stranger.getsockname()[1], username="u", insecure=True, connect_timeout=2
                )
                with pytest.raises(BackendUnavailable) as caught:
                    backend.exec("true")
                backend.destroy()
        finally:
            stranger.shutdown(socket.SHUT_RDWR)
            thread.join(20)
    assert caught.value.retry_after is not None


def test_an_unknown_host_key(rig, tmp_path):
    """Only a person can say that it is the right one; the message says where to put it."""
    empty = tmp_path / "empty"
    empty.touch()
    error = refusal(rig.backend(known_hosts=str(empty)))
    assert (error.reason, error.retry_after) == ("host_key", None)
    assert str(empty) in str(error)


def test_a_changed_host_key(rig, tmp_path):
    """Another key than the known one is never accepted."""
    wrong = tmp_path / "wrong"
    key = asyncssh.generate_private_key("ssh-ed25519").export_public_key()
    wrong.write_bytes(f"[127.0.0.1]:{rig.info.port} ".encode() + key)
    error = refusal(rig.backend(known_hosts=str(wrong)))
    assert (error.reason, error.retry_after) == ("host_key", None)


def test_insecure_accepts_any_host_key(rig, tmp_path):
    """Said explicitly, for this host."""
    assert rig.backend(known_hosts=None, insecure=True).exec("echo in").stdout == "in\n"


def test_a_refused_login(rig, tmp_path):
    """A key that the host does not know: no retry, and the message names user and host."""
    key = tmp_path / "key"
    asyncssh.generate_private_key("ssh-ed25519").write_private_key(key)
    error = refusal(rig.backend(client_keys=str(key)))
    assert (error.reason, error.retry_after) == ("login", None)
    assert f"{rig.info.username}@127.0.0.1:{rig.info.port}" in str(error)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("client_keys", "no/such/key"),
        ("known_hosts", "no/such/hosts"),
        ("password_env", "POOL_TEST_NO_SUCH_VARIABLE"),
        ("passphrase_env", "POOL_TEST_NO_SUCH_VARIABLE"),
    ],
)
def test_a_setting_that_names_nothing(rig, field, value):
    """A ConfigError that names the field and what it said."""
    error = refusal(rig.backend(**{field: value}))
    assert isinstance(error, ConfigError)
    assert field in str(error)
    assert value in str(error)


@pytest.mark.parametrize("field", ["client_keys", "known_hosts"])
def test_a_file_that_is_not_what_it_should_be(rig, tmp_path, field):
    """A key file without a key, or a folder in its place, is a ConfigError that names the host."""
    broken = tmp_path / "broken"
    broken.write_text("this is\nno such thing [\n")
    error = refusal(rig.backend(**{field: str(broken)}))
    assert isinstance(error, ConfigError) or error.reason == "host_key"
    assert "127.0.0.1" in str(error)
    folder = refusal(rig.backend(**{field: str(tmp_path)}))
    assert str(tmp_path) in str(folder) or "127.0.0.1" in str(folder)


def test_a_secret_is_in_no_error_and_no_repr(rig, monkeypatch):
    """Nothing that is printed holds a password."""
    monkeypatch.setenv("POOL_TEST_PASSWORD", "correct horse")
    backend = rig.backend(password_env="POOL_TEST_PASSWORD", client_keys=[])
    error = refusal(backend)
    assert "correct horse" not in f"{error!r} {error} {backend!r} {vars(backend)!r}"


@pytest.mark.parametrize("root", ["/proc/nowhere", "/dev/null/below"])
def test_a_root_that_cannot_be_made(rig, root):
    """Told with the host's reason, no retry, and no connection stays open however often it is tried."""
    backend = rig.backend(root_dir=root)
    for _ in range(3):
        error = refusal(backend)
    assert (error.reason, error.retry_after) == ("setup", None)
    assert root in str(error)


def run_into(backend, command, errors):
    def run():
        try:
            errors.append(backend.exec(command))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


@pytest.mark.parametrize("command", ["sleep 1000", "echo some; sleep 1000", "yes"])
def test_a_connection_cut_under_a_command_is_never_a_success(make, command):
    """BackendUnavailable, at once; the next use connects again; nothing of the old command is left."""
    with make() as (server, rig):
        backend, errors, seen = rig.backend(), [], []
        backend.exec("true")
        backend.on_status_change(seen.append)
        thread = run_into(backend, f"echo $$ > pid; {command}", errors)
        pid = wait_pid(rig.root / "pid")
        cut(server)
        thread.join(60)
        assert isinstance(errors[0], BackendUnavailable)
        assert (errors[0].reason, errors[0].retry_after is not None) == ("lost", True)
        wait_until(lambda: backend.status is BackendStatus.LOST, "the loss is noticed")
        assert backend.exec("echo again").stdout == "again\n"
        assert seen == ["lost", "connecting", "connected"]
        wait_gone(pid)


def test_files_after_a_cut_connection(make):
    """The file channel is made anew too."""
    with make() as (server, rig):
        backend = rig.backend()
        backend.write("file", "x")
        cut(server)
        wait_until(lambda: backend.status is BackendStatus.LOST, "the loss is noticed")
        assert backend.read("file") == "x"
        backend.write("file", "y")
        assert backend.exec("cat file").stdout == "y"


@pytest.mark.parametrize("make", ["openssh", "openssh-channel"], indirect=True)
@pytest.mark.openssh
def test_a_file_server_that_died_alone(make):
    """The operation under way fails, later ones work, on the same connection; the server is SFTP's, or the helper."""
    with make() as (server, rig):
        backend = rig.backend()
        backend.write("file", "x")
        logins = rig.logins()
        server.kill_file_servers()
        try:
            backend.read("file")
        except BackendUnavailable as error:
            assert error.retry_after is not None
        assert backend.read("file") == "x"
        assert backend.exec("cat file").stdout == "x"
        assert rig.logins() == logins


def test_a_frozen_host_is_noticed(make):
    """Keepalive finds a silent host, under a command and under a file operation."""
    with make() as (server, rig):
        backend, errors = rig.backend(keepalive_interval=2.0, keepalive_count=2, connect_timeout=30), []
        backend.write("file", "x")
        thread = run_into(backend, "echo $$ > pid; sleep 1000", errors)
        wait_pid(rig.root / "pid")
        freeze(server)
        try:
            with pytest.raises(BackendUnavailable) as caught:
                backend.read("file")
            thread.join(60)
            assert isinstance(errors[0], BackendUnavailable)
            assert {errors[0].reason, caught.value.reason} == {"lost"}
        finally:
            thaw(server)
        assert backend.read("file") == "x"


def test_a_timeout_on_a_frozen_host_comes_back(make):
    """Killing a command needs the host; when it does not answer, the caller is not held for ever."""
    with make() as (server, rig):
        backend = rig.backend(keepalive_interval=30)
        backend.exec("true")
        freeze(server)
        try:
            with pytest.raises((CommandTimeout, BackendUnavailable)):
                backend.exec("sleep 1000", timeout=1)
        finally:
            thaw(server)


@pytest.mark.parametrize("sessions", [1, 2, 3])
def test_more_commands_than_max_sessions(make, sessions):
    """A server that refuses channels is believed: all commands and file operations wait and succeed."""
    with make(max_sessions=sessions) as (_server, rig):
        backend = rig.backend()

        def one(number):
            if sessions > 1:
                backend.write(f"f{number}", str(number))
                assert backend.read(f"f{number}") == str(number)
            return backend.exec(f"sleep 0.1; echo {number}").stdout

        with ThreadPoolExecutor(12) as threads:
            assert list(threads.map(one, range(12))) == [f"{number}\n" for number in range(12)]
        assert rig.logins() == 1


@pytest.mark.parametrize("make", ["loopback-channel", BY_CHANNEL], indirect=True)
def test_one_session_does_not_do_for_files_and_commands(make):
    """A clear error, not a wait for ever, when the file channel has taken the only session."""
    with make(max_sessions=1) as (_server, rig):
        backend = rig.backend()
        backend.write("file", "x")
        with pytest.raises(BackendUnavailable, match="MaxSessions") as caught:
            backend.exec("true", timeout=60)
        assert caught.value.reason == "sessions"
        assert backend.read("file") == "x"


def test_no_session_at_all(make):
    """MaxSessions 0 is told as what it is."""
    with make(max_sessions=0) as (_server, rig):
        error = refusal(rig.backend())
    assert error.reason == "sessions"
    assert "MaxSessions" in str(error)


@pytest.mark.openssh
def test_max_startups_reached(tmp_path):
    """A server that is too busy to talk is worth another try."""
    require_service("sshd", sshd_binary())
    with (
        OpenSshd(tmp_path / "sshd", max_startups=1) as server,
        Rig("ssh", tmp_path, server.info) as rig,
        socket.create_connection(("127.0.0.1", server.info.port)) as hog,
    ):
        assert hog.recv(100).startswith(b"SSH-2.0")
        for _ in range(3):
            with pytest.raises(BackendUnavailable) as caught:
                rig.backend(connect_timeout=3.0).exec("true")
            assert caught.value.reason in {"lost", "unreachable", "timeout"}  # as the last try happens to end
            assert caught.value.retry_after is not None


@pytest.mark.openssh
def test_a_server_that_forbids_commands(tmp_path):
    """Files only (ForceCommand internal-sftp): told at connect, not as a success."""
    require_service("sshd", sshd_binary())
    with (
        OpenSshd(tmp_path / "sshd", extra_config=["ForceCommand /bin/false"]) as server,
        Rig("ssh", tmp_path, server.info) as rig,
    ):
        error = refusal(rig.backend())
    assert (error.reason, error.retry_after) == ("setup", None)


@pytest.fixture
def tiny_disk(rig):
    """A folder of the rig on a disk of its own of 256 KiB."""
    disk = rig.base / "disk"
    disk.mkdir()
    owner = rig.info.home.stat()
    options = f"size=256k,mode=755,uid={owner.st_uid},gid={owner.st_gid}"
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True, capture_output=True)


def test_a_full_disk(rig, tiny_disk):
    """The write fails and says why; the old content stays, no temporary file is left, and small files fit again."""
    backend = rig.backend(root_dir=str(tiny_disk))
    backend.write("file", "old")
    for path in ("file", "new", "folder/new"):
        with pytest.raises(FileOperationFailed, match=f"write '{path}'"):
            backend.write(path, bytes(1 << 20))
    assert backend.read("file") == "old"
    assert backend.readdir() in (["file"], ["file", "folder"])
    backend.write("small", "fits")
    assert backend.exec("cat small").stdout == "fits"
    with pytest.raises(CommandFailed, match="No space left"):
        backend.exec("head -c 1048576 /dev/zero > big")


WORKER = """
import json, sys
from pool.backends.local import LocalFilesystemBackend
from pool.backends.ssh import RemoteFilesystemBackend
config = json.loads(sys.argv[1])
kind = RemoteFilesystemBackend if "host" in config else LocalFilesystemBackend
command = "sleep 1000 & echo $! > child; echo $$ > main; trap '' TERM; sleep 1000 & echo $! > stubborn; wait"
kind(**config).exec(command, env={"A": "1"})
"""


@pytest.mark.parametrize("kind", ["local", *KINDS, BY_CHANNEL])
def test_a_killed_worker_leaves_no_command(kind, request, tmp_path):
    """After kill -9 of the worker, what it ran ends: silent, in the background or deaf to TERM."""
    with no_leaks():
        if kind == "local":
            killed_worker(Rig("local", tmp_path), {})
            return
        with serving(kind, tmp_path / "server") as server:
            config = {**login(server.info), "exec_mode": "channel" if kind.endswith("-channel") else "helper"}
            killed_worker(Rig("ssh", tmp_path, server.info), config)


def killed_worker(rig, config):
    with rig:
        arguments = json.dumps({**config, "root_dir": str(rig.root)})
        worker = subprocess.Popen([sys.executable, "-c", WORKER, arguments])
        try:
            pids = [wait_pid(rig.root / name, 60) for name in ("main", "child", "stubborn")]
        finally:
            worker.kill()
            worker.wait()
        wait_gone(*pids)


def test_a_command_is_not_started_twice_when_the_connection_dies_at_its_start(tmp_path):
    """A connection that ends between the request and its answer: the command may have run, so it is not repeated."""
    requests = []

    class Session(asyncssh.SSHServerSession):
        def connection_made(self, chan):
            self.chan = chan

        def exec_requested(self, command):
            if "pool-root:" in command:
                return True
            requests.append(command)
            self.chan.get_connection().abort()
            return True

        def session_started(self):
            self.chan.write("pool-root:/\n")
            self.chan.exit(0)

    class Server(asyncssh.SSHServer):
        def begin_auth(self, username):
            return False

        def session_requested(self):
            return Session()

    async def main():
        key = asyncssh.generate_private_key("ssh-ed25519")
        acceptor = await asyncssh.listen("127.0.0.1", 0, server_factory=Server, server_host_keys=[key])
        backend = RemoteFilesystemBackend(
            "127.0.0.1", port=acceptor.get_port(), username="u", insecure=True, root_dir="/", client_keys=[]
        )
        with pytest.raises(BackendUnavailable):
            await backend.aexec("true")
        await backend.adestroy()
        acceptor.close()
        await acceptor.wait_closed()

    with no_leaks():
        asyncio.run(main())
    assert len(requests) == 1


@pytest.mark.openssh
def test_a_talkative_login_shell_does_no_harm(tmp_path):
    """What a login shell prints before a command is not taken for the root's path."""
    require_service("sshd", sshd_binary())
    force = "ForceCommand echo 'Welcome to /nowhere'; echo warning >&2; eval \"$SSH_ORIGINAL_COMMAND\""
    with OpenSshd(tmp_path / "sshd", extra_config=[force]) as server, Rig("ssh", tmp_path, server.info) as rig:
        assert rig.backend().exec("pwd -P").stdout.splitlines()[-1] == os.path.realpath(rig.root)
