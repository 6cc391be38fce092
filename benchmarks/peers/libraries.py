"""OpenSSH's own client over a ControlMaster, paramiko, mitogen, parallel-ssh."""

import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from benchmarks import mitogen_target
from benchmarks.peers.base import Missing, Peer, threaded
from benchmarks.peers.on_asyncssh import MAX_CHANNELS

PYTHON = "/usr/bin/python3"
"""On the host: an account of its own cannot enter the folders where this process has its Python."""


class ControlMaster(Peer):
    """One ``ssh`` process holds the connection; each command is an ``ssh`` process that asks it for a channel."""

    name = "OpenSSH ControlMaster"

    def connect(self) -> None:
        if shutil.which("ssh") is None:
            raise Missing("not installed")
        self._folder = tempfile.mkdtemp(prefix="pool-cm-")
        target = self.target
        options = {
            "ControlPath": f"{self._folder}/s",
            "UserKnownHostsFile": target.known_hosts,
            "IdentityFile": target.client_key,
            "IdentitiesOnly": "yes",
            "BatchMode": "yes",
            "LogLevel": "ERROR",
        }
        flags = [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
        self._ssh = ["ssh", "-F", "none", *flags, "-p", str(target.port), "-l", target.username]
        subprocess.run([*self._ssh, "-MNf", "127.0.0.1"], check=True, stdin=subprocess.DEVNULL)

    def _call(self, command: str, **more: Any) -> "subprocess.CompletedProcess[bytes]":
        given = more if "input" in more else {"stdin": subprocess.DEVNULL}
        return subprocess.run([*self._ssh, "127.0.0.1", command], check=False, stdout=subprocess.PIPE, **given)

    def run(self, command: str) -> int:
        return self._call(command).returncode

    def read(self, path: str) -> bytes:
        return self._call(f"cat {shlex.quote(path)}").stdout

    def write(self, path: str, data: bytes) -> None:
        assert self._call(f"cat > {shlex.quote(path)}", input=data).returncode == 0

    def many(self, command: str, count: int) -> int:
        return threaded(self.run, command, count, MAX_CHANNELS)

    def close(self) -> None:
        if "_ssh" in vars(self):
            subprocess.run([*self._ssh, "-O", "exit", "127.0.0.1"], check=False, capture_output=True)
            shutil.rmtree(self._folder, ignore_errors=True)


class Paramiko(Peer):
    name = "paramiko"

    def connect(self) -> None:
        try:
            import paramiko
        except ImportError:
            raise Missing("not installed") from None
        logging.getLogger("paramiko").setLevel(logging.CRITICAL)  # refused channels are counted, not told one by one
        self.client = paramiko.SSHClient()
        self.client.load_host_keys(str(self.target.known_hosts))
        self.client.connect(
            "127.0.0.1",
            self.target.port,
            self.target.username,
            key_filename=str(self.target.client_key),
            allow_agent=False,
            look_for_keys=False,
        )
        self._sftp: Any = None

    def run(self, command: str) -> int:
        stdin, stdout, _stderr = self.client.exec_command(command)
        stdin.close()
        stdout.read()
        return int(stdout.channel.recv_exit_status())

    @property
    def sftp(self) -> Any:
        if self._sftp is None:
            self._sftp = self.client.open_sftp()
        return self._sftp

    def read(self, path: str) -> bytes:
        with self.sftp.open(path, "rb") as file:
            file.prefetch()
            content: bytes = file.read()
        return content

    def write(self, path: str, data: bytes) -> None:
        with self.sftp.open(path, "wb") as file:
            file.set_pipelined(True)
            file.write(data)

    def many(self, command: str, count: int) -> int:
        return threaded(self.run, command, count, MAX_CHANNELS)

    def close(self) -> None:
        if "client" in vars(self):
            self.client.close()


class Mitogen(Peer):
    """A Python of its own on the host, which is sent the functions to call; the nearest relative of our helper."""

    name = "mitogen"
    serial = True

    def connect(self) -> None:
        try:
            import mitogen.master
            import mitogen.utils
        except ImportError:
            raise Missing("not installed") from None
        if shutil.which("ssh") is None:
            raise Missing("needs OpenSSH's client")
        self.broker = mitogen.master.Broker()
        self.router = mitogen.master.Router(self.broker)
        self.context = self.router.ssh(
            hostname="127.0.0.1",
            port=self.target.port,
            username=self.target.username,
            identity_file=str(self.target.client_key),
            python_path=PYTHON,
            compression=False,
            ssh_args=["-F", "none", "-o", f"UserKnownHostsFile={self.target.known_hosts}"],
        )

    def run(self, command: str) -> int:
        code, _output = self.context.call(mitogen_target.run, command)
        return int(code)

    def read(self, path: str) -> bytes:
        return bytes(self.context.call(mitogen_target.read, path))

    def write(self, path: str, data: bytes) -> None:
        from mitogen.core import Blob

        self.context.call(mitogen_target.write, path, Blob(data))

    def many(self, command: str, count: int) -> int:
        """It runs the calls of one context one after the other."""
        calls = [self.context.call_async(mitogen_target.run, command) for _ in range(count)]
        return sum(call.get().unpickle()[0] != 0 for call in calls)

    def close(self) -> None:
        if "broker" in vars(self):
            self.broker.shutdown()
            self.broker.join()


class ParallelSsh(Peer):
    """Its client for one host, over libssh2; files go through a file of this machine, its only way."""

    name = "parallel-ssh"

    def connect(self) -> None:
        try:
            from pssh.clients import SSHClient
        except ImportError:
            raise Missing("not installed") from None
        self._file = Path(tempfile.mkdtemp(prefix="pool-pssh-", dir=_memory_folder())) / "file"
        self.client = SSHClient(
            "127.0.0.1",
            self.target.username,
            port=self.target.port,
            pkey=str(self.target.client_key),
            allow_agent=False,
            identity_auth=False,
        )
        self._sftp: Any = None

    def run(self, command: str) -> int:
        output = self.client.run_command(command)
        for _ in output.stdout:
            pass
        self.client.wait_finished(output)
        return int(output.exit_code)

    @property
    def sftp(self) -> Any:
        if self._sftp is None:
            self._sftp = self.client._make_sftp()
        return self._sftp

    def read(self, path: str) -> bytes:
        self.client.sftp_get(self.sftp, path, str(self._file))
        return self._file.read_bytes()

    def write(self, path: str, data: bytes) -> None:
        self._file.write_bytes(data)
        self.client.sftp_put(self.sftp, str(self._file), path)

    def many(self, command: str, count: int) -> int:
        """As many as may be open, all waited for, then the next ones: greenlets on one client do not work."""
        failed = 0
        for start in range(0, count, MAX_CHANNELS):
            outputs = [self._begun(command) for _ in range(min(MAX_CHANNELS, count - start))]
            for output in outputs:
                if output is not None:
                    self.client.wait_finished(output)
                failed += output is None or output.exit_code != 0
        return failed

    def _begun(self, command: str) -> Any:
        """A command under way, or None where the server has no session free."""
        try:
            return self.client.run_command(command)
        except Exception:
            return None

    @classmethod
    def crowd(cls, peers: Sequence[Self], command: str, count: int) -> int:
        from gevent.pool import Pool

        return sum(Pool(len(peers)).imap_unordered(lambda peer: peer.many(command, count), peers))

    def close(self) -> None:
        if "client" in vars(self):
            self._sftp = None
            del self.client
            shutil.rmtree(self._file.parent, ignore_errors=True)


def _memory_folder() -> str | None:
    """A folder that needs no disk, where there is one."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
