"""Logging in: who is turned away knocks again; known hosts are parsed once; nothing waits for TCP's delayed ACK."""

import asyncio
import os
import socket
from types import SimpleNamespace

import asyncssh
import pytest

from pool.backends import handshake as module
from pool.backends.handshake import LoginClient, known_hosts_option, log_in, prompt_acks

LOST = asyncssh.ConnectionLost("Connection lost")


class Server:
    """Stands in for `asyncssh.connect`: fails with these errors, one by one, then lets in."""

    def __init__(self, monkeypatch, *errors, reached=True, greets=False):
        self.errors, self.reached, self.version = list(errors), reached, "SSH-2.0-x" if greets else None
        self.options = []
        monkeypatch.setattr(module.asyncssh, "connect", self.connect)
        monkeypatch.setattr(module, "_FIRST_PAUSE", 0.0)

    async def connect(self, host, port, client_factory, **options):
        self.options.append(options)
        if self.reached:
            client_factory().connection_made(SimpleNamespace(get_extra_info={"server_version": self.version}.get))
        if self.errors:
            raise self.errors.pop(0)
        return "connection"


def knock(patience=60.0, **options):
    return asyncio.run(log_in("host", 22, LoginClient, patience, {"known_hosts": None, **options}))


@pytest.mark.parametrize("error", [LOST, ConnectionResetError(104, "reset"), BrokenPipeError(32, "pipe")], ids=repr)
def test_who_is_turned_away_before_the_greeting_knocks_again(monkeypatch, error):
    """As OpenSSH's MaxStartups turns away, however the end of the connection shows."""
    server = Server(monkeypatch, error, error, error)
    assert knock() == "connection"
    assert len(server.options) == 4


def test_a_connection_lost_after_the_greeting_is_told_at_once(monkeypatch):
    """The server had a place for it: this is something else."""
    server = Server(monkeypatch, LOST, greets=True)
    with pytest.raises(asyncssh.ConnectionLost, match="Connection lost"):
        knock()
    assert len(server.options) == 1


@pytest.mark.parametrize(
    "error", [ConnectionRefusedError(111, "refused"), ConnectionResetError(104, "reset")], ids=repr
)
def test_a_host_that_is_not_reached_is_told_at_once(monkeypatch, error):
    """Nobody is there who could make room."""
    server = Server(monkeypatch, error, reached=False)
    with pytest.raises(type(error)):
        knock()
    assert len(server.options) == 1


def test_who_is_turned_away_for_too_long_says_how_often(monkeypatch):
    """And what it may be."""
    server = Server(monkeypatch, *[LOST] * 3)
    with pytest.raises(asyncssh.ConnectionLost, match=r"turned away 1 times .* \(MaxStartups\? not an SSH server\?\)"):
        knock(patience=0.0)
    assert len(server.options) == 1


def test_the_options_of_the_host_win(monkeypatch):
    """What a backend asks of asyncssh is not overruled."""
    server = Server(monkeypatch)
    knock(encryption_algs="aes256-ctr", username="u")
    assert server.options[0] == {"encryption_algs": "aes256-ctr", "username": "u", "known_hosts": None}


def test_every_cipher_of_asyncssh_stays_allowed():
    """Only the order is ours: a server without AES-GCM is no worse off than before."""
    default = asyncssh.SSHClientConnectionOptions(config=None).encryption_algs
    ours = asyncssh.SSHClientConnectionOptions(config=None, encryption_algs=module._CIPHERS).encryption_algs
    assert ours[0] == b"aes256-gcm@openssh.com"
    assert set(ours) == set(default)


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A file of known hosts, and how often any was parsed."""
    key = asyncssh.generate_private_key("ssh-ed25519").export_public_key()
    path = tmp_path / "known"
    path.write_bytes(b"one.example " + key + b"other.example " + key)
    parsed, read = [], asyncssh.read_known_hosts
    monkeypatch.setattr(module, "_parsed", {})
    monkeypatch.setattr(module.asyncssh, "read_known_hosts", lambda path: parsed.append(path) or read(path))
    return SimpleNamespace(path=path, parsed=parsed, option=lambda: known_hosts_option({"known_hosts": str(path)}))


def test_known_hosts_are_parsed_once(file):
    """The next login gets the same object, by which asyncssh finds the host's key."""
    known = file.option()["known_hosts"]
    assert known is file.option()["known_hosts"]
    assert len(known.match("one.example", "", None)[0]) == 1
    assert len(file.parsed) == 1


