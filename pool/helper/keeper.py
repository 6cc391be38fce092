"""The keeper of a durable command: a process of its own, which the helper forks and nobody ends with the connection.

It starts the command, reads its output at once, whoever follows, keeps the first and the last of it, ends the command
when its time is over or when asked to by TERM, and writes down how it ended.
"""

import errno
import fcntl
import os
import select
import signal
import time

from pool.helper import commands, durable, family, wire


def keep(request: durable.Request, env: "dict[bytes, bytes]", stdin: "int | None") -> int:
    """Start a keeper: it starts the command, if nobody has. Returns its process, a child of this one."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        _forget(stdin)
        code = _keep(request, env, stdin)
    except OSError as error:  # the helper tells it: there may be no room to write it down
        code = error.errno or 1
    finally:
        os._exit(code)


def _forget(stdin: "int | None") -> None:
    """Hold nothing else of what the helper has open, the channel least of all."""
    try:
        held = [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:
        held = list(range(4096))
    for descriptor in held:
        if descriptor > 2 and descriptor not in (commands.NULL, stdin):
            try:
                os.close(descriptor)
            except OSError:
                pass
    for descriptor in range(3):
        os.dup2(commands.NULL, descriptor)


def _keep(request: durable.Request, env: "dict[bytes, bytes]", stdin: "int | None") -> int:
    folder = durable.open_folder(request)
    lock = os.open(b"lock", os.O_RDWR | os.O_CREAT, 0o600, dir_fd=folder)
    fcntl.flock(lock, fcntl.LOCK_EX)
    if durable.read(folder, b"keeper") is not None:
        return 0
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # who knows the keeper may ask it to end
    me = family.look(os.getpid())
    durable.write(
        folder, b"keeper", b"%d %d %s %s" % (os.getpid(), me.start if me else 0, durable.boot(), request.digest)
    )
    began = family.ticks()
    try:
        pid, out, err = commands.start(request.command, env, stdin=stdin)
    except commands.Refused as refused:
        durable.write(folder, b"refused", wire.join(*refused.args))
        return 0
    except OSError as error:
        durable.write(folder, b"refused", wire.join(b"os", b"%d" % (error.errno or 0), b"/bin/sh"))
        return 0
    os.close(lock)
    if stdin is not None:
        os.close(stdin)
    durable.clean(os.path.join(request.root, durable.FOLDER))
    keeper = _Keeper(folder, commands.Command(0, pid, {out: wire.OUT, err: wire.ERR}, b"", began), request)
    keeper.run()
    return 0


class _Keeper:
    """Keeps one command: its output in segments, its time, its end."""

    def __init__(self, folder: int, command: commands.Command, request: durable.Request) -> None:
        self._folder, self._command = folder, command
        self._log = _Log(folder, request.limit)
        self._deadline = None if request.timeout is None else time.monotonic() + request.timeout
        self._timed_out = False
        self._asked_to_end = False
        self._orphans = family.Orphans()
        self._woken, waking = os.pipe()
        os.set_blocking(self._woken, False)
        os.set_blocking(waking, False)
        signal.set_wakeup_fd(waking)
        signal.signal(signal.SIGTERM, self._on_term)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])

    def _on_term(self, *_: object) -> None:
        self._asked_to_end = True

    def run(self) -> None:
        """Keep it to its end."""
        command, events = self._command, select.poll()
        events.register(self._woken, select.POLLIN)
        for descriptor in command.outputs:
            events.register(descriptor, select.POLLIN)
        self._reap()  # it may have ended before the pipe was there that tells; later the pipe is read before the look
        while command.code is None or command.outputs:
            for descriptor, _ in events.poll(self._timeout()):
                if descriptor == self._woken:
                    os.read(self._woken, 4096)
                elif not self._log_some(descriptor):
                    events.unregister(descriptor)
                    os.close(descriptor)
                    del command.outputs[descriptor]
            self._reap()
            if self._end_it():
                break
        code = 128 + signal.SIGKILL if command.code is None else command.code
        seconds, size = command.usage
        timeout = b" timeout" if self._timed_out else b""
        out, err = self._log.positions[wire.OUT], self._log.positions[wire.ERR]
        self._tell(b"%d %.6f %d%s %d %d" % (code, seconds, size, timeout, out, err))

    def _tell(self, told: bytes) -> None:
        """Write down how it ended."""
        while True:
            try:
                durable.write(self._folder, b"ended", told)
                return
            except OSError as error:  # a full disk may be emptied; of a folder that is gone nobody will ask
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    return
                time.sleep(1)

    def _log_some(self, descriptor: int) -> bool:
        """Keep what there is of an output; returns whether there may be more."""
        try:
            data = os.read(descriptor, wire.CHUNK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        if data:
            self._log.add(self._command.outputs[descriptor], data)
        return bool(data)

    def _reap(self) -> None:
        for pid, status, usage in commands.ended_children():
            if pid == self._command.pid:
                self._command.reaped(status, usage)

    def _timeout(self) -> "float | None":
        """Milliseconds until something is due."""
        moments = [] if self._command.over is None else [self._command.due]
        if self._deadline is not None and self._command.over is None:
            moments.append(self._deadline)
        return max(0.0, 1e3 * (min(moments) - time.monotonic()) + 0.5) if moments else None

    def _end_it(self) -> bool:
        """Go on with ending it, if it must end; returns whether that is over."""
        now = time.monotonic()
        if self._command.over is None:
            if self._deadline is not None and now >= self._deadline:
                self._timed_out = True
            elif not self._asked_to_end:
                return False
        elif now < self._command.due:
            return False
        everyone, belongs = family.processes(), self._orphans.belong(b"", self._command.began)
        alive = family.members(self._command.known, everyone, belongs) if everyone else None
        return self._command.kill(now, alive)


class _Log:
    """Output in segments of one eighth of *limit* bytes."""

    def __init__(self, folder: int, limit: int) -> None:
        self._folder = folder
        self._size = max(1, limit // durable.SEGMENTS)
        self._number = -1
        self._file = -1
        self._written = 0
        self.positions = {wire.OUT: 0, wire.ERR: 0}
        """Bytes of each stream so far, with those that were left out."""

    def add(self, kind: int, data: bytes) -> None:
        """Add a piece. One that finds no room is left out; the next segment tells."""
        if self._file < 0 or self._written >= self._size:
            self._begin()
        record = durable.RECORD.pack(kind, len(data)) + data
        if self._file >= 0:
            try:
                if os.write(self._file, record) == len(record):
                    self._written += len(record)
                else:
                    self._give_up()
            except OSError:
                self._give_up()
        self.positions[kind] += len(data)

    def _give_up(self) -> None:
        """The disk is full, or the folder is gone: leave no half record."""
        os.ftruncate(self._file, self._written)
        os.close(self._file)
        self._file = -1

    def _begin(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        try:
            name = durable.segment(self._number + 1)
            file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600, dir_fd=self._folder)
        except OSError:
            return
        try:
            os.write(file, durable.POSITION.pack(self.positions[wire.OUT], self.positions[wire.ERR]))
        except OSError:
            os.close(file)
            return
        self._file, self._written = file, durable.POSITION.size
        self._number += 1
        old = self._number - durable.SEGMENTS // 2
        if old >= durable.SEGMENTS // 2:
            try:
                os.unlink(durable.segment(old), dir_fd=self._folder)
            except OSError:
                pass
