"""An SSH server on 127.0.0.1 with real exec and SFTP, for the demo and for tests without OpenSSH.

Commands run as the current user; whoever holds the client key in the server's folder can log in under any
name. Four differences from OpenSSH: no shell, pty or forwarding; a closed channel is confirmed at once, even
while its command still runs (its slot stays taken, as there); ``USER`` is the login name, which need not be
the account; all connections live in one process, so none can be ended from within (no watchdog, see
``pool/backends/watchdog.py``).
"""

import argparse
import asyncio
import getpass
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import asyncssh
from asyncssh.stream import SSHServerStreamSession

from pool.backends.ssh import LOOPBACK

__all__ = ["LoopbackSshd", "Sshd", "SshdInfo", "serve"]

_START_TIMEOUT = 20.0  # seconds until the subprocess must have told its port
_REAP_TIMEOUT = 5.0  # seconds for killed commands to be gone


@dataclass(frozen=True)
class SshdInfo:
    """What a client needs to log in, and where to look from outside. ``home`` is where commands start."""

    port: int
    username: str
    client_key: Path
    known_hosts: Path
    home: Path
    logins: Path

    def count_logins(self) -> int:
        """Logins since the folder was made; one whose client has opened a session since is surely in."""
        return len(self.logins.read_text().splitlines())


class _Command(asyncio.SubprocessProtocol):
    """A command in a process group of its own, between its pipes and its channel.

    What arrives before the process exists is done once it does. ``ended`` is called when the process has
    exited and its output is closed: a background child that holds it keeps the channel open, as in OpenSSH.
    """

    def __init__(self, channel: "asyncssh.SSHServerChannel[bytes]", ended: Callable[[], None]) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._channel = channel
        self._ended = ended
        self._process: asyncio.SubprocessTransport | None = None
        self._stdin: asyncio.WriteTransport | None = None
        self._early: list[Callable[[], None]] = []

    async def start(self, command: str, home: Path, user: str) -> None:
        """Run ``/bin/sh -c command`` in *home*; if that fails: the reason on stderr, status 255."""
        env = {"HOME": str(home), "USER": user, "SHELL": "/bin/sh", "LANG": "C.UTF-8"}
        env["PATH"] = os.environ.get("PATH", os.defpath)
        spawn = asyncio.get_running_loop().subprocess_exec
        argv = ("/bin/sh", "-c", command)
        try:
            await spawn(lambda: self, *argv, cwd=home, env=env, start_new_session=True)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the command
            if not self._channel.is_closing():
                self._channel.write_stderr(f"{error}\n".encode())
                self._channel.exit(255)
            self._finish()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._process = cast(asyncio.SubprocessTransport, transport)
        self._stdin = cast(asyncio.WriteTransport, self._process.get_pipe_transport(0))
        early, self._early = self._early, []
        for action in early:
            action()
        self._channel.resume_reading()

    def write(self, data: bytes) -> None:
        """Pass *data* on to stdin; dropped once the command has closed it."""
        if self._process is None:
            self._early.append(partial(self.write, data))
            self._channel.pause_reading()
        elif self._stdin is not None and not self._stdin.is_closing():
            self._stdin.write(data)

    def write_eof(self) -> None:
        """Close stdin once everything before is written."""
        if self._process is None:
            self._early.append(self.write_eof)
        elif self._stdin is not None:
            self._stdin.write_eof()

    def send_signal(self, name: str) -> None:
        """Deliver a signal, named without its ``SIG``, to the process group; an unknown one is ignored."""
        number = getattr(signal, f"SIG{name}", None)
        if self._process is None:
            self._early.append(partial(self.send_signal, name))
        elif isinstance(number, signal.Signals):
            with suppress(ProcessLookupError):
                os.killpg(self._process.get_pid(), number)

    def pause_output(self, paused: bool) -> None:
        """Stop or go on reading stdout and stderr: the client is behind, or has caught up."""
        for pipe in self._output_pipes():
            (pipe.pause_reading if paused else pipe.resume_reading)()

    def close_pipes(self) -> None:
        """Let go of the command without killing it: the channel is closed."""
        if self._process is None:
            self._early.append(self.close_pipes)
            return
        self._abort_stdin()
        for pipe in self._output_pipes():
            pipe.close()

    def _output_pipes(self) -> list[asyncio.ReadTransport]:
        process = self._process
        return [cast(asyncio.ReadTransport, process.get_pipe_transport(fd)) for fd in (1, 2)] if process else []

    def _abort_stdin(self) -> None:
        stdin = self._stdin  # aborted twice, or when closing with nothing left to write, asyncio trips
        if stdin is not None and (not stdin.is_closing() or stdin.get_write_buffer_size()):
            stdin.abort()

    def pause_writing(self) -> None:
        self._channel.pause_reading()

    def resume_writing(self) -> None:
        # Not at once: asyncio drops what is written when write and write_eof are called from resume_writing.
        asyncio.get_running_loop().call_soon(self._channel.resume_reading)

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        if self._channel.is_closing():  # asyncssh withholds the end of a channel whose input is paused
            self.close_pipes()
        elif fd == 1:
            self._channel.write(data)
        else:
            self._channel.write_stderr(data)

    def pipe_connection_lost(self, fd: int, _exc: Exception | None) -> None:
        if fd == 0:
            self._stdin = None
            self._channel.resume_reading()  # or the end of the channel would never be heard

    def process_exited(self) -> None:
        self._abort_stdin()

    def connection_lost(self, _exc: Exception | None) -> None:
        assert self._process is not None
        code = self._process.get_returncode() or 0
        if code >= 0:
            self._channel.exit(code)
        else:
            known = {number.value: number.name[3:] for number in signal.Signals}
            self._channel.exit_with_signal(known.get(-code, "SIG@openssh.com"))
        self._finish()

    def _finish(self) -> None:
        self.done.set_result(None)
        self._ended()


