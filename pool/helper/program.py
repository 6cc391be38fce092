"""The helper: reads frames from its stdin, writes frames to its stdout, and waits for what it has started.

One thread does all of it but the file operations (`pool.helper.transfers`), and never waits for anything but the next
event. When its stdin ends, for whatever reason, it ends the commands that run, and then itself. What a command that has
ended left in the background on purpose, with its output elsewhere, lives on, as after any command over SSH.
"""

import errno
import os
import select
import signal
import time
from collections import deque

from pool.helper import commands, family, trust, wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pool.helper import follower, transfers

_ROOM = 1 << 18
"""Bytes that may wait for the channel; while there are more, no output is read."""
_TELL = 0.05
"""Seconds after which the worker is told the process of a command, so that it can be found if this helper is killed."""
_CLOSE_PATIENCE = 2.0
"""Seconds for file operations to clean up when the worker has gone."""


class Helper:
    """The state of the helper, and its loop."""

    def __init__(self, env: "dict[bytes, bytes]", token: str) -> None:
        self._env, self._token = env, token
        self._orphans = family.Orphans()
        self._running = {}  # type: dict[int, commands.Command]
        self._by_pid = {}  # type: dict[int, commands.Command]
        self._by_output = {}  # type: dict[int, commands.Command]
        self._waiting = deque()  # type: deque[tuple[int, bytes]]
        self._stdins = {}  # type: dict[int, commands.Stdin]
        self._ending = []  # type: list[commands.Command]
        self._untold = deque()  # type: deque[tuple[float, commands.Command]]
        self._followers = {}  # type: dict[int, follower.Follower]
        self._transfers: transfers.Transfers | None = None
        self._unread = bytearray()
        self._unsent = bytearray()
        self._full = False  # the channel takes no more at present
        self._closing = False
        self._patience = 0.0
        self._trust = trust.Trust()
        self._woken, self._waking = os.pipe()
        for end in (self._woken, self._waking, 1):
            os.set_blocking(end, False)
        self._asked_to_end = False
        self.code = 0
        signal.set_wakeup_fd(self._waking)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, self._on_term)
        for number in (signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        self._events = select.poll()  # everything; `_control` is what is heard while the channel is full
        self._control = select.poll()
        for poll in (self._events, self._control):
            poll.register(0, select.POLLIN)
            poll.register(self._woken, select.POLLIN)
        self._control.register(1, select.POLLOUT)
        self._kinds = {
            wire.STDIN: self._take_stdin,
            wire.EXEC: self._exec,
            wire.CREDIT: self._credit,
            wire.KILL: self._kill,
            wire.PING: self._ping,
            wire.DURABLE: self._durable,
            wire.FILE: self._operate,
            wire.INPUT: self._feed,
            wire.SWEEP: self._sweep,
            wire.UNTIL: self._until,
        }

    def run(self) -> None:
        """Serve until the worker goes away and everything is ended."""
        while not (self._closing and self._ended()):
            try:
                self._step()
            except Exception as error:  # nonsense from the worker, or a bug: commands are ended all the same
                self._fail(error)

    def _step(self) -> None:
        if self._closing or len(self._unsent) <= _ROOM:
            events = self._events.poll(self._timeout())
        else:
            events = self._control.poll(self._timeout())
        self._check_trust()
        for descriptor, _ in events:
            if descriptor == 0:
                self._read()
            elif descriptor == self._woken:
                self._woke()
            elif descriptor in self._by_output:
                self._forward(self._by_output[descriptor], descriptor)
        self._due()
        self._flush()

    def _check_trust(self) -> None:
        """Leave nothing running for a worker that has not said that it may go on."""
        if not self._closing and self._trust.left() <= 0:
            self._say("the worker has not said that it may go on")
            self.code = wire.OVER
            self._close()

    def _say(self, text: str) -> None:
        try:
            os.write(2, ("pool-helper: %s\n" % text).encode("ascii", "backslashreplace"))
        except OSError:  # nobody listens
            pass

    def _fail(self, error: Exception) -> None:
        """Say it, and end; at once, when it has come to that before."""
        self._say(repr(error))
        self.code = 1
        if self._closing:
            for command in self._running.values():
                family.send(signal.SIGKILL, command.pid, [], leads=command.code is None)
            os._exit(self.code)
        self._close()

    # -- waiting

    def _wake(self) -> None:
        """Have the loop look at what other threads have done."""
        try:
            os.write(self._waking, b"w")
        except BlockingIOError:  # it is awake
            pass

    def _timeout(self) -> "float | None":
        """Milliseconds until something is due."""
        moments = [command.due for command in self._ending]
        moments += [one.due for one in self._followers.values() if one.credit > 0]
        if self._closing and not self._running:
            moments.append(self._patience)
        if self._untold:
            moments.append(self._untold[0][0])
        wait = min(moments) - time.monotonic() if moments else trust.FOREVER
        if not self._closing:
            wait = min(wait, self._trust.left())
        return max(0.0, 1e3 * wait + 0.5) if wait < trust.FOREVER else None

    def _due(self) -> None:
        """Do what is due by now."""
        if not (self._ending or self._untold or self._followers):
            return
        now = time.monotonic()
        for one in [each for each in self._followers.values() if each.due <= now and each.credit > 0]:
            self._follow(one, now)
        while self._untold and self._untold[0][0] <= now:
            self._tell(self._untold.popleft()[1])
        due = [command for command in self._ending if command.due <= now]
        if due:
            everyone = family.processes()
            for command in due:
                if command.kill(now, self._family(command, everyone)):
                    self._end(command)

    def _family(self, command: commands.Command, everyone: "list[family.Process]") -> "list[family.Process] | None":
        if len(self._running) > 1:
            self._orphans.mix()
        belongs = self._orphans.belong(command.spared, command.began, command.mark, self._by_pid)
        return family.members(command.known, everyone, belongs) if everyone else None

    # -- the channel

    def _read(self) -> None:
        if self._closing:
            return
        try:
            data = os.read(0, 1 << 18)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._close()
            return
        unread = self._unread
        unread += data
        at = 0
        while len(unread) - at >= wire.HEADER.size and not self._closing:
            kind, number, length = wire.HEADER.unpack_from(unread, at)
            if kind not in self._kinds:
                raise ValueError("no frame is of kind %d" % kind)
            end = at + wire.HEADER.size + length
            if len(unread) < end:
                break
            self._kinds[kind](number, bytes(unread[at + wire.HEADER.size : end]))
            at = end
        del unread[:at]

    def _send(self, kind: int, number: int, payload: bytes = b"") -> None:
        self._unsent += wire.HEADER.pack(kind, number, len(payload))
        self._unsent += payload

    def _flush(self) -> None:
        if not self._unsent or self._closing:
            return
        was_full = self._full
        try:
            sent = os.write(1, self._unsent)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._close()
            return
        del self._unsent[:sent]
        self._full = bool(self._unsent)
        if self._full and not was_full:
            self._events.register(1, select.POLLOUT)
        elif was_full and not self._full:
            self._events.unregister(1)

    def _close(self) -> None:
        """The worker has gone: end everything."""
        if self._closing:
            return
        self._closing = True
        self._patience = time.monotonic() + _CLOSE_PATIENCE
        self._waiting.clear()
        self._untold.clear()
        self._events.unregister(0)
        if self._full:
            self._events.unregister(1)
        if self._transfers is not None:
            self._transfers.give_all_up()
        for command in list(self._running.values()):
            self._begin_end(command)
        self._wake()

    def _ended(self) -> bool:
        """Whether nothing is left that would have to be waited for."""
        if self._running:
            return False
        return self._transfers is None or self._transfers.none() or time.monotonic() > self._patience

    def _on_term(self, *_: object) -> None:
        """Between any two steps of the loop, so only take a note; the signal wakes the loop."""
        self._asked_to_end = True

    # -- commands

    def _take_stdin(self, number: int, data: bytes) -> None:
        """Keep what the command that will have this number is to read."""
        stdin = self._stdins.get(number)
        if stdin is None:
            stdin = self._stdins[number] = commands.Stdin()
        stdin.add(data)
        if stdin.consumed >= wire.CREDIT_AT:
            self._send(wire.CREDIT, number, wire.COUNT.pack(stdin.consumed))
            stdin.consumed = 0

    def _stdin(self, number: int) -> "int | None":
        """The descriptor of its stdin; None: it has none. Raises as `commands.Stdin.descriptor`."""
        return self._stdins[number].descriptor() if number in self._stdins else None

    def _forget_stdin(self, number: int) -> bool:
        """Let go of its stdin; returns whether it has one."""
        stdin = self._stdins.pop(number, None)
        if stdin is not None:
            stdin.close()
        return stdin is not None

    def _exec(self, number: int, request: bytes) -> None:
        if self._waiting or not self._try_start(number, request):
            self._waiting.append((number, request))

    def _try_start(self, number: int, request: bytes) -> bool:
        """Start it, or say what is wrong with it; returns False when there is no room for it now."""
        done = self._start(number, request)
        if done:
            self._forget_stdin(number)
        return done

    def _start(self, number: int, request: bytes) -> bool:
        spared, began, mark = self._orphans.present(), family.ticks(), wire.command_mark(self._token, number)
        try:
            pid, out, err = commands.start(request, self._env, mark, self._stdin(number))
        except commands.Refused as refused:
            self._send(wire.FAILED, number, wire.join(*refused.args))
            return True
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM) and self._running:
                return False
            self._send(wire.FAILED, number, wire.join(b"os", b"%d" % (error.errno or 0), b"/bin/sh"))
            return True
        command = commands.Command(number, pid, {out: wire.OUT, err: wire.ERR}, spared, began, mark)
        if self._running:
            self._orphans.mix()
        self._running[number] = self._by_pid[pid] = command
        for output in (out, err):
            self._by_output[output] = command
            self._events.register(output, select.POLLIN)
        self._untold.append((time.monotonic() + _TELL, command))
        return True

    def _tell(self, command: commands.Command) -> None:
        if command.number in self._running and command.code is None:
            process = family.look(command.pid)
            start = b"" if process is None else b" %d" % process.start
            self._send(wire.STARTED, command.number, b"%d%s" % (command.pid, start))

    def _forward(self, command: commands.Command, descriptor: int) -> None:
        """Send what there is of an output, as far as there is credit."""
        dropped = command.over is not None
        if command.credit <= 0 and not dropped:
            self._pause(command)
            return
        try:
            data = os.read(descriptor, wire.CHUNK if dropped else min(wire.CHUNK, command.credit))
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            if not dropped:
                command.credit -= len(data)
                self._send(command.outputs[descriptor], command.number, data)
            return
        self._close_output(command, descriptor)
        self._settle(command)

    def _close_output(self, command: commands.Command, descriptor: int) -> None:
        del command.outputs[descriptor], self._by_output[descriptor]
        if not command.paused:
            self._events.unregister(descriptor)
        os.close(descriptor)

    def _pause(self, command: commands.Command) -> None:
        """Read no more of it until the worker gives credit."""
        if not command.paused:
            command.paused = True
            for descriptor in command.outputs:
                self._events.unregister(descriptor)

    def _credit(self, number: int, payload: bytes) -> None:
        (count,) = wire.COUNT.unpack(payload)
        command = self._running.get(number)
        if command is None:
            if number in self._followers:
                self._followers[number].credit += count
                self._followers[number].hurry()
            elif self._transfers is not None:
                self._transfers.grant(number, count)
            return
        command.credit += count
        if command.paused:
            self._resume(command)

    def _resume(self, command: commands.Command) -> None:
        command.paused = False
        for descriptor in command.outputs:
            self._events.register(descriptor, select.POLLIN)

    def _woke(self) -> None:
        """A child has ended, or another thread has something to send."""
        try:
            os.read(self._woken, 4096)
        except BlockingIOError:
            pass
        if self._asked_to_end:
            self._close()
        if self._transfers is not None:
            for kind, number, payload in self._transfers.take():
                self._send(kind, number, payload)
        self._reap()

    def _reap(self) -> None:
        """Look which children have ended."""
        for pid, status, usage in commands.ended_children():
            command = self._by_pid.pop(pid, None)
            if command is None:
                self._reaped_keeper(pid, status)
            else:
                command.reaped(status, usage)
                for descriptor in list(command.outputs):  # its last words are there, or will be told by poll
                    if not command.paused:
                        self._forward(command, descriptor)
                self._settle(command)

    def _settle(self, command: commands.Command) -> None:
        """Tell the end, if it has ended and closed its output."""
        if command.code is not None and not command.outputs and command.over is None:
            self._end(command)

    def _end(self, command: commands.Command) -> None:
        if self._running.pop(command.number, None) is None:
            return
        if command.over is not None:
            self._ending.remove(command)
        for descriptor in list(command.outputs):
            self._close_output(command, descriptor)
        if command.code is None:  # otherwise its number may be another's by now
            del self._by_pid[command.pid]
        code = 128 + signal.SIGKILL if command.code is None else command.code
        self._send(wire.EXIT, command.number, b"%d %.6f %d" % (code, command.usage[0], command.usage[1]))
        if self._running:
            self._orphans.mix()
        while self._waiting and not self._closing and self._try_start(*self._waiting[0]):
            self._waiting.popleft()

    def _kill(self, number: int, _: bytes) -> None:
        command = self._running.get(number)
        if command is not None:
            self._begin_end(command)
        elif any(waiting == number for waiting, _ in self._waiting):
            self._waiting = deque(entry for entry in self._waiting if entry[0] != number)
            self._forget_stdin(number)
            self._send(wire.EXIT, number, b"%d 0 0" % (128 + signal.SIGTERM))
        elif number in self._followers:
            self._followers[number].kill()
        elif self._forget_stdin(number):  # its command has not come, and will not
            self._send(wire.EXIT, number, b"%d 0 0" % (128 + signal.SIGTERM))
        elif self._transfers is not None:
            self._transfers.give_up(number)

    def _begin_end(self, command: commands.Command) -> None:
        if command.over is not None:
            return
        self._ending.append(command)
        command.kill(time.monotonic(), self._family(command, family.processes()))
        if command.paused:
            self._resume(command)  # what it still writes is dropped

    # -- commands that outlive this program

    def _durable(self, number: int, payload: bytes) -> None:
        from pool.helper import durable, follower, keeper

        request = durable.Request(payload)
        try:
            kept_by = keeper.keep(request, self._env, self._stdin(number))
        except commands.Refused as refused:
            self._send(wire.FAILED, number, wire.join(*refused.args))
            return
        except OSError as error:
            self._send(wire.FAILED, number, wire.join(b"os", b"%d" % (error.errno or 0), b"/bin/sh"))
            return
        finally:
            self._forget_stdin(number)
        self._orphans.spared.add(kept_by)
        self._followers[number] = follower.Follower(number, request, kept_by)

    def _follow(self, one: "follower.Follower", now: float) -> None:
        for kind, payload in one.step(now):
            self._send(kind, one.number, payload)
            if kind in (wire.EXIT, wire.FAILED):
                del self._followers[one.number]
                one.close()

    def _reaped_keeper(self, pid: int, status: int) -> None:
        """A keeper has ended, or it was none: another one keeps the command."""
        self._orphans.spared.discard(pid)
        for one in self._followers.values():
            if one.child == pid:
                one.child = 0
                one.failed = os.WEXITSTATUS(status) if os.WIFEXITED(status) else 0
                one.hurry()

    # -- files, and the rest

    def _operate(self, number: int, request: bytes) -> None:
        if self._transfers is None:
            from pool.helper import transfers

            self._transfers = transfers.Transfers(self._wake)
        self._transfers.begin(number, request)

    def _feed(self, number: int, data: bytes) -> None:
        if self._transfers is not None:
            self._transfers.feed(number, data)

    def _ping(self, number: int, _: bytes) -> None:
        self._send(wire.PONG, number)

    def _until(self, _: int, moment: bytes) -> None:
        self._send(wire.CLOCK, 0, self._trust.hear(moment))
        self._check_trust()

    def _sweep(self, _number: int, payload: bytes) -> None:
        family.sweep(payload.split(b"\0"))


def main(token: str, of_parent: bool) -> None:
    """Say who we are, and serve."""
    os.chdir("/")
    helper = Helper(commands.environment(of_parent), token)
    os.write(1, wire.mark(token) + wire.frame(wire.CLOCK, 0, trust.now()))
    helper.run()
    os._exit(helper.code)  # not waiting for a file operation that hangs
