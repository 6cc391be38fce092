"""Logging in over asyncssh, with what saves time there: fewer stalls, a faster cipher, known hosts parsed once."""

import asyncio
import os
import random
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Self

import asyncssh

_CIPHERS = "^aes256-gcm@openssh.com,aes128-gcm@openssh.com"
"""Tried before asyncssh's own list, which begins with ChaCha20: that one is four calls into OpenSSL for each packet
where AES-GCM is one. Both are as safe."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 1.0
"""Seconds, before jitter, between two knocks at a host that turned us away."""

_KEPT_FILES = 16
"""Files of known hosts whose content is kept parsed."""


class LoginClient(asyncssh.SSHClient):
    """Knows its connection from the first moment."""

    connection: asyncssh.SSHClientConnection | None = None

    def connection_made(self, conn: asyncssh.SSHClientConnection) -> None:
        self.connection = conn

    def factory(self) -> Self:
        """Given to asyncssh, which wants to make its client itself, and keeps this as long as the connection."""
        return self

    @property
    def greeted(self) -> bool:
        """Whether the server said that it speaks SSH."""
        return self.connection is not None and self.connection.get_extra_info("server_version") is not None


async def log_in(
    host: str, port: int, make_client: Callable[[], LoginClient], patience: float, options: dict[str, Any]
) -> asyncssh.SSHClientConnection:
    """Connect and log in. *options* are asyncssh's.

    A server that has too many logins under way (OpenSSH's MaxStartups) closes new connections before its greeting: it
    is asked again, for *patience* seconds from now. Raises what asyncssh raises; the caller limits each attempt.
    """
    now = asyncio.get_running_loop().time
    until = now() + patience
    options = {"encryption_algs": _CIPHERS, **options, **known_hosts_option(options)}
    refusals = 0
    while True:
        client = make_client()
        try:
            return await asyncssh.connect(host, port, client_factory=client.factory, **options)
        except (asyncssh.ConnectionLost, ConnectionResetError, BrokenPipeError) as error:
            if client.connection is None or client.greeted:
                raise
            refusals += 1
            pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** min(refusals - 1, 10)) * random.uniform(0.5, 1.0)  # noqa: S311 - spread, not secret
            if now() + pause > until:
                text = f"turned away {refusals} times before the server's greeting (MaxStartups? not an SSH server?)"
                raise asyncssh.ConnectionLost(text) from error
        await asyncio.sleep(pause)


@contextmanager
def prompt_acks(connection: asyncssh.SSHClientConnection) -> Iterator[None]:
    """Acknowledge at once what the server sends while this block runs, instead of after TCP's 40 ms.

    Until a connection's first command OpenSSH's server holds a small packet back as long as one before it is not
    acknowledged (Nagle), and after a login it sends two or more in a row. Linux only; elsewhere nothing changes.
    """
    sock = connection.get_extra_info("socket")
    if sock is None or not hasattr(socket, "TCP_QUICKACK"):
        yield
        return
    received = connection.data_received

    def acknowledge() -> None:
        with suppress(OSError):  # it may be closed by now
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)  # Linux forgets it with the next packet

    def data_received(data: bytes, datatype: int | None = None) -> None:
        received(data, datatype)
        acknowledge()

    acknowledge()
    connection.data_received = data_received  # type: ignore[method-assign]
    try:
        yield
    finally:
        del connection.data_received


_OF_LOGIN: dict[str, tuple[type, Any]] = {
    "_client_kexinit": (bytes, b""),
    "_server_kexinit": (bytes, b""),
    "_server_sig_algs": (set, frozenset()),
}
"""Attributes of asyncssh's connection that only a key exchange or a login reads, with what takes their place."""


def forget_login(connection: asyncssh.SSHClientConnection) -> None:
    """Let go of what asyncssh keeps of the handshake: a fifth of the memory that an idle connection takes.

    The next key exchange makes its part of it anew. Its own attributes, so only while they are what we know them for.
    """
    found = vars(connection)
    if found.get("_kex_complete") is not True:  # one is under way
        return
    for name, (kind, empty) in _OF_LOGIN.items():
        if isinstance(found.get(name), kind):
            setattr(connection, name, empty)


_parsed: dict[str, tuple[tuple[int, ...], asyncssh.SSHKnownHosts]] = {}


def known_hosts_option(options: dict[str, Any]) -> dict[str, Any]:
    """Return ``{"known_hosts": ...}`` parsed, or nothing to change.

    asyncssh would read and parse the whole file for each login, on the event loop: some 20 us a line. A file that was
    changed is read again. Public keys only: nothing secret is kept. Raises OSError, ValueError as asyncssh does.
    """
    path = options.get("known_hosts", os.path.expanduser("~/.ssh/known_hosts"))  # leaves ~ where there is no home
    if not isinstance(path, str) or not os.path.isfile(path) or not os.access(path, os.R_OK):
        return {}  # asyncssh knows what to make of it
    about = os.stat(path)
    state = (about.st_ino, about.st_mtime_ns, about.st_ctime_ns, about.st_size)
    kept = _parsed.pop(path, None)
    if kept is None or kept[0] != state:
        kept = state, asyncssh.read_known_hosts(path)
    _parsed[path] = kept  # at the end: the least used is the first
    while len(_parsed) > _KEPT_FILES:
        del _parsed[next(iter(_parsed))]
    return {"known_hosts": kept[1]}