class _Session(SSHServerStreamSession[bytes]):
    """One session channel: a command, or SFTP, which the base class serves.

    ``release`` is called when the channel is closed and the command, if any, has ended.
    """

    def __init__(self, server: "Sshd", user: str, release: Callable[[], None]) -> None:
        super().__init__(None, partial(_Sftp, server.info.home), 3)
        self._server = server
        self._user = user
        self._release = release
        self._holders = 1  # the channel
        self._command: _Command | None = None
        self._starting: asyncio.Task[None] | None = None

    def exec_requested(self, _command: str) -> bool:
        return True

    def session_started(self) -> None:
        channel = cast("asyncssh.SSHServerChannel[bytes]", self._chan)
        line = channel.get_command()
        if line is None:
            super().session_started()
            return
        self._holders += 1
        self._command = _Command(channel, self._command_ended)
        self._server.commands.add(self._command)
        self._starting = asyncio.create_task(self._command.start(line, self._server.info.home, self._user))

    def _command_ended(self) -> None:
        self._server.commands.discard(cast(_Command, self._command))
        self._drop()

    def _drop(self) -> None:
        self._holders -= 1
        if self._holders == 0:
            self._release()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._command is not None:
            self._command.close_pipes()
        self._drop()

    def data_received(self, data: bytes, datatype: int | None) -> None:
        if self._command is None:
            super().data_received(data, datatype)
        else:
            self._command.write(data)

    def eof_received(self) -> bool:
        if self._command is not None:
            self._command.write_eof()
        return super().eof_received()

    def signal_received(self, signal: str) -> None:
        if self._command is not None:
            self._command.send_signal(signal)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._command is not None:
            self._command.pause_output(True)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._command is not None:
            self._command.pause_output(False)


