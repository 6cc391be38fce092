"""Debian's RabbitMQ as a private server of a test run: own node name, ports, folders and port mapper; ended by process id."""

import itertools
import json
import os
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import amqp
import psutil

_START_TIMEOUT = 60.0  # seconds until the server must accept a login
_STOP_TIMEOUT = 30.0
_VHOSTS = 12
"""Virtual hosts that are there from the start: making one later takes rabbitmqctl, a second Erlang."""

_SCRIPT = "/usr/lib/rabbitmq/bin/rabbitmq-server"
"""The server itself. What Debian has in /usr/sbin changes user and writes to the folders of the system's instance."""


def rabbitmq_binary() -> str | None:
    """Return the path of the server, ``None`` when there is none."""
    return _SCRIPT if os.access(_SCRIPT, os.X_OK) and shutil.which("epmd") else None


class RabbitServer:
    """A server on free loopback ports; a context manager. *options* are lines of rabbitmq.conf.

    It runs as whoever runs the tests (root in CI), and leaves an instance of the system alone: the node has a name, a
    cookie and a port mapper (epmd) of its own. *folder* is made when missing, and may be removed after the end.
    """

    def __init__(self, folder: Path, *, options: Mapping[str, str] | None = None) -> None:
        self.folder = folder.resolve()
        self.port = 0
        self._options = dict(options or {})
        self._vhosts = (f"test{number}" for number in itertools.count())
        self._processes: list[subprocess.Popen[bytes]] = []
        self._below: list[psutil.Process] = []

    def __enter__(self) -> Self:
        assert rabbitmq_binary() is not None, "RabbitMQ is not installed: apt install rabbitmq-server"
        try:
            self._prepare()
            self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _exc: BaseException | None, _tb: TracebackType | None
    ) -> None:
        self.stop()

    def vhost(self) -> str:
        """Return the URL of a virtual host that nobody has used."""
        name = next(self._vhosts)
        assert name != f"test{_VHOSTS}", f"{_VHOSTS} virtual hosts are all there are: raise _VHOSTS"
        return self.url(name)

    def url(self, vhost: str) -> str:
        return f"amqp://pool:pool@127.0.0.1:{self.port}/{vhost}"

    @property
    def log(self) -> str:
        return (self.folder / "rabbitmq.log").read_text(errors="replace")

    def start(self) -> None:
        """Start on the ports of before; return once a login works (60 s at most)."""
        with (self.folder / "rabbitmq.log").open("ab") as log:
            for command in (["epmd", "-port", str(self._ports[1]), "-address", "127.0.0.1"], [_SCRIPT]):
                process = subprocess.Popen(
                    command,
                    cwd=self.folder,
                    env=self._env,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
                self._processes.append(process)
        deadline = time.monotonic() + _START_TIMEOUT
        while not self._answers():
            if any(p.poll() is not None for p in self._processes) or time.monotonic() > deadline:
                raise RuntimeError(f"RabbitMQ did not start:\n{self.log[-4000:]}")
            time.sleep(0.05)
        self._note()

    def stop(self) -> None:
        """End the server in order, and then whatever is left of it."""
        self._note()
        if len(self._processes) == 2 and self._processes[1].poll() is None:
            self._processes[1].terminate()  # the script stops the virtual machine
            with suppress(subprocess.TimeoutExpired):
                self._processes[1].wait(_STOP_TIMEOUT)
        self._end()

    def kill(self) -> None:
        """SIGKILL everything, as in a crash; what was confirmed is on the disk."""
        self._note()
        self._end()

    def _end(self) -> None:
        for left in self._below:
            with suppress(psutil.NoSuchProcess):
                left.kill()
        for process in self._processes:
            process.kill()
            process.wait()
        psutil.wait_procs(self._below, _STOP_TIMEOUT)
        self._processes.clear()
        self._below.clear()

    def _note(self) -> None:
        """Remember the processes below ours: the virtual machine and its helpers."""
        for process in self._processes:
            with suppress(psutil.NoSuchProcess):
                found = psutil.Process(process.pid).children(recursive=True)
                self._below += [child for child in found if child not in self._below]

    def _answers(self) -> bool:
        with suppress(OSError, amqp.AMQPError):
            with amqp.Connection(f"127.0.0.1:{self.port}", "pool", "pool", virtual_host="/", connect_timeout=2.0):
                return True
        return False

    def _prepare(self) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._ports = _free_ports(3)
        self.port, epmd, distribution = self._ports
        vhosts = ["/", *(f"test{number}" for number in range(_VHOSTS))]
        everything = {"configure": ".*", "write": ".*", "read": ".*"}
        definitions = {
            "vhosts": [{"name": name} for name in vhosts],
            "users": [{"name": "pool", "password": "pool", "tags": "administrator"}],
            "permissions": [{"user": "pool", "vhost": name, **everything} for name in vhosts],
        }
        (self.folder / "definitions.json").write_text(json.dumps(definitions))
        options = {
            "listeners.tcp.1": f"127.0.0.1:{self.port}",
            "load_definitions": str(self.folder / "definitions.json"),
            "log.console": "true",
            "log.file": "false",
            "disk_free_limit.absolute": "50MB",
            "vm_memory_high_watermark.relative": "0.9",
            **self._options,
        }
        (self.folder / "rabbitmq.conf").write_text("".join(f"{name} = {value}\n" for name, value in options.items()))
        (self.folder / "plugins").write_text("[].\n")
        (self.folder / "env.conf").touch()
        self._env = {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(self.folder),  # where Erlang makes its cookie
            "ERL_EPMD_PORT": str(epmd),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": f"pooltest-{uuid.uuid4().hex[:8]}@localhost",
            "RABBITMQ_DIST_PORT": str(distribution),
            "RABBITMQ_CONF_ENV_FILE": str(self.folder / "env.conf"),
            "RABBITMQ_CONFIG_FILE": str(self.folder / "rabbitmq.conf"),
            "RABBITMQ_MNESIA_BASE": str(self.folder / "data"),
            "RABBITMQ_LOG_BASE": str(self.folder / "log"),
            "RABBITMQ_PID_FILE": str(self.folder / "pid"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.folder / "plugins"),
            "RABBITMQ_GENERATED_CONFIG_DIR": str(self.folder / "generated"),
            # One scheduler that does not spin: the tests need the processor more than the broker does.
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 1:1 +sbwt none +sbwtdcpu none +sbwtdio none",
        }


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()
