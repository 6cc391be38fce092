"""The host of the builds, which is this machine, seen from outside: processes are told by their environment."""

import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.harness import remote_folder

LOOKS = 5  # at all processes, to miss none: one that is in the middle of an exec shows no environment

CLEAR_TIMEOUT = 10.0  # seconds


class BuildHost:
    """Builds on an SSH server, and what they have started there. ``folder``: that of all keys."""

    def __init__(self, folder: Path, info: Any) -> None:
        self.folder: Path = info.home / remote_folder(folder)
        self._mark = f"{folder.name}/"
        self._sshd = f" 127.0.0.1 {info.port}\0".encode()  # the end of its SSH_CONNECTION

    def run(self, key: str, command: str, kind: str, **options: Any) -> Any:
        """Send a build that is told by its kind; return its result to come."""
        from tasks import run_build

        return run_build.delay(key, command, env={"BENCH_BUILD": self._mark + kind}, **options)

    def builds(self, kind: str = "", looks: int = LOOKS) -> set[psutil.Process]:
        """Return what builds of a kind, or all, have started, and is there."""
        mark = f"BENCH_BUILD={self._mark}{kind}".encode()
        return {process for _ in range(looks) for process in _with(mark)}

    def others(self) -> set[psutil.Process]:
        """Return what else the server runs: our helpers and shells."""
        return {process for _ in range(LOOKS) for process in _with(self._sshd, without=b"BENCH_BUILD=")}

    def clear(self) -> None:
        """End it all; again and again, for some of them start others meanwhile."""
        deadline = time.monotonic() + CLEAR_TIMEOUT
        while (found := self.builds() | self.others()) and time.monotonic() < deadline:
            for process in found:
                with suppress(psutil.Error):
                    process.kill()


def _with(text: bytes, without: bytes | None = None) -> Iterator[psutil.Process]:
    for pid in psutil.pids():
        with suppress(OSError, psutil.Error):
            environ = Path(f"/proc/{pid}/environ").read_bytes()
            if text in environ and (without is None or without not in environ):
                yield psutil.Process(pid)
