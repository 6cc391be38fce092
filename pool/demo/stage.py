"""The processes of a demo: an SSH server, Valkey, worker nodes that share out the shards, beat."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Self, TypeVar

from celery.app.utils import find_app
from rich.console import Console

from pool import embedded
from pool.backends.shell import ShellCommand
from pool.loopback_sshd import LoopbackSshd, SshdInfo

T = TypeVar("T")

IDLE_TIMEOUT = 5.0  # seconds; short, so that the sweep can be watched
SWEEP_INTERVAL = 1.0
START_TIMEOUT = 90.0  # seconds for all nodes to have their shards, on a slow machine
STOP_TIMEOUT = 15.0  # seconds for a process to end after TERM


class DemoError(RuntimeError):
    """What was waited for did not happen."""


class Stage:
    """Entered: the SSH server runs, and *app* is the project's own, as a producer sees it. Everything ends with it.

    *env*: variables for it and its nodes, besides its own.
    """

    app: Any
    sshd: SshdInfo

    def __init__(self, folder: Path, console: Console, env: Mapping[str, str] | None = None) -> None:
        self.folder = folder.absolute()
        self.console = console
        self._env = dict(env or {})
        self._stack = ExitStack()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._nodes: list[str] = []

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._clean()
            self.sshd = stack.enter_context(LoopbackSshd(self.folder / "sshd", home=self.folder / "host")).info
            self._environment = self._write_environment()
            os.environ.update(self._environment)
            self.app = find_app("worker_config")
            self.app.loader.import_default_modules()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def enter(self, context: AbstractContextManager[T]) -> T:
        """Have something end with the stage, after the nodes that are started later."""
        return self._stack.enter_context(context)

    def add_hosts(self, text: str) -> None:
        """Add to the hosts file; for the nodes that are started later."""
        with self._hosts.open("a", encoding="utf-8") as file:
            file.write(text)

    # -- processes

    def start_node(self, name: str) -> None:
        """Start a worker node, which joins the others; see `wait_for_nodes`. Also one that was killed."""
        if name not in self._nodes:
            self._nodes.append(name)
        self._start(f"worker-{name}", "worker", "-n", f"{name}@%h")

    def start_beat(self) -> None:
        """Start beat."""
        self._start("beat", "beat", "-s", str(self.folder / "beat-schedule"))

    def stop_beat(self) -> None:
        """End it; it can be started again."""
        _end(self._processes.pop("beat"))

    def wait_for_nodes(self) -> None:
        """Wait for `shared_out`."""
        until(self.shared_out, START_TIMEOUT, f"{len(self._nodes)} nodes have shared out the shards")

    def shared_out(self) -> bool:
        """Whether the nodes have shared out all shards evenly, so that no key moves any more."""
        for log, process in self._processes.items():
            if process.poll() is not None:
                tail = (self.folder / f"{log}.log").read_text(errors="replace")[-3000:]
                raise DemoError(f"{log} ended with exit code {process.returncode}:\n{tail}")
        shards = [stats["backend_pool"]["shards"] for stats in self.stats().values()]
        everything = sum(shards) == self.app.warm_pool.settings.shards
        return everything and len(shards) == len(self._nodes) and max(shards) - min(shards) <= 1

    def stats(self) -> dict[str, Any]:
        """What ``celery inspect stats`` says, by the short name of each node that answers."""
        found = self.app.control.inspect(timeout=0.5, limit=len(self._nodes)).stats() or {}
        return {name.partition("@")[0]: stats for name, stats in found.items()}

    def all_stats(self) -> dict[str, Any]:
        """`stats`, when all nodes have answered."""
        found: dict[str, Any] = {}

        def answered() -> bool:
            found.update(self.stats())
            return len(found) == len(self._nodes)

        until(answered, START_TIMEOUT, "all nodes answer")
        return found

    def kill(self, name: str, pid: int) -> float:
        """Kill -9 the worker process *pid* of a node; return when that was (wall clock, seconds)."""
        at = time.time()
        os.kill(pid, signal.SIGKILL)
        self._processes.pop(f"worker-{name}").wait(STOP_TIMEOUT)
        return at

    def _start(self, log: str, *what: str) -> None:
        self._processes[log] = self._stack.enter_context(self._celery(log, what))

    def _clean(self) -> None:
        """Begin with an empty folder, whatever an earlier run left. Valkey ends with its last user, this process."""
        embedded.stop(self.folder / "valkey")
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)

    def _write_environment(self) -> dict[str, str]:
        self._hosts = self.folder / "hosts.toml"
        self._hosts.write_text(
            "[default]\n"
            'backend = "ssh"\nhost = "127.0.0.1"\n'
            f"port = {self.sshd.port}\n"
            'username = "{key}"\nroot_dir = "{key}"\n'
            f"client_keys = {json.dumps(str(self.sshd.client_key))}\n"
            f"known_hosts = {json.dumps(str(self.sshd.known_hosts))}\n",
            encoding="utf-8",
        )
        return {
            "POOL_DATA_DIR": str(self.folder),
            "POOL_HOSTS_FILE": str(self._hosts),
            "POOL_NODE_SHARDS": "",  # leased
            "POOL_IDLE_TIMEOUT": str(IDLE_TIMEOUT),
            "POOL_SWEEP_INTERVAL": str(SWEEP_INTERVAL),
            **self._env,
        }

    @contextmanager
    def _celery(self, log: str, what: Collection[str]) -> Iterator[subprocess.Popen[bytes]]:
        """A ``celery`` process in a session of its own: Ctrl-C reaches the demo, which stops all in order.

        It runs in the supervised shell, so that it ends even when the demo is killed.
        """
        command = "exec " + shlex.join([sys.executable, "-m", "celery", "-A", "worker_config", *what, "-l", "INFO"])
        here = str(Path.cwd())
        path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
        with (self.folder / f"{log}.log").open("ab") as output:
            process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                ShellCommand(command, [here], {}).argv,
                env={**os.environ, **self._environment, "PYTHONPATH": path},
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            yield process
        finally:
            with process:  # lets go of the lifeline at the end, whatever happened before
                _end(process)

    @property
    def shown_folder(self) -> Path:
        """The folder as somebody in the current one would type it."""
        return self.folder.relative_to(Path.cwd()) if self.folder.is_relative_to(Path.cwd()) else self.folder


def _end(process: subprocess.Popen[bytes]) -> None:
    """Have a process end, and the shell around it; what does not end in time ends with its lifeline."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT)


def until(condition: Callable[[], bool], timeout: float, what: str, interval: float = 0.1) -> None:
    """Wait for something, with a look each *interval* seconds. Raises `DemoError` after *timeout* seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise DemoError(f"gave up after {timeout:g} s: waited until {what}")
        time.sleep(interval)