@pytest.mark.parametrize("how", ["written to", "replaced"])
def test_known_hosts_that_were_changed_are_read_again(file, how):
    """A key that was taken out is trusted no more, a new one is."""
    assert file.option()["known_hosts"].match("one.example", "", None)[0]
    lines = file.path.read_text().replace("one.example", "another.example")  # of another size: some clocks are coarse
    if how == "replaced":
        new = file.path.with_suffix(".new")
        new.write_text(lines)
        about = file.path.stat()
        os.utime(new, ns=(about.st_atime_ns, about.st_mtime_ns))
        new.replace(file.path)
    else:
        file.path.write_text(lines)
    known = file.option()["known_hosts"]
    assert not known.match("one.example", "", None)[0]
    assert known.match("another.example", "", None)[0]


def test_the_users_own_known_hosts_when_none_are_named(file, monkeypatch):
    """Found where asyncssh would look."""
    monkeypatch.setenv("HOME", str(file.path.parent))
    (file.path.parent / ".ssh").mkdir()
    file.path.rename(file.path.parent / ".ssh" / "known_hosts")
    assert known_hosts_option({})["known_hosts"].match("one.example", "", None)[0]


@pytest.mark.parametrize("named", [None, "/no/such/file", "/", b"", ()])
def test_what_is_no_file_is_left_to_asyncssh(named, file):
    """Which says what is wrong with it; None is a host that is not verified."""
    assert known_hosts_option({"known_hosts": named}) == {}


def test_a_broken_file_of_known_hosts_is_told_each_time(file):
    """It is not remembered as an empty one."""
    file.path.write_text("broken\n")
    for _ in range(2):
        with pytest.raises(ValueError, match="known hosts"):
            file.option()


def test_few_files_are_kept(file, monkeypatch):
    """The least used goes first."""
    monkeypatch.setattr(module, "_KEPT_FILES", 2)
    others = [file.path.with_name(name) for name in "ab"]
    for other in others:
        other.write_bytes(file.path.read_bytes())
        file.option()
        known_hosts_option({"known_hosts": str(other)})
    assert list(module._parsed) == [str(file.path), str(others[1])]


class Connection:
    """What is asked of its socket, and what came over it."""

    def __init__(self, sock=True):
        self.asked, self.got = [], []
        self._socket = self if sock else None

    def get_extra_info(self, name):
        return self._socket if name == "socket" else None

    def setsockopt(self, *option):
        self.asked.append(option)

    def data_received(self, data, datatype=None):
        self.got.append(data)


@pytest.mark.skipif(not hasattr(socket, "TCP_QUICKACK"), reason="Linux only")
def test_all_that_comes_is_acknowledged_at_once():
    """What came before the block, and each packet in it, after it was handled; nothing after the block."""
    connection = Connection()
    with prompt_acks(connection):
        assert len(connection.asked) == 1
        connection.data_received(b"a")
        connection.data_received(b"b", None)
        assert connection.asked == [(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)] * 3
    connection.data_received(b"c")
    assert (connection.got, len(connection.asked)) == ([b"a", b"b", b"c"], 3)


def test_a_socket_that_is_closed_meanwhile_does_no_harm():
    """The data is handled all the same."""
    connection = Connection()

    def closed(*option):
        raise OSError(9, "bad file descriptor")

    connection.setsockopt = closed
    with prompt_acks(connection):
        connection.data_received(b"a")
    assert connection.got == [b"a"]


def test_a_connection_without_a_socket_is_left_alone():
    """One through a tunnel has none."""
    connection = Connection(sock=False)
    with prompt_acks(connection):
        connection.data_received(b"a")
    assert (connection.got, connection.asked) == ([b"a"], [])