class _Sftp(asyncssh.SFTPServer):
    """SFTP over the whole file system, as OpenSSH's: relative paths start in *home*."""

    def __init__(self, home: Path, channel: "asyncssh.SSHServerChannel[bytes]") -> None:
        super().__init__(channel)
        self._home = os.fsencode(home)

    def map_path(self, path: bytes) -> bytes:
        return os.path.join(self._home, path)

    def write(self, file_obj: Any, offset: int, data: bytes) -> int:
        """Write all of *data*; asyncssh's own takes a part for the whole, which is what a full disk leaves."""
        written = 0
        while written < len(data):
            written += cast(int, super().write(file_obj, offset + written, data[written:]))
        return written

    def realpath(self, path: bytes) -> bytes:
        """Resolve *path*; all but its last part must exist (OpenSSH's sftp-realpath.c)."""
        real = os.path.realpath(self.map_path(path))
        os.stat(os.path.join(os.path.dirname(real), b"."))
        return real


class _Connection(asyncssh.SSHServer):
    """One connection: any user name with the right key, and at most *max_sessions* session channels."""

    def __init__(self, server: "Sshd") -> None:
        self._server = server
        self._sessions: set[_Session] = set()

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self._conn = conn
        self._server.connections.add(conn)

    def connection_lost(self, _exc: Exception | None) -> None:
        self._server.connections.discard(self._conn)

    def auth_completed(self) -> None:
        with self._server.info.logins.open("a") as logins:
            logins.write(f"{self._conn.get_extra_info('username')}\n")

    async def session_requested(self) -> _Session:
        """Open a session or refuse it as OpenSSH's MaxSessions does.

        A coroutine on purpose: asyncssh releases a closed channel one loop step late, and the client may
        already have sent its next request behind the close.
        """
        if len(self._sessions) >= self._server.max_sessions:
            raise asyncssh.ChannelOpenError(asyncssh.OPEN_CONNECT_FAILED, "open failed")
        user = str(self._conn.get_extra_info("username"))
        session = _Session(self._server, user, lambda: self._sessions.discard(session))
        self._sessions.add(session)
        return session


class Sshd:
    """A running server; made by :func:`serve`, ended by :meth:`close`."""

    def __init__(self, max_sessions: int) -> None:
        self.max_sessions = max_sessions
        self.connections: set[asyncssh.SSHServerConnection] = set()
        self.commands: set[_Command] = set()
        self.info: SshdInfo
        self.acceptor: asyncssh.SSHAcceptor

    async def close(self) -> None:
        """Stop listening, cut every connection, kill every command's process group; 5 s at most."""
        self.acceptor.close()
        for connection in list(self.connections):
            connection.abort()
        for command in list(self.commands):
            command.send_signal("KILL")
        if self.commands:
            await asyncio.wait([command.done for command in self.commands], timeout=_REAP_TIMEOUT)


async def serve(folder: Path, *, home: Path, port: int = 0, max_sessions: int = 10) -> Sshd:
    """Serve SSH on 127.0.0.1; *port* 0 takes a free one.

    *folder* keeps the keys (made once, mode 0600), ``authorized_keys``, ``known_hosts`` and ``logins``, one
    user name per login. *home* is where commands start and what relative SFTP paths are relative to. Both are
    made when missing. *max_sessions* limits the exec and SFTP channels per connection, as OpenSSH's
    ``MaxSessions``. Raises ``OSError`` when the port is taken.
    """
    info, host_key = _prepare(folder, home)
    server = Sshd(max_sessions)
    server.acceptor = await asyncssh.listen(
        "127.0.0.1",
        port,
        server_factory=partial(_Connection, server),
        server_host_keys=[host_key],
        authorized_client_keys=str(info.client_key.with_name("authorized_keys")),
        password_auth=False,
        kbdint_auth=False,
        gss_host=None,
        server_version=LOOPBACK,
        encoding=None,
        allow_pty=False,
        agent_forwarding=False,
        line_editor=False,
    )
    server.info = replace(info, port=server.acceptor.get_port())
    info.known_hosts.write_bytes(f"[127.0.0.1]:{server.info.port} ".encode() + host_key.export_public_key())
    return server


