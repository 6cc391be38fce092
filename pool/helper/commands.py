"""One command on the host: started in a session of its own, its output read against credit, ended with its family."""

import errno
import os
import resource  # also what `os.wait4` loads: later there may be no descriptor left for that
import signal
import sys

from pool.helper import family, wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import IO

_ARGUMENT_LIMIT = 100000
"""Bytes of a command; a longer one is read from a file. Linux takes at most 128 KiB in one argument."""

_RESTORED = [signal.SIGPIPE, signal.SIGXFSZ, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM]
"""Signals that Python, the helper, or whoever started sshd in the background, ignores, and a command must not."""

_SPARED = 16
"""Descriptors that commands leave to the rest: looking at processes, and file operations."""

KILL_TICK, KILL_TICKS = 0.005, 0.04
"""Seconds between two looks at a family that is being ended: at first, and at most; they double."""
KILL_PATIENCE = 5.0
"""Seconds to go on with it."""


class Refused(Exception):
    """The command was not started; the arguments are those of a FAILED."""


class Stdin:
    """What a command is to read, all of it before it starts: in memory while it is short, then in an unnamed file."""

    def __init__(self) -> None:
        import tempfile

        self._file = tempfile.SpooledTemporaryFile(wire.CHUNK)  # noqa: SIM115
        self._errno = 0
        self.consumed = 0  # since the worker was given credit

    def add(self, data: bytes) -> None:
        """Take the next piece; what goes wrong is told by `descriptor`."""
        self.consumed += len(data)
        if self._errno:
            return
        try:
            self._file.write(data)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):  # it is in memory still
                self._errno = error.errno or errno.EIO

    def descriptor(self) -> int:
        """Return a descriptor to read it from. Raises `Refused`, and `OSError` when there is no room for it now."""
        if self._errno:
            raise Refused(b"stdin", b"%d" % self._errno)
        self._file.rollover()
        self._file.seek(0)
        return self._file.fileno()

    def close(self) -> None:
        """Forget it; a command that has started has its own hold of it."""
        try:
            self._file.close()
        except OSError:  # no room for what was not written yet: nobody will read it
            pass


class Command:
    """A command that runs.

    *spared*: the orphans that were there before it, and *began*: the time, see `family.Orphans`. *mark*: of its family.
    """

    __slots__ = (
        "began",
        "code",
        "credit",
        "due",
        "known",
        "led",
        "mark",
        "number",
        "outputs",
        "over",
        "paused",
        "pid",
        "spared",
        "tick",
        "usage",
    )

    def __init__(
        self, number: int, pid: int, outputs: "dict[int, int]", spared: bytes, began: int, mark: bytes = b""
    ) -> None:
        self.number, self.pid, self.outputs, self.spared, self.began = number, pid, outputs, spared, began
        self.mark = mark
        self.known = {pid: family.ANY}  # its family so far: who has lost its parent stays in it
        self.led = False
        self.credit = wire.WINDOW
        self.paused = False
        self.code = None  # type: int | None
        self.usage = (0.0, 0)
        self.over = None  # type: float | None
        self.due = 0.0
        self.tick = KILL_TICK

    def reaped(self, status: int, usage: "resource.struct_rusage") -> None:
        """Note how its first process ended."""
        self.code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)
        size = usage.ru_maxrss if sys.platform == "darwin" else usage.ru_maxrss << 10
        self.usage = (usage.ru_utime + usage.ru_stime, size)
        self.known[self.pid] = family.GONE

    def kill(self, now: float, alive: "list[family.Process] | None") -> bool:
        """Go on with ending its family, of which *alive* is left: TERM, then KILL. Returns whether that is over.

        None: it cannot be seen. Then its group is the family, if it still had its leader when the ending began.
        """
        leads = self.code is None
        if self.over is None:
            self.led = leads
        if alive is None:
            alive = []
            leads = leads or (self.led and family.group_lives(self.pid))
        if self.over is None:
            self.over = now + wire.KILL_GRACE
            family.send(signal.SIGTERM, self.pid, alive, leads=leads)
        elif not alive and not leads:
            return True
        elif now >= self.over:
            family.send(signal.SIGKILL, self.pid, alive, leads=leads)
            if now >= self.over + KILL_PATIENCE:
                return True
        self.due = now + self.tick
        if now < self.over:
            self.due = min(self.due, self.over)
        self.tick = min(KILL_TICKS, 2 * self.tick)
        return False


def ended_children() -> "Iterator[tuple[int, int, resource.struct_rusage]]":
    """Wait for the children that have ended: process, status, usage of each."""
    while True:
        try:
            pid, status, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        yield pid, status, usage


