"""Debian's OpenSSH server under the interface of :class:`pool.loopback_sshd.LoopbackSshd`."""

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import asyncssh
import psutil

from pool.loopback_sshd import SshdInfo

TEST_USER = "pooltest"
_START_TIMEOUT = 10.0  # seconds until sshd must listen


def sshd_binary() -> str | None:
    """Return the absolute path of OpenSSH's sshd (it insists on one), ``None`` when there is none."""
    return shutil.which("sshd", path=f"/usr/sbin:/usr/local/sbin:{os.environ.get('PATH', os.defpath)}")


@dataclass(frozen=True)
class OpenSshdInfo(SshdInfo):
    """``home`` is the account's real home, shared by all servers: work in folders of your own in it."""

    def count_logins(self) -> int:
        """As for the base class, from sshd's log."""
        return self.logins.read_text(errors="replace").count("Accepted publickey")


class OpenSshd:
    """A real sshd on a free loopback port, with key login only; a context manager.

    As root it logs in as the account ``pooltest``, made once: sshd delivers signal requests to ordinary users
    only. Not as root it logs in as the current user, the only one such an sshd can serve. *extra_config* are lines of
    sshd_config that win over ours. *folder* is made when missing.
    """

    info: OpenSshdInfo

    def __init__(
        self,
        folder: Path,
        *,
        max_sessions: int = 10,
        max_startups: int | str | None = None,
        extra_config: Sequence[str] = (),
    ) -> None:
        self._folder = folder
        self._lines = [*extra_config, f"MaxSessions {max_sessions}"]
        if max_startups is not None:
            self._lines.append(f"MaxStartups {max_startups}")
        self._process: subprocess.Popen[bytes] | None = None
        self._strays: set[psutil.Process] = set()
        self._frozen: list[psutil.Process] = []

    def __enter__(self) -> Self:
        binary = sshd_binary()
        assert binary is not None, "sshd is not installed: apt install openssh-server"
        self._binary = binary
        self._account = _account()
        # sshd reads authorized_keys as the account, which cannot enter a private pytest folder.
        self._public = Path(tempfile.mkdtemp(prefix="pool-sshd-"))
        self._public.chmod(0o755)
        try:
            self.info = self._prepare()
            self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _exc: BaseException | None, _tb: TracebackType | None
    ) -> None:
        self.stop()
        shutil.rmtree(self._public)

    @property
    def pid(self) -> int:
        """The listener's."""
        assert self._process is not None, "not running"
        return self._process.pid

    def start(self) -> None:
        """Listen on the port of before, and return once it does (10 s at most)."""
        with self.info.logins.open("ab") as log:
            told = log.tell()
            command = [self._binary, "-D", "-e", "-f", str(self._folder / "sshd_config")]
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + _START_TIMEOUT
        while b"Server listening on" not in (text := self.info.logins.read_bytes()[told:]):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"sshd did not start: {text.decode(errors='replace')}")
            time.sleep(0.002)

    def stop(self) -> None:
        """Stop listening, cut every session, kill their commands: sshd itself would leave the last two alone."""
        self.kill()
        for stray in self._strays:
            with suppress(psutil.NoSuchProcess):
                stray.kill()
        self._strays.clear()

    def kill(self) -> None:
        """SIGKILL the listener and the sessions, as in a crash; their commands live on until :meth:`stop`."""
        process, self._process = self._process, None
        if process is None:
            return
        sessions = self._sessions(process.pid)
        process.kill()
        process.wait()
        _kill(sessions)

    def restart(self) -> None:
        """Stop and start again: same port, same host key."""
        self.stop()
        self.start()

    def kill_sessions(self) -> None:
        """SIGKILL the sshd processes of all connections; their commands live on until :meth:`stop`."""
        _kill(self._sessions(self.pid))

    def kill_file_servers(self) -> None:
        """SIGKILL the SFTP servers of all connections, and any command; the connections live on."""
        self._sessions(self.pid)
        _kill(list(self._strays))

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Hold the sshd processes of all connections still, as a hung host does; the listener goes on."""
        self.freeze()
        try:
            yield
        finally:
            self.thaw()

    def freeze(self) -> None:
        """SIGSTOP the sshd processes of all connections there are now."""
        self._frozen = self._sessions(self.pid)
        for session in self._frozen:
            with suppress(psutil.NoSuchProcess):
                session.suspend()

    def thaw(self) -> None:
        """SIGCONT what :meth:`freeze` stopped."""
        for session in self._frozen:
            with suppress(psutil.NoSuchProcess):
                session.resume()

    def _sessions(self, listener: int) -> list[psutil.Process]:
        """Return the sshd processes of all connections, and remember the commands below them.

        Each connection has a child of the listener, which leads a session (setsid) that its helpers stay in; every
        command, and every SFTP server, leads a session of its own. So nothing is told by its name.
        """
        sessions = []
        with suppress(psutil.NoSuchProcess):
            for connection in psutil.Process(listener).children():
                with suppress(psutil.NoSuchProcess):
                    below = connection.children(recursive=True)
                    own = [process for process in below if _sid(process) == connection.pid]
                    self._strays.update(set(below) - set(own))
                    sessions += [connection, *own]
        return sessions

    def _prepare(self) -> OpenSshdInfo:
        folder = self._folder.resolve()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in ("host_key", "client_key"):
            (folder / name).touch(mode=0o600)
            asyncssh.generate_private_key("ssh-ed25519").write_private_key(folder / name)
        host_key, client_key = (asyncssh.read_private_key(folder / name) for name in ("host_key", "client_key"))
        (self._public / "authorized_keys").write_bytes(client_key.export_public_key())
        port = _free_port()
        (folder / "known_hosts").write_bytes(f"[127.0.0.1]:{port} ".encode() + host_key.export_public_key())
        (folder / "sshd.log").touch()
        self._write_config(folder, port)
        return OpenSshdInfo(
            port=port,
            username=self._account.pw_name,
            client_key=folder / "client_key",
            known_hosts=folder / "known_hosts",
            home=Path(self._account.pw_dir),
            logins=folder / "sshd.log",
        )

    def _write_config(self, folder: Path, port: int) -> None:
        config = folder / "sshd_config"
        lines = [
            *self._lines,  # first: sshd takes the first value it reads
            "ListenAddress 127.0.0.1",
            f"Port {port}",
            f"HostKey {folder / 'host_key'}",
            f"AuthorizedKeysFile {self._public / 'authorized_keys'}",
            "PidFile none",
            "LogLevel VERBOSE",
            "StrictModes no",
            "UsePAM no",
            "UseDNS no",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            "Subsystem sftp internal-sftp",  # the same code as sftp-server, whose path differs between systems
        ]
        # OpenSSH 9.8 and later shuts out an address whose sessions crash, which kill_sessions() looks like.
        config.write_text("\n".join([*lines, "PerSourcePenalties no", ""]))
        if subprocess.run([self._binary, "-t", "-f", str(config)], capture_output=True, check=False).returncode:
            config.write_text("\n".join([*lines, ""]))


def _account() -> pwd.struct_passwd:
    if os.geteuid() != 0:
        return pwd.getpwuid(os.geteuid())
    Path("/run/sshd").mkdir(mode=0o755, parents=True, exist_ok=True)
    # '*' as the password: no password fits, but the account does not count as locked.
    command = ["useradd", "--create-home", "--shell", "/bin/sh", "--password", "*", TEST_USER]
    try:
        return pwd.getpwnam(TEST_USER)
    except KeyError:
        told = subprocess.run(command, capture_output=True, check=False, text=True)
    try:
        return pwd.getpwnam(TEST_USER)  # made by us, or by somebody else at the same time
    except KeyError:
        raise RuntimeError(f"useradd {TEST_USER}: {told.stderr}") from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _sid(process: psutil.Process) -> int:
    try:
        return os.getsid(process.pid)
    except ProcessLookupError:
        return -1


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
