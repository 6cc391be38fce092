"""Processes that a killed worker has left behind, and how to know them.

Every piped process carries, in its environment and that of all that it starts, a mark that names its owner: the process
that started it, and when that one was started. Nothing should outlive its owner (`pool.backends.shell`); what does is
ended by the next worker that starts on the machine. What carries no mark, or one of a live owner, is nobody's to end.
"""

import logging
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

from pool.backends.shell import KILL_GRACE, MARK
from pool.runtime import fork_count

logger = logging.getLogger(__name__)

_FORM = re.compile(r"(?P<machine>[0-9a-f-]+)\.(?P<pid>\d+)\.(?P<start>\d+)\.[0-9a-f]+")


def owner() -> str:
    """Return the mark of this process: the machine's boot and process namespace, its id, when it was started."""
    return _owner(os.getpid(), fork_count())


@cache
def _owner(pid: int, _forks: int) -> str:
    return f"{_machine()}.{pid}.{_started(pid)}"


def _machine() -> str:
    """Process ids mean something in one namespace of one boot of one machine."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}-{os.stat('/proc/self/ns/pid').st_ino:x}"
    except OSError:
        return "0"


def _started(pid: int) -> int | None:
    """When a process was started, in ticks since the boot; None: it is gone. 0 where the system does not tell."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None if os.path.isdir("/proc/self") else 0
    except ProcessLookupError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else int(fields[19])


def find_leftovers() -> list[int]:
    """Return the ids of the processes that `sweep_leftovers` would end."""
    return [process.pid for process in _leftovers()]


def sweep_leftovers() -> list[int]:
    """End every process whose owner is gone: TERM, then KILL. Returns their ids.

    Blocks for up to `KILL_GRACE` seconds, and looks at each process of this user: for the start of a worker. Never its
    own process, nor those it was started by: an agent may have started a worker.
    """
    import psutil

    found = _leftovers()
    for process in found:
        _end(process, hard=False)
    _, stubborn = psutil.wait_procs(found, timeout=KILL_GRACE)
    for process in stubborn:
        _end(process, hard=True)
    if found:
        logger.warning("ended %d processes that a killed worker had left: %s", len(found), [p.pid for p in found])
    return [process.pid for process in found]


def _leftovers() -> list[Any]:
    import psutil

    me = psutil.Process()
    spared = {me, *me.parents()}
    return [process for process in psutil.process_iter() if process not in spared and _is_left(process)]


def _is_left(process: Any) -> bool:
    import psutil

    try:
        mark = _FORM.fullmatch(process.environ().get(MARK, ""))
    except (psutil.Error, OSError):  # another user's, or just gone
        return False
    if mark is None or mark["machine"] != _machine():
        return False
    return _started(int(mark["pid"])) != int(mark["start"])


def _end(process: Any, *, hard: bool) -> None:
    import psutil

    try:
        if hard:
            process.kill()
        else:
            process.terminate()
    except psutil.Error:  # gone; psutil does not signal another process that got its id
        pass