def environment(of_parent: bool) -> "dict[bytes, bytes]":
    """Return the environment this program was started with; Python itself may have set LC_CTYPE since.

    *of_parent*: the one that the login shell was started with, before it read its start-up files.
    """
    try:
        with open("/proc/%s/environ" % (os.getppid() if of_parent else "self"), "rb") as file:
            variables = dict(line.split(b"=", 1) for line in file.read().split(b"\0") if b"=" in line)
    except OSError:
        variables = dict(os.environb)
    variables.pop(b"_", None)  # a shell's word for the program it starts
    return variables


def start(
    request: bytes, base: "dict[bytes, bytes]", mark: bytes = b"", stdin: "int | None" = None
) -> "tuple[int, int, int]":
    """Start the command of an EXEC; return its process and the ends of its stdout and stderr to read from.

    *mark*: in its environment, unless it is empty or the command has one of its own. *stdin*: None is an empty one.

    Raises `Refused`, and `OSError` when there is no room for it now (descriptors, processes, memory).
    """
    command, count, rest = request.split(b"\0", 2)
    texts = rest.split(b"\0")
    folders, variables = texts[: int(count)], texts[int(count) :]
    env = base
    if variables or mark:
        env = dict(base)
        if mark:
            env[family.MARK] = mark
        for variable in variables:
            name, _, value = variable.partition(b"=")
            env[name] = value
    script = None
    ends = []  # type: list[int]
    try:
        _enter(folders)
        argv = [b"/bin/sh", b"-c", command]
        if len(command) > _ARGUMENT_LIMIT:
            script = _file_of(command)
            argv = [b"/bin/sh", b"-c", b". /dev/fd/9", b"/bin/sh"]
        ends += os.pipe()
        ends += os.pipe()
        if max(ends) >= _limit:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        try:
            pid = _spawn(argv, env, (NULL if stdin is None else stdin, ends[1], ends[3]), script)
        except OSError as error:
            if error.errno != errno.E2BIG:
                raise
            raise Refused(b"toobig") from None
        os.set_blocking(ends[0], False)
        os.set_blocking(ends[2], False)
        out, err = ends[0], ends[2]
        ends = [ends[1], ends[3]]
        return pid, out, err
    finally:
        os.chdir("/")  # hold no folder that somebody wants to remove
        for end in ends:
            os.close(end)
        if script is not None:
            script.close()


def _enter(folders: "list[bytes]") -> None:
    """Go to the last of *folders*, each of which must be inside the one before, symlinks resolved."""
    outer = last = None
    for folder in folders:
        if folder == last:
            continue
        last = folder
        try:
            os.chdir(folder)
            here = os.getcwdb()
        except OSError:
            raise Refused(b"cwd", folder) from None
        if outer is not None and here != outer and not here.startswith(outer.rstrip(b"/") + b"/"):
            raise Refused(b"escape", here)
        outer = here


def _file_of(text: bytes) -> "IO[bytes]":
    """Return a file without a name, to read *text* from."""
    import tempfile

    file = tempfile.TemporaryFile()  # noqa: SIM115
    try:
        file.write(text)
        file.seek(0)
    except BaseException:
        file.close()
        raise
    return file


def _spawn(
    argv: "list[bytes]", env: "dict[bytes, bytes]", streams: "tuple[int, int, int]", script: "IO[bytes] | None"
) -> int:
    """Start it in a session of its own, with these as its stdin, stdout and stderr."""
    try:
        moves = [(os.POSIX_SPAWN_DUP2, stream, number) for number, stream in enumerate(streams)]
        if script is not None:
            moves.append((os.POSIX_SPAWN_DUP2, script.fileno(), 9))
        return os.posix_spawn(argv[0], argv, env, file_actions=moves, setsid=True, setsigmask=(), setsigdef=_RESTORED)
    except (AttributeError, NotImplementedError):
        return _fork(argv, env, streams, -1 if script is None else script.fileno())


def _fork(argv: "list[bytes]", env: "dict[bytes, bytes]", streams: "tuple[int, int, int]", script: int) -> int:
    """`_spawn` for Python before 3.8, and C libraries that cannot begin a session."""
    told, telling = os.pipe()
    pid = os.fork()
    if pid:
        os.close(telling)
        failed = os.read(told, 16)
        os.close(told)
        if failed:
            os.waitpid(pid, 0)
            raise OSError(int(failed), os.strerror(int(failed)))
        return pid
    try:
        os.setsid()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        if script >= 0 and script != 9:
            os.dup2(script, 9)
        elif script >= 0:
            os.set_inheritable(script, True)
        for number in _RESTORED:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        os.execve(argv[0], argv, env)  # noqa: S606
    except OSError as error:
        os.write(telling, b"%d" % (error.errno or 0))
    finally:
        os._exit(127)


NULL = os.open(os.devnull, os.O_RDWR)
"""What reads as empty, and takes everything."""
_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
_limit = max(_files - _SPARED, _files // 2) if _files > 0 else sys.maxsize
