"""One SSH host: reachable, the right host key, a login, a shell. Nothing is made there."""

import asyncio
import socket
import stat
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import asyncssh

from pool.backends.channels import Channels
from pool.backends.helper import Helper, NoHelper
from pool.backends.ssh import RemoteFilesystemBackend
from pool.doctor.deployment import Deployment
from pool.doctor.finding import Finding, error, info, ok, warning
from pool.errors import BackendUnavailable, ConfigError, PoolError
from pool.keys import fill_key

FAILURES: Mapping[str, tuple[str, str]] = {
    "host-resolve": ("No backend of this host can be made.", "Correct host, or add it to DNS or /etc/hosts."),
    "host-refused": ("No backend of this host can be made.", "Start its SSH server, or correct port."),
    "host-timeout": (
        "Tasks wait, and are retried.",
        "ping {host}; nc -vz {host} {port}: a firewall, or a host that is down?",
    ),
    "host-unreachable": ("No backend of this host can be made.", "ip route get {host}: is there a way to it?"),
    "host-no-ssh": ("No backend of this host can be made.", "Correct port: something else listens there."),
    "host-lost": (
        "Connects fail, now and then or always.",
        "Look into the host's log (MaxStartups? a blocked address?).",
    ),
    "host-key": (
        "Nodes refuse the host: it may be another one.",
        "ssh-keyscan -p {port} {host}: compare it with the key on the host itself; add the same one to {known_hosts}.",
    ),
    "host-login": (
        "Tasks of these keys fail.",
        "Add the public key to ~/.ssh/authorized_keys of {user} on {host}, or correct username and client_keys.",
    ),
    "host-config": ("Nodes cannot connect.", "Correct the entry, or what it names, as the user that the nodes run as."),
}
"""Code -> what comes of it, what to do."""

_UNSAFE = stat.S_IROTH | stat.S_IWOTH


@dataclass(frozen=True)
class Target:
    """A login of the hosts file."""

    where: str
    """Where in the file."""
    config: Mapping[str, Any]
    """Its fields, with a key filled in."""
    made_up: bool
    """The user name has a key in it that stands for many."""

    @classmethod
    def of(cls, rule: Mapping[str, Any], where: str, key: str) -> Self:
        """Fill *key* in. Raises `InvalidKey` for one that cannot stand there."""
        fields = {name: value for name, value in rule.items() if name not in ("backend", "root_dir")}
        user = fields.get("username") or ""
        if user:
            fields["username"] = fill_key(user, key, "username")
        return cls(where, fields, "{key}" in user)

    @property
    def login(self) -> str:
        """What makes it another login than others."""
        names = ("host", "port", "username", "client_keys", "known_hosts", "insecure", "password_env", "passphrase_env")
        return repr([self.config.get(name) for name in names])

    def __str__(self) -> str:
        user = f"{self.config['username']}@" if self.config.get("username") else ""
        return f"{user}{self.config['host']}:{self.config.get('port', 22)}"


def check_host(target: Target, deployment: Deployment) -> Iterator[Finding]:
    """Everything about one login, in at most the time that a check has."""
    deadline = time.monotonic() + 0.9 * deployment.timeout
    backend = RemoteFilesystemBackend(**target.config)
    yield from _files(target)
    if target.config.get("insecure"):
        yield warning(
            "host-insecure",
            f"{target}: insecure = true ({target.where}): the host key is not verified.",
            "Whoever is on the way to the host can read and change what runs there.",
            f"Take it out, and name the host's key: ssh-keyscan -p {backend.port} {backend.host} > FILE; compare it;"
            " known_hosts = FILE.",
        )
    try:
        options = backend._options()
        with _connect(backend, deadline) as sock:
            yield from asyncio.run(_look_inside(target, backend, sock, options, deadline))
    except _NoSsh as problem:
        yield _failure(target, backend, "host-no-ssh", str(problem))
    except BackendUnavailable as problem:
        code = "host-key" if problem.reason == "host_key" else f"host-{problem.reason}"
        yield _failure(target, backend, code, str(problem))
    except ConfigError as problem:
        yield _failure(target, backend, "host-config", str(problem))


class _NoSsh(Exception):
    """What listens there does not speak SSH."""


def _failure(target: Target, backend: RemoteFilesystemBackend, code: str, text: str) -> Finding:
    what = f"{text} ({target.where})."
    if code == "host-login" and target.made_up:
        return info(
            "host-account",
            what,
            f"The user {backend.username!r} was made up from username with key 'doctor': it need not exist.",
            f"To be sure: ssh -p {backend.port} USER@{backend.host} true, with a real one.",
        )
    why, fix = FAILURES[code]
    names = {
        "host": backend.host,
        "port": backend.port,
        "user": backend.username or "the user",
        "known_hosts": target.config.get("known_hosts", "~/.ssh/known_hosts"),
    }
    return error(code, what, why, fix.format_map(names))


