"""A folder of a remote host: commands and files over one SSH connection (asyncssh)."""

import asyncio
import logging
import os
import shlex
import socket
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import asyncssh

from pool.backends.base import BackendStatus, Capabilities
from pool.backends.channels import Channels, CommandSession
from pool.backends.handshake import LoginClient, forget_login, log_in, prompt_acks
from pool.backends.helper_files import HelperFiles
from pool.backends.helper_start import EXEC_MODES, Launcher
from pool.backends.leftovers import owner
from pool.backends.logins import login_line
from pool.backends.output import Capture
from pool.backends.process import PipedProcess
from pool.backends.sftp import RemoteFiles
from pool.backends.shell import PipedCommand, ShellCommand, check_env
from pool.backends.watchdog import Watchdog
from pool.backends.workspace import MAX_OUTPUT, Durable, FileStat, Place, WorkspaceBackend
from pool.config import check_number
from pool.errors import BackendClosed, BackendUnavailable, ConfigError, PoolError

if logging.getLogger("asyncssh").level == logging.NOTSET:
    asyncssh.set_log_level(logging.WARNING)  # at INFO it logs every command, and what is secret in it

logger = logging.getLogger(__name__)

# Makes the root; tells the name of the login shell and the root's symlink-free path behind a mark, so that talk of the
# login shell does no harm.
_PREPARE = 'mkdir -p -- "$1" && cd -P -- "$1" && printf "%s%s:%s\\n" "$2" "${SHELL##*/}" "$PWD"'
_MARK = "pool-root:"

LOOPBACK = "pool-loopback"
"""The server of the demo and of tests, which is known to have no process for each connection: nothing to warn of."""

_CLOSE_PATIENCE = 2.0
"""Seconds for a connection to close politely."""
_CLEAN_INTERVAL = 3600.0
"""Seconds between two looks for what durable commands left."""
_CHECK_TIMEOUT = 5.0
"""Seconds for a host to answer `RemoteFilesystemBackend.check`."""


