"""The processes of one command: what it started, and what that started, wherever it went.

A command is the first process of a session of its own. Its family is everything in that session, everything below it
in the tree of processes, and every session that one of those has begun. On Linux the tree is read from /proc, and who
lost its parent becomes a child of the helper (`adopt_orphans`), so that it can still be told from the rest of the host.
Elsewhere the family is the command's process group.
"""

import os
import signal
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

PROC = "/proc"


class Process:
    """What /proc tells of one process; ``start`` in ticks since the boot."""

    __slots__ = ("group", "parent", "pid", "session", "start", "state")

    def __init__(self, pid: int, fields: "list[bytes]") -> None:
        self.pid = pid
        self.state = fields[0]
        self.parent, self.group, self.session = int(fields[1]), int(fields[2]), int(fields[3])
        self.start = int(fields[19])


def look(pid: int) -> "Process | None":
    """Return what there is to know about a process; None: it is gone, or there is no /proc."""
    try:
        with open("%s/%d/stat" % (PROC, pid), "rb", buffering=0) as file:
            return Process(pid, file.read().rpartition(b")")[2].split())
    except (OSError, IndexError, ValueError):
        return None


def processes() -> "list[Process]":
    """Every process of this machine that can be seen."""
    try:
        names = os.listdir(PROC)
    except OSError:
        return []
    found = [look(int(name)) for name in names if name.isdigit()]
    return [process for process in found if process is not None]


def ticks() -> int:
    """Return the present time as `Process.start` counts it."""
    try:
        return int(time.clock_gettime(7) * os.sysconf("SC_CLK_TCK"))  # CLOCK_BOOTTIME, which Python 3.6 does not name
    except (OSError, AttributeError):
        return 0


def nobodys(_: Process) -> bool:
    """No orphan belongs to anybody."""
    return False


class Orphans:
    """Processes that lost their parent, and became children of this one; and whose they are.

    One that was there when a command began is not the command's. Of what came later none can tell, unless the command
    was the only one that ran since: then it is.
    """

    def __init__(self) -> None:
        self.adopting = _adopt()
        self.spared = set()  # type: set[int]
        """Children of this process that are nobody's."""
        self._mixed_until = 0
        try:
            self._children = os.open("%s/self/task/%d/children" % (PROC, os.getpid()), os.O_RDONLY)
        except OSError:
            self.adopting = False

    def present(self) -> bytes:
        """Return those that are there now, for `belongs`."""
        if not self.adopting:
            return b""
        return os.pread(self._children, 1 << 16, 0)

    def mix(self) -> None:
        """Note that two commands run at this moment."""
        self._mixed_until = ticks()

    def belong(self, spared: bytes) -> "Callable[[Process], bool]":
        """Return what tells of a process whether it is of a command that began when *spared* were there."""
        before = self.spared.union(int(pid) for pid in spared.split())
        me = os.getpid()

        def belongs(process: Process) -> bool:
            return process.parent == me and process.start > self._mixed_until and process.pid not in before

        return belongs if self.adopting else nobodys


def _adopt() -> bool:
    """Become the parent of every process below this one that loses its own. Returns whether that can be done."""
    try:
        import ctypes

        return bool(ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) == 0)  # PR_SET_CHILD_SUBREAPER
    except Exception:  # no ctypes, no prctl: not Linux, or a bare Python
        return False


def members(leader: int, everyone: "list[Process]", belongs: "Callable[[Process], bool]") -> "list[Process]":
    """Return the living family of *leader* among *everyone*; *belongs* tells which orphans are of it."""
    me = os.getpid()
    family = {leader}
    grown = True
    while grown:
        grown = False
        for process in everyone:
            if process.pid in family or process.pid == me:
                continue
            if process.parent in family or process.session in family or belongs(process):
                family.add(process.pid)
                grown = True
    return [process for process in everyone if process.pid in family and process.state not in (b"Z", b"X")]


def send(number: int, leader: int, family: "list[Process]", *, leads: bool) -> None:
    """Signal a family. *leads*: the leader has not been waited for, so its group cannot be another's."""
    if leads:
        _signal(os.killpg, leader, number)
    for process in family:
        if not (leads and process.group == leader):
            _signal(os.kill, process.pid, number)
            if number == signal.SIGTERM:
                _signal(os.kill, process.pid, signal.SIGCONT)
    if leads and number == signal.SIGTERM:  # who is stopped would not hear it
        _signal(os.killpg, leader, signal.SIGCONT)


def _signal(call: "object", target: int, number: int) -> None:
    try:
        call(target, number)  # type: ignore[operator]
    except OSError:  # gone, or another user's
        pass


def sweep(told: "list[bytes]") -> None:
    """End what an earlier helper, which is no more, told of: each a process and its start."""
    for text in told:
        pid, _, start = text.partition(b" ")
        leader = int(pid)
        now = look(leader)
        if now is not None and start and now.start != int(start):  # the number is another process's now
            continue
        for _ in range(20):  # what it starts at this moment is found the next time
            family = members(leader, processes(), nobodys)
            if not family:
                break
            send(signal.SIGKILL, leader, family, leads=False)
            time.sleep(0.01)