def _files(target: Target) -> Iterator[Finding]:
    keys = target.config.get("client_keys") or []
    for name in [keys] if isinstance(keys, str) else keys:
        try:
            mode = Path(name).expanduser().stat().st_mode
        except OSError:
            continue  # the connect says so
        if mode & _UNSAFE:
            yield warning(
                "key-permissions",
                f"{target}: every user of this machine may read {name} (mode {stat.S_IMODE(mode):o}).",
                "Whoever reads the private key can log in to the host.",
                f"chmod 600 {name}",
            )


def _connect(backend: RemoteFilesystemBackend, deadline: float) -> socket.socket:
    """Connect, and see that an SSH server greets; raises `BackendUnavailable`, `_NoSsh`."""
    try:
        sock = socket.create_connection((backend.host, backend.port), max(0.1, (deadline - time.monotonic()) / 2))
    except OSError as problem:
        raise backend._connect_error(problem) from problem
    try:
        _greeting(backend, sock, max(0.1, (deadline - time.monotonic()) / 2))
    except BaseException:
        sock.close()
        raise
    return sock


def _greeting(backend: RemoteFilesystemBackend, sock: socket.socket, timeout: float) -> None:
    sock.settimeout(timeout)
    try:
        greeting = sock.recv(4, socket.MSG_PEEK)  # it stays there for asyncssh
    except TimeoutError:
        raise _NoSsh(f"{backend.host}:{backend.port} accepts connections, but says nothing") from None
    except OSError as problem:
        raise backend._connect_error(problem) from problem
    if not (greeting and b"SSH-".startswith(greeting)):
        raise _NoSsh(f"{backend.host}:{backend.port} answers, but does not greet as an SSH server")


async def _look_inside(
    target: Target, backend: RemoteFilesystemBackend, sock: socket.socket, options: Mapping[str, Any], deadline: float
) -> list[Finding]:
    """Log in as the backend would, and see whether its commands would run; raises `PoolError`."""
    try:
        async with asyncio.timeout(deadline - time.monotonic()):
            connection = await asyncssh.connect(backend.host, backend.port, sock=sock, **options)
            try:
                found = await _try_out(target, backend, connection)
            finally:
                connection.abort()
    except (OSError, asyncssh.Error, ValueError) as problem:
        if isinstance(problem, PoolError):
            raise
        raise backend._connect_error(problem) from problem
    return found or [ok("host", f"{target}: host key, login, commands and files are as they should be.")]


async def _try_out(
    target: Target, backend: RemoteFilesystemBackend, connection: asyncssh.SSHClientConnection
) -> list[Finding]:
    found = []
    shell = await connection.run("exec /bin/sh -c 'exit 0'", check=False)
    if shell.exit_status != 0:
        found.append(
            error(
                "host-shell",
                f"{target}: logged in, but /bin/sh did not run (exit status {shell.exit_status}).",
                "Every command fails.",
                "A login shell that understands exec /bin/sh -c '...', without a forced command.",
            )
        )
        return found
    if backend.exec_mode != "channel":
        why = await _helper(backend, connection)
        if not why:
            return []
        found.append(_no_helper(target, backend, why))
    try:
        (await connection.start_sftp_client()).exit()
    except asyncssh.Error as problem:
        found.append(
            warning(
                "host-sftp",
                f"{target}: no SFTP: {problem.reason}.",
                "Tasks cannot read or write files there; commands work.",
                "Subsystem sftp internal-sftp in the host's sshd_config.",
            )
        )
    return found


def _no_helper(target: Target, backend: RemoteFilesystemBackend, why: str) -> Finding:
    what = f"{target}: no helper can run there: {why} (exec_mode = {backend.exec_mode!r})."
    fix = "Install python3, 3.6 or newer, on the host; or exec_mode = 'channel', to leave it at that."
    if backend.exec_mode == "helper":
        return error("host-helper", what, "Nothing runs there.", fix)
    return info("host-helper", what, "Each command takes a channel of its own: slower; MaxSessions limits them.", fix)


async def _helper(backend: RemoteFilesystemBackend, connection: asyncssh.SSHClientConnection) -> str:
    """Start a helper, and say what is in the way of it."""
    helper = Helper(backend.lost_error, lambda _: None)
    try:
        await helper.start(connection, Channels(1))
        await helper.ping()
    except NoHelper as problem:
        return str(problem)
    finally:
        helper.close()
    return ""
