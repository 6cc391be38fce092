"""The processes of one command: what it started, and what that started, wherever it went.

A command is the first process of a session of its own. Its family is everything in that session, everything below it
in the tree of processes, and every session that one of those has begun. On Linux the tree is read from /proc, and who
lost its parent becomes a child of the helper, so that it can still be told from the rest of the host; whose it is a
variable in its environment says (`MARK`). Elsewhere the family is the command's process group.
"""

import os
import signal
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Container

PROC = "/proc"
MARK = b"WARM_COMMAND"
"""The variable by which what a command has started is told from what others have. Who clears it is told by less.
No ``POOL_``: those are a node's own, which no command sees."""


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
        return int(time.clock_gettime(7) * _TICKS)  # CLOCK_BOOTTIME, which Python 3.6 does not name
    except (OSError, AttributeError):
        return 0


_TICKS = os.sysconf("SC_CLK_TCK")


def nobodys(_: Process) -> bool:
    """No orphan belongs to anybody."""
    return False


def marked(process: Process, mark: bytes) -> bool:
    """Whether the environment that a process was started with has this `MARK`."""
    try:
        with open("%s/%d/environ" % (PROC, process.pid), "rb", buffering=0) as file:
            return MARK + b"=" + mark in file.read().split(b"\0")
    except OSError:  # gone, or another user's
        return False


class Orphans:
    """Processes that lost their parent, and became children of this one; and whose they are.

    One with the mark of a command is the command's. Of the others: one that was born before a command began is not the
    command's, nor one in the session of an orphan that was there. Of what came later none can tell, unless the command
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

    def belong(
        self, spared: bytes, began: int, mark: bytes = b"", commands: "Container[int]" = ()
    ) -> "Callable[[Process], bool]":
        """Return what tells of a process whether it is of a command that *began* (`ticks`) when *spared* were there.

        *commands*: the processes that are no orphans.
        """
        before = self.spared.union(int(pid) for pid in spared.split())
        me = os.getpid()

        def belongs(process: Process) -> bool:
            if process.parent != me or process.pid in commands:
                return False
            if mark and marked(process, mark):
                return True
            if process.start <= self._mixed_until or process.start < began:
                return False
            return process.pid not in before and process.session not in before

        return belongs if self.adopting else nobodys


def _adopt() -> bool:
    """Become the parent of every process below this one that loses its own. Returns whether that can be done."""
    try:
        import ctypes

        return bool(ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) == 0)  # PR_SET_CHILD_SUBREAPER
    except Exception:  # no ctypes, no prctl: not Linux, or a bare Python
        return False


ANY, GONE = -1, 0
"""In place of a start. The process lives, or has not been waited for: its number is its own. Or it was waited for."""


def members(
    roots: "dict[int, int]", everyone: "list[Process]", belongs: "Callable[[Process], bool]"
) -> "list[Process]":
    """Return the living family among *everyone*, and add it to *roots*, which are known to be of it: pid and start.

    *belongs* tells which orphans are of it, too.
    """
    me = os.getpid()
    family = set(roots)
    for process in everyone:  # a number that is another's now tells nothing; one that is nobody's may be a session's
        if roots.get(process.pid, ANY) not in (ANY, process.start):
            family.discard(process.pid)
    others = {process.pid for process in everyone if process.pid in roots} - family
    grown = True
    while grown:
        grown = False
        for process in everyone:
            if process.pid in family or process.pid in others or process.pid == me:
                continue
            if process.parent in family or process.session in family or belongs(process):
                family.add(process.pid)
                grown = True
    found = [process for process in everyone if process.pid in family and process.state not in (b"Z", b"X")]
    for process in found:
        if roots.get(process.pid) != ANY:
            roots[process.pid] = process.start
    return found


def group_lives(leader: int) -> bool:
    """Whether there is anybody in a process group."""
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def send(number: int, leader: int, family: "list[Process]", *, leads: bool) -> None:
    """Signal a family. *leads*: the leader has not been waited for, so its group cannot be another's."""
    if leads:
        _signal(os.killpg, leader, number)
    for process in family:
        if not (leads and process.group == leader):
            _signal(os.kill, process.pid, number)


def ask_to_end(pid: int) -> None:
    """Send TERM to a process that may be gone by now."""
    _signal(os.kill, pid, signal.SIGTERM)


def _signal(call: "Callable[[int, int], None]", target: int, number: int) -> None:
    try:
        call(target, number)
        if number == signal.SIGTERM:
            call(target, signal.SIGCONT)  # who is stopped would not hear it
    except OSError:  # gone, or another user's
        pass


def sweep(told: "list[bytes]") -> None:
    """End what an earlier helper, which is no more, has left of a command: a mark, or a process and its start, each."""
    for text in told:
        pid, _, start = text.partition(b" ")
        roots = {int(pid): int(start)} if start else {}
        for _ in range(20):  # what it starts at this moment is found the next time
            everyone = processes()
            if not start:
                roots.update((process.pid, process.start) for process in everyone if marked(process, text))
            found = members(roots, everyone, nobodys)
            if not found:
                break
            send(signal.SIGKILL, 0, found, leads=False)
            time.sleep(0.01)
