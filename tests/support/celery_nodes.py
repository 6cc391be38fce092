"""pytest-celery's nodes over local processes.

pytest-celery gives its tests a broker, a result backend and workers as *nodes*, each over a Docker container. A node asks
little of its container: ``ready() celeryconfig logs() kill() restart() reload() status id name teardown()``. Here a
process of this machine, or the embedded Valkey, is given that shape, so the plugin's own node and cluster classes run on it.
"""

import contextlib
import json
import os
import signal as signals
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from pytest_celery import CeleryTestWorker

from pool import embedded
from tests.support.rabbitmq import RabbitServer
from tests.support.waiting import wait_until

CHECKOUT = Path(__file__).resolve().parents[2]

START_TIMEOUT = 60.0
STOP_TIMEOUT = 30.0

COMPLAINTS = ("was never retrieved", "never awaited", "IllegalTransition", "Exception ignored in", "died in a loop")
"""What no healthy node ever logs, whatever happens to it."""

live: dict[str, "Container"] = {}
"""Every container that was started and not torn down, by id: their logs are shown when a test fails."""


class Container:
    """The part of a Docker container that pytest-celery's nodes use."""

    ready_prompt = ""

    def __init__(self, name: str, folder: Path, id: str | None = None) -> None:
        self.id = id or uuid.uuid4().hex
        self.name = name
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        live[self.id] = self

    @property
    def celeryconfig(self) -> dict[str, Any]:
        return {}

    @property
    def status(self) -> str:
        """``running`` or ``exited``, as Docker says it."""
        raise NotImplementedError

    def logs(self) -> str:
        raise NotImplementedError

    def reload(self) -> None:
        """Docker's containers cache what they know; these look each time."""

    def teardown(self) -> None:
        live.pop(self.id, None)

    def ready(self) -> bool:
        """Wait until the ready prompt is logged; an end before that is told at once, with the log."""

        def look() -> bool:
            if self.status == "exited" and self.ready_prompt not in self.logs():
                raise AssertionError(f"{self.name} ended before it was ready:\n{self.logs()[-4000:]}")
            return self.ready_prompt in self.logs()

        return wait_until(look, f"{self.name} is ready", START_TIMEOUT)


