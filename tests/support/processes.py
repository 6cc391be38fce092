"""Looking at processes from outside."""

import os
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


def group_members(pgid: int) -> list[int]:
    """The running processes of a process group."""

    def belongs(process: psutil.Process) -> bool:
        try:
            return os.getpgid(process.pid) == pgid and process.status() != psutil.STATUS_ZOMBIE
        except (ProcessLookupError, psutil.NoSuchProcess):
            return False

    return [process.pid for process in psutil.process_iter() if belongs(process)]


def wait_group_gone(pgid: int) -> None:
    """Wait until no process of the group runs."""
    wait_until(lambda: not group_members(pgid), f"process group {pgid} is gone", 30.0)


def has_pid(file: Path) -> bool:
    """Whether a command has written its process id and a newline to *file*."""
    return file.exists() and file.read_text().endswith("\n")


def wait_pid(file: Path, timeout: float = 20.0) -> int:
    """Wait until a command has written its process id and a newline to *file*."""

    def read() -> int | None:
        text = file.read_text() if file.exists() else ""
        return int(text) if text.endswith("\n") else None

    return wait_until(read, f"a process id in {file.name}", timeout) or 0