class RemoteFilesystemBackend(WorkspaceBackend):
    """Commands and files under *root_dir* of a host, over one SSH connection.

    *root_dir*: made on connect; relative to the login folder unless absolute. *client_keys*: private key files; None:
    the user's default keys and agent. *known_hosts*: file with the host's key; None: the user's own; *insecure*: do
    not verify it (for tests of your own network only). *password_env*, *passphrase_env*: names of the worker's
    environment variables that hold a password, or the passphrase of the keys. *connect_timeout*: seconds for one
    connect, login included, from its turn on. *max_connects*: logins to the host that may be under way at a time in
    this process; the others wait for their turn (`pool.backends.logins`). *keepalive_interval* (seconds) times
    *keepalive_count* is how long a silent host is believed to be alive. *max_channels*: sessions for commands and
    files at a time; keep it below the server's MaxSessions (without a helper ``trust`` takes one more); what exceeds it
    waits. A helper takes one of them for itself, for any number of commands.
    *exec_mode*: how commands and files travel. ``"helper"``: through a small program that the host's python3 runs, one
    round trip for each (`pool.backends.helper`). ``"channel"``: each command on a channel of its own, files by SFTP.
    ``"auto"``: by the helper, unless the host cannot run it. *startup_files*: whether what the start-up files of the
    user's login shell make of the environment is what a helper's commands get; else what the server gave that shell.
    *max_output*: bytes of each output stream that are kept. *env*: added to the environment of every command.
    """

    __slots__ = (  # in a dict more than 30 attributes take 1.6 KB, and a process may have a thousand idle connections
        "_channels", "_clean_at", "_client_keys", "_connect_timeout", "_connection", "_files", "_insecure",
        "_keepalive", "_known_hosts", "_launcher", "_login_shell", "_lost_why", "_max_channels", "_max_connects",
        "_passphrase_env", "_password_env", "_startup_files", "_warned", "_watchdog", "base_env", "exec_mode", "host",
        "max_output", "port", "root", "root_dir", "username",
    )  # fmt: skip

    kind = "ssh"
    capabilities = Capabilities(exec=True, files=True)

    def __init__(
        self,
        host: str,
        *,
        port: int = 22,
        username: str | None = None,
        root_dir: str = ".",
        client_keys: str | Sequence[str] | None = None,
        known_hosts: str | None = None,
        insecure: bool = False,
        password_env: str | None = None,
        passphrase_env: str | None = None,
        connect_timeout: float = 15.0,
        max_connects: int = 8,
        keepalive_interval: float = 15.0,
        keepalive_count: int = 3,
        max_channels: int = 8,
        exec_mode: str = "auto",
        startup_files: bool = True,
        max_output: int = MAX_OUTPUT,
        env: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        check_number("max_output", max_output, "must be more than 0", unit="bytes")
        if not 1 <= port <= 65535:
            raise ConfigError(f"port={port!r}: must be from 1 to 65535")
        check_number("max_channels", max_channels, "must be 1 or more", unit="channels")
        check_number("connect_timeout", connect_timeout, "must be more than 0")
        check_number("max_connects", max_connects, "must be 1 or more", unit="logins")
        check_number("keepalive_interval", keepalive_interval, "must be more than 0")
        check_number("keepalive_count", keepalive_count, "must be 1 or more", unit="messages")
        self.host, self.port, self.username = host, port, username
        self.root_dir = root_dir
        self.root = root_dir
        self.max_output = max_output
        self.base_env = check_env(env)
        self._client_keys = [client_keys] if isinstance(client_keys, str) else client_keys
        self._known_hosts = known_hosts
        self._insecure = insecure
        self._password_env, self._passphrase_env = password_env, passphrase_env
        self._connect_timeout = connect_timeout
        self._max_connects = max_connects
        self._keepalive = (keepalive_interval, keepalive_count)
        self._max_channels = max_channels
        if exec_mode not in EXEC_MODES:
            raise ConfigError(f"exec_mode={exec_mode!r}: must be one of {', '.join(EXEC_MODES)}")
        self.exec_mode = exec_mode
        self._startup_files = startup_files
        self._clean_at = 0.0
        self._launcher: Launcher | None = None
        self._connection: asyncssh.SSHClientConnection | None = None
        self._channels = Channels(max_channels)
        self._files: RemoteFiles | None = None
        self._lost_why = "it broke"
        self._login_shell = ""
        self._watchdog: Watchdog | None = None
        self._warned = False

    # -- life

    async def open(self) -> None:
        options = self._options()
        user = self.pool_key or self.username or ""
        with self.unhurried():
            turn = await login_line(self.host, self.port).take(user, self._max_connects, self._connect_timeout)
        try:
            async with asyncio.timeout(self._connect_timeout):
                connection = await log_in(self.host, self.port, self._client, self._connect_timeout, options)
                turn.over(got_in=True)
                with prompt_acks(connection):
                    await self._settle(connection)
        except (OSError, asyncssh.Error, ValueError) as error:
            if isinstance(error, PoolError):
                raise
            raise self._connect_error(error) from error
        finally:
            turn.over()

    async def _settle(self, connection: asyncssh.SSHClientConnection) -> None:
        """Make the new connection the one in use, or leave none behind."""
        self._connection = connection
        self._channels = Channels(self._max_channels)
        self._files = None
        where = (self.host, self.port, self.username)
        self._launcher = Launcher(
            connection,
            self._channels,
            where,
            self.exec_mode,
            self.lost_error,
            startup_files=self._startup_files,
            trust=self.trust,
            claim=self.claim,
        )
        if self.trust is not None and LOOPBACK not in str(connection.get_extra_info("server_version")):
            self._watchdog = Watchdog(connection, self._channels, self.trust, self._go_without_watchdog)
        try:
            if self._watchdog is not None and self._launcher.by_channels:
                self._watchdog.begin()
            self._login_shell, self.root = await self._make_root(connection)
            self._launcher.root = self.root
            forget_login(connection)
        except BaseException:
            self._connection = None
            self._stop_watchdog()
            connection.abort()
            raise
        if self._connection is not connection:  # lost since, when `mark_lost` had nothing to say yet
            self._stop_watchdog()
            raise self.lost_error()

    def _options(self) -> dict[str, Any]:
        """Everything for asyncssh; secrets are read here, at the last moment, and kept nowhere."""
        options: dict[str, Any] = {
            "config": None,  # the hosts file is the only place to look, not ~/.ssh/config
            "keepalive_interval": self._keepalive[0],
            "keepalive_count_max": self._keepalive[1],
            "agent_forwarding": False,
        }
        if self.username is not None:
            options["username"] = self.username
        if self._insecure:
            options["known_hosts"] = None
        elif self._known_hosts is not None:
            options["known_hosts"] = _readable("known_hosts", self._known_hosts)
        if self._client_keys is not None:
            options["client_keys"] = [_readable("client_keys", key) for key in self._client_keys]
            options["agent_path"] = None
        for option, name in (("password", self._password_env), ("passphrase", self._passphrase_env)):
            if name is not None:
                if name not in os.environ:
                    raise ConfigError(f"{option}_env={name!r}: the worker has no such environment variable")
                options[option] = os.environ[name]
        return options

    def _client(self) -> "_Client":
        return _Client(self)

    def _connect_error(self, error: Exception) -> PoolError:
        """Say what went wrong in a `BackendUnavailable`; ``retry_after`` is None when only a person can help."""
        where = f"{self.username or 'the current user'}@{self.host}:{self.port}"
        if isinstance(error, asyncssh.HostKeyNotVerifiable):
            whose = self._known_hosts or "~/.ssh/known_hosts"
            text = (
                f"{where}: the host key is unknown or was changed ({error.reason}): compare it, then add it to {whose}"
            )
            return BackendUnavailable(text, "host_key", None)
        if isinstance(error, asyncssh.PermissionDenied):
            return BackendUnavailable(f"{where}: login refused: {error.reason}", "login", None)
        if isinstance(error, asyncssh.KeyImportError | asyncssh.KeyEncryptionError | ValueError):
            return ConfigError(f"{where}: client_keys or known_hosts cannot be used: {error}")
        if isinstance(error, socket.gaierror):
            return BackendUnavailable(f"{where}: unknown host: {error.strerror}", "resolve", 0.0)
        if isinstance(error, ConnectionRefusedError):
            return BackendUnavailable(f"{where}: connection refused: no SSH server on this port?", "refused", 0.0)
        if isinstance(error, TimeoutError):
            return BackendUnavailable(f"{where}: no answer in time", "timeout", 0.0)
        if isinstance(error, asyncssh.Error):
            return BackendUnavailable(f"{where}: connection lost while logging in: {error.reason}", "lost", 0.0)
        return BackendUnavailable(f"{where}: unreachable: {error}", "unreachable", 0.0)

    async def _make_root(self, connection: asyncssh.SSHClientConnection) -> tuple[str, str]:
        folder = "." + self.root_dir[1:] if self.root_dir.split("/")[0] == "~" else self.root_dir
        capture = Capture(64 * 1024)
        line = "exec " + shlex.join(["/bin/sh", "-c", _PREPARE, "pool", folder, _MARK])
        code = await (await self._start(connection, line, CommandSession(self, capture))).ended()
        output = capture.streams["stdout"].tail_text(64 * 1024)
        if code or _MARK not in output:
            why = capture.tail() or f"exit code {code}"
            text = f"{self.host}: cannot make or enter root_dir {self.root_dir!r}: {why}"
            raise BackendUnavailable(text, "setup", None)
        shell, _, root = output.rpartition(_MARK)[2].rstrip("\n").partition(":")
        return shell, root

    async def _watched(self) -> None:
        """Have the host end what is started over channels from now on, files too, when ``trust`` is over."""
        if self._watchdog is not None:
            try:
                await self._watchdog.start()
            except asyncssh.Error as error:
                raise self.lost_error(error) from error

    def _go_without_watchdog(self, why: str) -> None:
        """Say so, once."""
        if not self._warned:
            self._warned = True
            logger.warning("%s cannot end the commands of a frozen worker: %s", self.host, why)

    def _stop_watchdog(self) -> None:
        watchdog, self._watchdog = self._watchdog, None
        if watchdog is not None:
            watchdog.stop()

    @property
    def fenced(self) -> bool:
        return self._launcher is not None and self._launcher.fenced

    def _lost(self, error: Exception | None) -> None:
        """Note that the connection is gone; called by asyncssh."""
        self._connection = None
        self._lost_why = str(error or "the host closed the connection")
        self.mark_lost()

    @property
    def mode(self) -> str:
        """``helper``, or ``channel`` and why; "" until the first use of a connection."""
        return "" if self._launcher is None else self._launcher.describe

    async def tick_health(self, now: float) -> None:
        """Now and then, have the helper remove what durable commands left long ago."""
        helper = None if self._launcher is None else self._launcher.running
        if helper is not None and now >= self._clean_at:
            self._clean_at = now + _CLEAN_INTERVAL
            await helper.operate("clean", ".", self.root.encode("utf-8", "surrogateescape"))

    async def check(self) -> None:
        """Have the host answer: its helper, or an empty command."""
        try:
            async with asyncio.timeout(_CHECK_TIMEOUT):
                _, launcher = await self._live()
                if helper := launcher.running:
                    return await helper.ping()
                session = CommandSession(self, Capture(1024))
                await (await self._start(await self.live_connection(), "exec true", session)).ended()
        except TimeoutError as error:
            raise BackendUnavailable(f"{self.host}: no answer within {_CHECK_TIMEOUT:g} s", "timeout", 0.0) from error

    async def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        self._stop_watchdog()
        if self._launcher is not None:
            self._launcher.close()
        connection.close()
        try:
            async with asyncio.timeout(_CLOSE_PATIENCE):
                await connection.wait_closed()
        except TimeoutError:
            connection.abort()

    # -- commands

    async def run(self, command: str, cwd: Place, env: Mapping[str, str], capture: Capture, stdin: bytes = b"") -> int:
        if helper := await (await self._live())[1].helper():
            return await helper.run(command, cwd, env, capture, stdin)
        shell = ShellCommand(command, cwd.chain, env, stdin=stdin)
        capture.hidden = shell.token.encode()
        session = await self._start_anew(shell, capture)
        code = await session.ended()
        shell.raise_notice(code, capture.tail())
        return code

    async def run_durable(
        self, command: str, cwd: Place, env: Mapping[str, str], capture: Capture, stdin: bytes, durable: Durable
    ) -> int:
        launcher = (await self._live())[1]
        if helper := await launcher.helper():
            return await helper.run(command, cwd, env, capture, stdin, durable)
        raise ConfigError(f"durable={durable.name!r}: {self.host} runs no helper ({launcher.describe})")

    async def _start_anew(self, shell: ShellCommand, capture: Capture) -> CommandSession:
        """Start it, once more on a new connection if the present one was dead before it got the command."""
        connection = await self.live_connection()
        session = CommandSession(self, capture)
        try:
            await self._watched()
            return await self._start(connection, shell.line(self._login_shell), session, shell.setup)
        except BackendUnavailable:
            if session.started or not connection.is_closed():
                raise
        connection = await self.live_connection()
        await self._watched()
        return await self._start(connection, shell.line(self._login_shell), CommandSession(self, capture), shell.setup)

    async def start_process(self, argv: Sequence[str], cwd: Place, env: Mapping[str, str]) -> PipedProcess:
        command = PipedCommand(argv, cwd.chain, {**self.base_env, **env}, owner())
        connection, channels, watchdog = await self.live_connection(), self._channels, self._watchdog
        line = command.line(self._login_shell)

        async def opening() -> asyncssh.SSHClientProcess[bytes]:
            task = asyncio.ensure_future(connection.create_process(line, encoding=None))
            try:
                return await asyncio.shield(task)
            except asyncio.CancelledError:  # closed, it ends; forgotten, it would wait for its input until the end
                task.add_done_callback(_close_late)
                raise

        with ExitStack() as stack:
            try:
                if watchdog is not None:
                    await watchdog.enter()
                    stack.callback(watchdog.leave)
                process = await channels.granted(connection, opening, lasting=True)
            except asyncssh.Error as error:
                raise self.lost_error(error) from error
            at_end = stack.pop_all()

        async def give_back() -> None:
            await process.wait_closed()
            channels.closed(lasting=True)
            at_end.close()

        piped = PipedProcess(process, command, process.close)
        piped.closed = asyncio.ensure_future(give_back())
        return piped

    async def _start(
        self, connection: asyncssh.SSHClientConnection, line: str, session: CommandSession, setup: bytes = b""
    ) -> CommandSession:
        try:
            await self._channels.start(connection, session, line, setup)
        except asyncssh.Error as error:
            raise self.lost_error(error) from error
        except BackendUnavailable as error:
            if self.status is BackendStatus.CLOSED:  # what looks like a refusal is the end of the connection
                raise self.lost_error() from error
            raise
        return session

    async def live_connection(self) -> asyncssh.SSHClientConnection:
        """Return the connection, made anew if it was lost."""
        return (await self._live())[0]

    async def _live(self) -> tuple[asyncssh.SSHClientConnection, Launcher]:
        await self.ready()
        if self._connection is None or self._launcher is None:
            raise self.lost_error()
        return self._connection, self._launcher

    def lost_error(self, error: Exception | None = None) -> PoolError:
        """Return what a user of a connection that broke gets to see."""
        if self.status is BackendStatus.CLOSED:
            return BackendClosed(f"{self!r} was closed while it was in use")
        why = getattr(error, "reason", None) or error or self._lost_why
        return BackendUnavailable(f"{self.host}: connection lost: {why}", "lost", 0.0)

    # -- files

    @property
    def channels(self) -> Channels:
        """The channels of the present connection."""
        return self._channels

    @property
    def sftp_files(self) -> RemoteFiles:
        """The files of the present connection, by SFTP."""
        if self._files is None:
            self._files = RemoteFiles(self)
        return self._files

    async def _files_now(self) -> RemoteFiles | HelperFiles:
        if files := await (await self._live())[1].files():
            return files
        await self._watched()
        return self.sftp_files

    async def read_file(self, place: Place) -> bytes:
        return await (await self._files_now()).read(place)

    async def write_file(self, place: Place, data: bytes) -> None:
        await (await self._files_now()).write(place, data)

    async def list_folder(self, place: Place) -> list[str]:
        return await (await self._files_now()).names(place)

    async def make_folder(self, place: Place) -> None:
        await (await self._files_now()).mkdir(place)

    async def stat_file(self, place: Place) -> FileStat:
        return await (await self._files_now()).stat(place)

    async def remove(self, place: Place, *, recursive: bool) -> None:
        await (await self._files_now()).remove(place, recursive=recursive)

    async def move(self, source: Place, target: Place) -> None:
        await (await self._files_now()).move(source, target)

    async def touch_file(self, place: Place) -> None:
        await (await self._files_now()).touch(place)

    def __repr__(self) -> str:
        user = f"{self.username}@" if self.username else ""
        return f"<{type(self).__name__} {user}{self.host}:{self.port} {self.root!r} {self.status}>"


def _close_late(opening: "asyncio.Future[asyncssh.SSHClientProcess[bytes]]") -> None:
    """Close a process that was started after its caller had gone."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


class _Client(LoginClient):
    """Tells the backend when its connection is gone."""

    def __init__(self, backend: RemoteFilesystemBackend) -> None:
        self._backend = backend

    def connection_lost(self, exc: Exception | None) -> None:
        if self.connection is self._backend._connection:
            self._backend._lost(exc)


def _readable(field: str, path: str) -> str:
    """Return the path of a file that can be read, or raise `ConfigError`."""
    expanded = Path(path).expanduser()
    if not os.access(expanded, os.R_OK):
        raise ConfigError(f"{field}={path!r}: no such file, or not readable by the worker")
    return str(expanded)
