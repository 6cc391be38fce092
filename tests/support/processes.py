"""Looking at processes from outside."""

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


def wait_pid(file: Path, timeout: float = 20.0) -> int:
    """Wait until a command has written its process id and a newline to *file*."""

    def read() -> int | None:
        text = file.read_text() if file.exists() else ""
        return int(text) if text.endswith("\n") else None

    return wait_until(read, f"a process id in {file.name}", timeout) or 0
