"""Many logins to one host at once: what the host gets to see, over OpenSSH and over a server that only counts."""

import asyncio
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from pool import BackendPoolManager
from pool.backends.handshake import forget_login
from pool.backends.logins import login_line
from pool.backends.ssh import RemoteFilesystemBackend
from pool.errors import BackendUnavailable
from pool.runtime import loop_thread
from tests.support.leaks import no_leaks
from tests.support.openssh import OpenSshd, sshd_binary
from tests.support.rigs import Rig, login, ssh_backend
from tests.support.services import require_service
from tests.support.waiting import wait_until


@pytest.fixture
def openssh(tmp_path):
    """``with openssh(**options) as rig``"""
    require_service("sshd", sshd_binary())

    def serving(**options):
        return OpenSshd(tmp_path / "sshd", **options)

    return serving


def all_at_once(backends, use=lambda backend: backend.exec("echo in").stdout):
    """What each of them has to say, or its error, with a thread for each."""

    def outcome(backend):
        try:
            return use(backend)
        except BackendUnavailable as error:
            return error

    with ThreadPoolExecutor(len(backends)) as threads:
        return list(threads.map(outcome, backends))


@pytest.mark.openssh
def test_two_hundred_cold_users_of_one_host_all_get_in(openssh, tmp_path):
    """With the MaxStartups that OpenSSH has by default (10:30:100); one login for each, hardly one turned away.

    The server counts a login for a moment longer than we do; all at once, more than half would be turned away.
    """
    with openssh() as server, no_leaks(), Rig("ssh", tmp_path, server.info) as rig:
        config = {**login(rig.info), "root_dir": str(rig.root)}
        pool = BackendPoolManager(RemoteFilesystemBackend, config, max_backends=200, acquire_timeout=100.0)

        async def use(key):
            async with pool.abackend(key) as backend:
                return (await backend.aexec("echo in")).stdout

        async def main():
            return await asyncio.gather(*(use(f"user-{number}") for number in range(200)))

        try:
            assert asyncio.run(main()) == ["in\n"] * 200
        finally:
            pool.destroy_all(0.0)
        assert rig.logins() == 200
        assert rig.info.logins.read_text(errors="replace").count("past MaxStartups") <= 20


@pytest.mark.openssh
def test_what_asyncssh_keeps_of_a_login_is_let_go_and_keys_are_still_exchanged(openssh, tmp_path):
    """The server asks for new keys after each megabyte: what that needs is made anew."""
    with openssh(extra_config=["RekeyLimit 1M"]) as server, no_leaks(), Rig("ssh", tmp_path, server.info) as rig:
        backend = rig.backend()
        backend.exec("true")
        kept = vars(backend._connection)
        assert [kept[name] for name in ("_client_kexinit", "_server_kexinit", "_server_sig_algs")] == [b"", b"", set()]
        for _ in range(5):
            assert (
                backend.exec("head -c 3000000 /dev/zero | wc -c; cat", stdin=b"x" * 3_000_000).stdout[:8] == "3000000\n"
            )
        assert kept["_client_kexinit"], "keys were exchanged"
        forget_login(backend._connection)
        assert not kept["_client_kexinit"]
        assert backend.exec("cat", stdin=b"y" * 3_000_000, encoding=None).stdout[-1:] == b"y"
        assert rig.logins() == 1


def test_nothing_is_let_go_while_keys_are_exchanged():
    """Nor what is not what we know it for: asyncssh's attributes are its own."""
    connection = SimpleNamespace(_client_kexinit=b"ours", _server_kexinit=None, _kex_complete=False)
    forget_login(connection)
    assert connection._client_kexinit == b"ours"
    connection._kex_complete = True
    forget_login(connection)
    assert vars(connection) == {"_client_kexinit": b"", "_server_kexinit": None, "_kex_complete": True}