class ProcessContainer(Container):
    """A program as a container: started at once, in a session of its own, with nothing in its environment but *env*."""

    def __init__(
        self, name: str, folder: Path, command: Sequence[str], env: Mapping[str, str], cwd: Path, id: str | None = None
    ) -> None:
        super().__init__(name, folder, id)
        self.command = list(command)
        self.env = dict(env)
        self.cwd = cwd
        self.log_file = folder / f"{name}-{self.id[:6]}.log"
        self.process: subprocess.Popen[bytes]
        self.started: list[psutil.Process] = []
        self._start()

    def _start(self) -> None:
        with self.log_file.open("ab") as log:
            self._log_start = log.tell()
            self.process = subprocess.Popen(
                self.command,
                cwd=self.cwd,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def status(self) -> str:
        return "running" if self.process.poll() is None else "exited"

    def logs(self) -> str:
        """What it has logged since its last start."""
        with self.log_file.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace")

    def kill(self, signal: str | int = "SIGKILL") -> None:
        """Send the main process a signal, as ``docker kill`` does."""
        self._note_children()
        self.process.send_signal(getattr(signals, signal) if isinstance(signal, str) else signal)

    def wait(self, timeout: float = STOP_TIMEOUT) -> int:
        """Wait for the end; return the exit code."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} did not end within {timeout:g} s") from None

    def restart(self, timeout: float = STOP_TIMEOUT) -> None:
        """Stop it if it still runs, start it again, wait until it is ready."""
        if self.status == "running":
            self.kill("SIGTERM")
        self.wait(timeout)
        self._start()
        self.ready()

    def children(self) -> list[psutil.Process]:
        """Its live descendants and whoever else is left of its session."""
        self._note_children()
        return [p for p in self.started if _lives(p)]

    def _note_children(self) -> None:
        try:
            found = psutil.Process(self.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            found = []
        self.started += [p for p in found if p not in self.started]

    def teardown(self) -> None:
        """TERM, then KILL, then whatever it has left behind."""
        if self.status == "running":
            self.kill("SIGTERM")
            try:
                self.process.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                self.kill("SIGKILL")
                self.process.wait(STOP_TIMEOUT)
        for left in self.children():
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
        super().teardown()
        text = self.log_file.read_text(errors="replace")
        found = [line for line in text.splitlines() if any(complaint in line for complaint in COMPLAINTS)]
        assert not found, f"{self.name} complained: {found}"


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


class CeleryContainer(ProcessContainer):
    """A ``celery`` command: with *env* and what a program needs to run at all, the checkout on its path."""

    def __init__(
        self, name: str, folder: Path, arguments: Sequence[str], env: Mapping[str, str], id: str | None = None
    ) -> None:
        command = [sys.executable, "-m", "celery", *arguments]
        super().__init__(name, folder, command, {**bare_environment(), **env}, folder, id)


class WorkerContainer(CeleryContainer):
    """A ``celery worker``; its Celery node name is what pytest-celery expects, ``NAME@`` and 12 digits of its id."""

    ready_prompt = " ready."

    def __init__(
        self,
        name: str,
        folder: Path,
        *,
        app: str = "worker_config",
        options: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._name = name
        node_id = uuid.uuid4().hex
        start = ["-A", app, "worker", "-l", "INFO", "-n", f"{name}@{node_id[:12]}"]
        quick = ["--without-mingle", "--without-gossip"]  # a second less until it is ready
        super().__init__(name, folder, [*start, *quick, *options], env or {}, node_id)

    def version(self) -> str:
        import celery

        return celery.__version__

    def log_level(self) -> str:
        return "INFO"

    def worker_name(self) -> str:
        return self._name

    def worker_queue(self) -> str:
        return "celery"


class BeatContainer(CeleryContainer):
    """A ``celery beat``."""

    ready_prompt = "beat: Starting..."

    def __init__(self, folder: Path, *, app: str, env: Mapping[str, str]) -> None:
        schedule = folder / "beat-schedule"
        super().__init__("beat", folder, ["-A", app, "beat", "-l", "INFO", "-s", str(schedule), "--pidfile="], env)


class ValkeyContainer(Container):
    """The embedded Valkey of a data folder; nodes with the same POOL_DATA_DIR find it by themselves."""

    def __init__(self, folder: Path) -> None:
        super().__init__("valkey", folder)
        self.url = embedded.embedded_url(folder)

    @property
    def celeryconfig(self) -> dict[str, Any]:
        return {"url": self.url, "host_url": self.url}

    @property
    def status(self) -> str:
        return "running" if embedded.EmbeddedValkey(self.folder)._runs() else "exited"

    def logs(self) -> str:
        return (self.folder / "valkey.log").read_text(errors="replace")

    def ready(self) -> bool:
        return self.status == "running"

    def kill(self, signal: str | int = "SIGTERM") -> None:
        """Stop it, whatever the signal: a server whose process is not ours is ended through its data folder only."""
        embedded.stop(self.folder)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Hold the server still, as a machine that hangs does."""
        pid = json.loads((self.folder / "server.json").read_text())["pid"]
        os.kill(pid, signals.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signals.SIGCONT)

    @contextlib.contextmanager
    def away(self, timeout: float = STOP_TIMEOUT) -> Iterator[None]:
        """Stop, and start again afterwards; the URL stays."""
        embedded.stop(self.folder)
        yield
        again = embedded.embedded_url(self.folder, timeout=timeout)
        assert again == self.url

    def restart(self, timeout: float = STOP_TIMEOUT) -> None:
        """Stop and start."""
        with self.away(timeout):
            pass

    def teardown(self) -> None:
        embedded.stop(self.folder)
        super().teardown()


class RabbitContainer(Container):
    """A virtual host of a private RabbitMQ; the server belongs to the test run, and outlives this."""

    def __init__(self, server: RabbitServer) -> None:
        super().__init__("rabbitmq", server.folder)
        self.server = server
        self.url = server.vhost()

    @property
    def celeryconfig(self) -> dict[str, Any]:
        return {"url": self.url, "host_url": self.url}

    @property
    def status(self) -> str:
        return "running"

    def logs(self) -> str:
        return self.server.log

    def ready(self) -> bool:
        return True


class WorkerNode(CeleryTestWorker):
    """pytest-celery's worker node, and what only a local process can tell."""

    container: WorkerContainer

    @property
    def pid(self) -> int:
        return self.container.pid

    def wait(self, timeout: float = STOP_TIMEOUT) -> int:
        """Wait for its end; return the exit code."""
        return self.container.wait(timeout)

    def stop(self, signal: str = "SIGTERM", timeout: float = STOP_TIMEOUT) -> int:
        """Signal it and wait for its end; return the exit code."""
        self.kill(signal)
        return self.wait(timeout)

    def wait_for(self, text: str, timeout: float = START_TIMEOUT) -> None:
        """Wait until *text* is in its log."""
        wait_until(lambda: text in self.logs(), f"{self.name()} logs {text!r}", timeout)


def bare_environment() -> dict[str, str]:
    """What any program gets: no POOL_ variable among it."""
    env = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
    return {**env, "PYTHONPATH": str(CHECKOUT), "PYTHONUNBUFFERED": "1"}


def run_celery(
    arguments: Sequence[str], cwd: Path, env: Mapping[str, str] | None = None, *, stdin: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a ``celery`` command to its end."""
    with (stdin or Path(os.devnull)).open("rb") as file:
        return subprocess.run(
            [sys.executable, "-m", "celery", *arguments],
            cwd=cwd,
            env={**bare_environment(), **(env or {})},
            stdin=file,
            capture_output=True,
            text=True,
            timeout=START_TIMEOUT,
            check=False,
        )


def process_gone(pid: int) -> bool:
    """Whether no process of this id runs (a zombie does not)."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
