"""Looking at processes from outside."""

from contextlib import suppress
from pathlib import Path

import psutil

from tests.support.waiting import wait_until


def is_gone(pid: int) -> bool:
    """Whether the process has ended; a zombie has."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_gone(*pids: int, timeout: float = 20.0) -> None:
    """Return when all have ended."""
    wait_until(lambda: all(is_gone(pid) for pid in pids), f"processes {pids} are gone", timeout)


def living_below(pid: int) -> list[str]:
    """The names of all processes below this one that have not ended."""
    names = []
    for process in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                names.append(process.name())
    return names


def has_pid(file: Path) -> bool:
    """Whether a command has written its process id and a newline to *file*."""
    return file.exists() and file.read_text().endswith("\n")


def wait_pid(file: Path, timeout: float = 20.0) -> int:
    """Wait until a command has written its process id and a newline to *file*."""

    def read() -> int | None:
        text = file.read_text() if file.exists() else ""
        return int(text) if text.endswith("\n") else None

    return wait_until(read, f"a process id in {file.name}", timeout) or 0
