"""What all tables share: rows with a target, contestants taken in turn, servers and workers that end by themselves."""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.table import Table

from pool.embedded import embedded_url, stop

REPOSITORY = Path(__file__).resolve().parent.parent
BOOT_TIMEOUT = 30.0  # seconds for a worker to say that it is ready
STOP_TIMEOUT = 15.0  # seconds for a worker to end after TERM, then KILL

console = Console(width=None if sys.stdout.isatty() else 130)


@dataclass(frozen=True)
class Row:
    """One measured number. *target*: the number to reach; *least*: whether it is a lower bound."""

    what: str
    measured: float
    unit: str
    target: float | None = None
    least: bool = False
    remark: str = ""

    @property
    def reached(self) -> bool | None:
        if self.target is None:
            return None
        return self.measured >= self.target if self.least else self.measured <= self.target


@dataclass
class Report:
    """One table, and the raw numbers behind it."""

    name: str
    title: str
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    raw: dict[str, Any] = field(default_factory=dict)

    def add(self, what: str, measured: float, unit: str, target: float | None = None, **more: Any) -> None:
        self.rows.append(Row(what, measured, unit, target, **more))

    def show(self) -> None:
        table = Table(title=f"{self.name}: {self.title}", title_justify="left", title_style="bold", expand=False)
        for heading in ("what", "measured", "required", ""):
            numbers = heading in ("measured", "required")
            table.add_column(heading, justify="right" if numbers else "left", overflow="fold")
        for row in self.rows:
            required = "" if row.target is None else f"{'>=' if row.least else '<='} {_number(row.target)} {row.unit}"
            verdict = {None: row.remark, True: "[green]reached[/]", False: "[red]not reached[/]"}[row.reached]
            if row.reached is not None and row.remark:
                verdict += f" ({row.remark})"
            table.add_row(row.what, f"{_number(row.measured)} {row.unit}", required, verdict)
        console.print(table)
        for note in self.notes:
            console.print(f"  {note}", style="dim", highlight=False)
        console.print()

    def as_json(self) -> dict[str, Any]:
        rows = [{**asdict(row), "reached": row.reached} for row in self.rows]
        return {"name": self.name, "title": self.title, "rows": rows, "notes": self.notes, "raw": self.raw}


def _number(value: float) -> str:
    if value == int(value) and abs(value) < 1e9:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


p50 = statistics.median


def interleaved(contestants: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Run A B C, B C A, C A B, ...: a noisy minute, or a warm place after somebody, meets all of them alike."""
    told: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for number in range(rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            told[name].append(contestants[name]())
    return told


def ratio(above: list[float], below: list[float]) -> float:
    """The median of the ratios of each round: steadier than the ratio of the medians on a noisy machine."""
    return p50([a / b for a, b in zip(above, below, strict=True)])


def spread(values: list[float]) -> str:
    return f"p50 of {len(values)}, {_number(min(values))} to {_number(max(values))}"


@contextmanager
def scratch() -> Iterator[Path]:
    """A private folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="pool-bench-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@contextmanager
def broker(folder: Path) -> Iterator[str]:
    """The URL of a Valkey of our own."""
    data = folder / "valkey"
    try:
        yield embedded_url(data)
    finally:
        stop(data)


@contextmanager
def ssh_server(folder: Path, *, max_startups: int | str = 300) -> Iterator[tuple[str, Any]]:
    """``(which, info)``: OpenSSH if there is one, with an account whose shell is /bin/sh, else the loopback server."""
    with suppress(ImportError):
        from tests.support.openssh import OpenSshd, sshd_binary

        if sshd_binary() is not None:
            with OpenSshd(folder / "sshd", max_sessions=20, max_startups=max_startups) as server:
                try:
                    yield "OpenSSH", server.info
                finally:  # its home outlives the server
                    shutil.rmtree(server.info.home / remote_folder(folder), ignore_errors=True)
            return
    from pool.loopback_sshd import LoopbackSshd

    home = folder / "home"
    home.mkdir()
    with LoopbackSshd(folder / "sshd", home=home, max_sessions=20) as loopback:
        yield "asyncssh's server on loopback", loopback.info


def remote_folder(folder: Path) -> str:
    """The folder in the home of the server's account that this run may use."""
    return f"bench-{folder.name}"


def ssh_hosts(folder: Path, info: Any) -> Path:
    """Write a hosts file by which every key is a folder of the server, over a connection of its own."""
    fields = {
        "backend": "ssh",
        "host": "127.0.0.1",
        "port": info.port,
        "username": info.username,
        "client_keys": str(info.client_key),
        "known_hosts": str(info.known_hosts),
        "root_dir": f"{remote_folder(folder)}/{{key}}",
    }
    path = folder / "hosts.toml"
    path.write_text("[default]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in fields.items()))
    return path


class Worker:
    """A ``celery worker`` process, ready when the context is entered, ended by its pid at the end."""

    def __init__(self, app: str, name: str, env: Mapping[str, str], *options: str, log: Path | None = None) -> None:
        self._log_file = log
        command = [sys.executable, "-m", "celery", "-A", app, "worker", "-n", f"{name}@bench", "-l", "WARNING"]
        self._command = [*command, "--without-gossip", "--without-mingle", "--without-heartbeat", *options]
        self._name = name
        self._env = {**os.environ, **env}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def __enter__(self) -> Self:
        self._log = tempfile.TemporaryFile() if self._log_file is None else self._log_file.open("a+b")
        self._process = subprocess.Popen(
            self._command, cwd=REPOSITORY, env=self._env, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)
        with suppress(subprocess.TimeoutExpired):
            self.stop()
        self.kill()
        self._log.close()

    def stop(self, timeout: float = STOP_TIMEOUT) -> int:
        """TERM; return the exit code. Raises `subprocess.TimeoutExpired`."""
        assert self._process is not None
        self._process.terminate()
        return self._process.wait(timeout)

    def kill(self) -> None:
        """KILL; gone when it returns."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def until(self, ready: Callable[[], Any], what: str, timeout: float = BOOT_TIMEOUT) -> Any:
        """Ask *ready* until it returns something true. Raises `RuntimeError` with the worker's log."""
        assert self._process is not None
        deadline = time.monotonic() + timeout
        while not (found := ready()):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._log.seek(0)
                tail = self._log.read()[-4000:].decode(errors="replace")
                raise RuntimeError(f"worker {self._name}: {what}: not within {timeout:g} s; its log ends:\n{tail}")
            time.sleep(0.01)
        return found

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Hold the process still: it takes no message and no CPU."""
        os.kill(self.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)


def pong(app: Any, name: str) -> bool:
    """Whether the worker answers a ping."""
    return bool(app.control.inspect(destination=[f"{name}@bench"], timeout=0.3).ping())