@pytest.mark.openssh
def test_who_is_turned_away_by_the_host_gets_in_later(openssh, tmp_path):
    """As when several nodes connect at once: more logins than MaxStartups lets in, and still no error."""
    with openssh(max_startups=2) as server, no_leaks(), Rig("ssh", tmp_path, server.info) as rig:
        assert all_at_once([rig.backend(connect_timeout=60) for _ in range(16)]) == ["in\n"] * 16
        assert "MaxStartups" in rig.info.logins.read_text(errors="replace")
        assert rig.logins() == 16


class Counter:
    """Counts the connections that are there, greets like an SSH server once its doors open, and hangs up."""

    def __init__(self, backlog):
        self.seen = self.here = self.most = 0
        self.doors = threading.Event()
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=backlog)
        self.port = self._listener.getsockname()[1]

    def __enter__(self):
        self._threads = ThreadPoolExecutor(100)
        self._threads.submit(self._accept)
        return self

    def __exit__(self, *_):
        self.doors.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._threads.shutdown()

    def _accept(self):
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._count(1)
            self._threads.submit(self._serve, client)

    def _count(self, change):
        with self._lock:
            self.seen += change > 0
            self.here += change
            self.most = max(self.most, self.here)

    def _serve(self, client):
        with client:
            self.doors.wait(60)
            self._count(-1)  # before the client can know
            client.sendall(b"SSH-2.0-counter\r\n")


@pytest.mark.parametrize("limit", [1, 3])
def test_a_host_never_has_more_logins_under_way_than_max_connects(limit):
    """Counted by the host, from the moment when all want to log in; each of them gets its turn."""

    async def line():
        return login_line("127.0.0.1", host.port)

    with no_leaks(), Counter(12) as host, ThreadPoolExecutor(1) as threads:
        options = {"port": host.port, "username": "u", "insecure": True, "max_connects": limit}
        backends = [RemoteFilesystemBackend("127.0.0.1", **options) for _ in range(12)]
        logins = loop_thread().run(line())
        outcomes = threads.submit(all_at_once, backends)
        wait_until(lambda: logins.under_way + logins.waiting == 12, "all want to log in")
        wait_until(lambda: host.here == logins.under_way, "those whose turn it is have come")
        host.doors.set()
        assert {type(error) for error in outcomes.result()} == {BackendUnavailable}
        for backend in backends:
            backend.destroy()
    assert (host.most, host.seen) == (limit, 12)


def test_a_dead_host_tells_who_waits_that_nobody_gets_in():
    """Within about connect_timeout, not one connect_timeout for each who was before."""
    with no_leaks(), socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        options = {"port": port, "username": "u", "insecure": True, "max_connects": 1}
        slow = RemoteFilesystemBackend("127.0.0.1", **options, connect_timeout=20.0)
        late = RemoteFilesystemBackend("127.0.0.1", **options, connect_timeout=0.3)
        with ThreadPoolExecutor(1) as threads:
            first = threads.submit(all_at_once, [slow])
            client, _ = silent.accept()
            (error,) = all_at_once([late])
            client.sendall(b"SSH-2.0-x\r\n")
            client.close()
            first.result()
        for backend in (slow, late):
            backend.destroy()
    assert (error.reason, error.retry_after) == ("timeout", 0.0)
    assert f"waiting for its turn to log in to 127.0.0.1:{port}: 0 before it" in str(error)


@pytest.mark.openssh
@pytest.mark.parametrize("only", [None, "chacha20-poly1305@openssh.com", "aes256-ctr"])
def test_the_fast_cipher_where_the_host_has_it(openssh, tmp_path, only):
    """AES-GCM first, any other that both know else."""
    config = [] if only is None else [f"Ciphers {only}"]
    with openssh(extra_config=config) as server, no_leaks():
        backend = ssh_backend(server.info)
        assert backend.exec("echo in").stdout == "in\n"
        assert backend._connection.get_extra_info("send_cipher") == (only or "aes256-gcm@openssh.com")
        backend.destroy()