def _prepare(folder: Path, home: Path) -> tuple[SshdInfo, asyncssh.SSHKey]:
    folder, home = folder.resolve(), home.resolve()
    for path in (folder, home):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    client_key = _key(folder / "client_key")
    (folder / "authorized_keys").write_bytes(client_key.export_public_key())
    (folder / "logins").touch()
    info = SshdInfo(
        port=0,
        username=getpass.getuser(),
        client_key=folder / "client_key",
        known_hosts=folder / "known_hosts",
        home=home,
        logins=folder / "logins",
    )
    return info, _key(folder / "host_key")


def _key(path: Path) -> asyncssh.SSHKey:
    if not path.exists():
        path.touch(mode=0o600)
        asyncssh.generate_private_key("ssh-ed25519").write_private_key(path)
    return asyncssh.read_private_key(path)


class LoopbackSshd:
    """The server as a subprocess: a context manager that starts it on entry and stops it on exit.

    Arguments as for :func:`serve`; start again with the same folder and ``port=info.port`` to come back as
    the same host. The subprocess ends by itself when this process dies.
    """

    info: SshdInfo
    pid: int

    def __init__(self, folder: Path, *, home: Path, port: int = 0, max_sessions: int = 10) -> None:
        options = {"folder": folder, "home": home, "port": port, "max-sessions": max_sessions}
        arguments = [f"--{name}={value}" for name, value in options.items()]
        self._command = [sys.executable, "-m", "pool.loopback_sshd", *arguments]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _exc: BaseException | None, _tb: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start it and wait, 20 s at most, until it listens; ``RuntimeError`` when it does not."""
        package_root = str(Path(__file__).resolve().parent.parent)
        path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(  # noqa: S603  # our own interpreter and module
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is for the parent; the end of stdin tells this one
        )
        assert self._process.stdout is not None
        poll = select.poll()
        poll.register(self._process.stdout, select.POLLIN)
        line = self._process.stdout.readline() if poll.poll(_START_TIMEOUT * 1000) else b""
        if not line:
            self.stop()
            raise RuntimeError(f"the loopback SSH server did not start within {_START_TIMEOUT:.0f} s")
        told: dict[str, Any] = json.loads(line)
        paths = {name: Path(value) for name, value in told.items() if name not in {"port", "username"}}
        self.info = SshdInfo(port=told["port"], username=told["username"], **paths)
        self.pid = self._process.pid

    def stop(self, grace: float = 10.0) -> None:
        """TERM, then KILL after *grace* seconds; commands still running are killed only by TERM."""
        process, self._process = self._process, None
        if process is None:
            return
        with process:  # closes its pipes
            process.terminate()
            try:
                process.wait(grace)
            except subprocess.TimeoutExpired:
                process.kill()


async def _main(arguments: argparse.Namespace) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)

    def watch_stdin() -> None:
        while os.read(0, 4096):
            pass
        with suppress(RuntimeError):  # the loop is closed already
            loop.call_soon_threadsafe(stop.set)

    options = vars(arguments)
    server = await serve(options.pop("folder"), **options)
    threading.Thread(target=watch_stdin, daemon=True).start()
    print(json.dumps(asdict(server.info), default=str), flush=True)  # noqa: T201  # the parent reads it
    await stop.wait()
    await server.close()


def main() -> None:
    """Run until TERM, INT or the end of stdin; a line of JSON, the ``SshdInfo``, says it listens."""
    parser = argparse.ArgumentParser(prog="python -m pool.loopback_sshd", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="keys, known_hosts, log of logins")
    parser.add_argument("--home", type=Path, required=True, help="where commands start")
    parser.add_argument("--port", type=int, default=0, help="0: a free one")
    parser.add_argument("--max-sessions", type=int, default=10, help="session channels per connection")
    asyncio.run(_main(parser.parse_args()))


if __name__ == "__main__":
    main()
