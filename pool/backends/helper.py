"""The worker's side of a helper: one channel of an SSH connection, over which all commands and files go.

The other side is `pool.helper`, a small program that the host's ``python3`` runs. A command costs one round trip and
one fork there, however many run; a cancel ends all that the command started; when the channel closes, for whatever
reason, the helper ends what still runs.
"""

import asyncio
import logging
import secrets
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from typing import Any

import asyncssh

from pool.backends.base import Trust
from pool.backends.channels import Channels
from pool.backends.helper_calls import Answer, Call, Ping, Running, Transfer
from pool.backends.output import Capture
from pool.backends.pulse import Pulse
from pool.backends.workspace import Durable, Place
from pool.errors import PoolError
from pool.helper import wire
from pool.helper.bundle import BOOT, bundle

logger = logging.getLogger(__name__)

START_TIMEOUT = 5.0
"""Seconds for the host's python3 to begin; one that takes longer counts as none."""
_LARGEST = 64 << 20
"""Bytes of one frame at most, but for output: the names in a folder."""
_SAID = 400
"""Bytes of stderr that are kept, for the reason why there is no helper."""
_KILL_PATIENCE = wire.KILL_GRACE + 5.5
"""Seconds for the helper to report that a killed command is gone; it has 5 s itself to make sure."""


class NoHelper(Exception):
    """The host cannot run one; the text says why."""


class Helper(asyncssh.SSHClientSession[bytes]):
    """A running helper. *lost* makes of a reason the error that users of a broken connection get to see.

    *trust*: for how long it may believe that this process may work; then it ends what runs, and itself.
    """

    def __init__(
        self,
        lost: Callable[[Exception | None], PoolError],
        on_end: "Callable[[Helper], None]",
        trust: Trust | None = None,
    ) -> None:
        self._lost = lost
        self._on_end = on_end
        self._token = secrets.token_hex(8)
        self._channel: Any = None
        self._channels: Channels | None = None
        self._greeted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pulse = None if trust is None else Pulse(trust, self._tell)
        self._begun = False  # what came before its mark was not its own
        self._unread = bytearray()
        self._wanted = 0  # bytes of the frame of which `_unread` is the beginning, where that is known
        self._rest: tuple[int, int, int] | None = None  # of an output frame that came in part: kind, number, bytes
        self._said = b""  # at last, on stderr
        self._calls: dict[int, Call[Any]] = {}
        self._number = 0
        self.epoch = -1
        """Under which it has claimed its root; -1: it has not."""
        self.how = ""
        """How the program ended, as the server tells; "" while it runs, and when the connection was lost."""
        self._closing = False
        self._why: Exception | None = None  # it ended by itself
        self._told: dict[int, bytes] = {}  # processes of the commands that run, as the helper told of them
        self.left: list[bytes] = []
        """What the next one is to end if this one was killed: of the commands that ran then."""

    # -- life

    async def start(
        self,
        connection: asyncssh.SSHClientConnection,
        channels: Channels,
        sweep: Sequence[bytes] = (),
        *,
        startup_files: bool = True,
    ) -> None:
        """Start it on the host, on a lasting channel, and have it end first what an earlier one left (*sweep*).

        *startup_files*: commands get the environment that the login shell's start-up files have made; else the one
        from before them. The server has the login shell run them in any case.

        Raises `NoHelper`, and what `Channels.granted` raises.
        """
        program = bundle()
        line = shlex.join(["python3", "-I", "-S", "-c", BOOT, str(len(program)), self._token])
        line = f"exec {line}" if startup_files else f"{line} bare; exit"  # waited for by the login shell, its parent
        await channels.granted(
            connection, lambda: connection.create_session(lambda: self, line, encoding=None), lasting=True
        )
        self._channels = channels
        try:
            self._channel.write(program)
            if sweep:
                self._channel.write(wire.frame(wire.SWEEP, 0, wire.join(*sweep)))
            async with asyncio.timeout(START_TIMEOUT):
                await self._greeted
            if self._pulse is not None:
                self._pulse.start()
        except TimeoutError:
            self._end_start()
            raise NoHelper(f"its python3 did not begin within {START_TIMEOUT:g} s") from None
        except OSError:  # the channel was closed before all was sent
            await asyncio.wait({self._greeted}, timeout=START_TIMEOUT)
            self._end_start()
            raise NoHelper(self._reason()) from None
        except BaseException:
            self._end_start()
            raise

    def _tell(self, moment: int | None) -> None:
        self.send(wire.UNTIL, 0, b"" if moment is None else b"%d" % moment)

    def _end_start(self) -> None:
        """Leave no half-started program behind, as far as the server helps."""
        if self._greeted.done() and not self._greeted.cancelled():
            self._greeted.exception()
        if not self.closed:
            self._channel.kill()
        self.close()

    @property
    def closed(self) -> bool:
        """Whether it is of no use any more."""
        return self._channel is None or self._closing

    def close(self) -> None:
        """Have it end what runs, and itself."""
        self._closing = True
        if self._pulse is not None:
            self._pulse.stop()
        if self._channel is not None:
            self._channel.close()

    def _reason(self, what: str = "its python3 did not begin") -> str:
        said = self._said.decode(errors="replace").strip().rpartition("\n")[2]
        return ": ".join(filter(None, [what, self.how or "cut off", said]))

    # -- calls

    async def run(
        self,
        command: str,
        cwd: Place,
        env: Mapping[str, str],
        capture: Capture,
        stdin: bytes = b"",
        durable: Durable | None = None,
    ) -> int:
        """Run a command to its end; as `Driver.run` and `Driver.run_durable`.

        Raises what stands in the way of its start.
        """
        chain = cwd.chain
        texts = [command, str(len(chain)), *chain, *[f"{name}={value}" for name, value in env.items()]]
        kind = wire.EXEC
        if durable is not None:
            kind = wire.DURABLE
            texts = [
                durable.name,
                _digest(command, chain, stdin),
                str(durable.keep),
                str(durable.timeout or 0.0),
                *texts,
            ]
        request = "\0".join(texts).encode("utf-8", "surrogateescape")
        frames = [(wire.STDIN, stdin), (kind, request)] if stdin else [(kind, request)]
        running = Running(self, command, chain[-1], capture)
        try:
            if len(stdin) <= wire.CHUNK:
                running.number = self._open(running, *frames)
            else:
                running.number = self._open(running)
                await running.send(wire.STDIN, stdin)
                self.send(kind, running.number, request)
            return await asyncio.shield(running.ended)
        except asyncio.CancelledError:
            await self._kill(running)
            raise

    async def _kill(self, running: Running) -> None:
        """End it, and return when it is gone."""
        running.detach()
        if running.number in self._calls:
            self.send(wire.KILL, running.number)
        done, _ = await asyncio.wait({running.ended}, timeout=_KILL_PATIENCE)
        if done:
            running.ended.exception()  # nobody asks any more
        else:
            self._calls.pop(running.number, None)
            logger.warning("the helper did not report the end of a killed command within %g s", _KILL_PATIENCE)

    async def operate(self, operation: str, path: str, *arguments: bytes, content: bytes | None = None) -> Answer:
        """Do a file operation; *path* is for error messages. Raises `FileOperationFailed`, `PathEscapeError`."""
        transfer = Transfer(self, operation, path)
        frames = [(wire.FILE, wire.join(operation.encode(), *arguments))]
        short = content is not None and len(content) <= wire.CHUNK  # in one piece: one packet, if that has room for it
        if content and short:
            frames.append((wire.INPUT, content))
        if short:
            frames.append((wire.INPUT, b""))
        number = transfer.number = self._open(transfer, *frames)
        try:
            if content is not None and not short:
                await transfer.send(wire.INPUT, content)
                self.send(wire.INPUT, number, b"")
            return await transfer.ended
        finally:
            if self._calls.pop(number, None):  # cancelled: it goes on, or gives up, without us
                self.send(wire.KILL, number)

    async def ping(self) -> None:
        """Return when it has answered."""
        ping = Ping(self)
        self._open(ping, (wire.PING, b""))
        await ping.ended

    def _open(self, call: Call[Any], *frames: tuple[int, bytes]) -> int:
        """Begin a call with these frames: kind and payload of each."""
        if self.closed:
            raise self._lost(self._why)
        self._number += 1
        try:
            self._channel.write(b"".join([wire.frame(kind, self._number, payload) for kind, payload in frames]))
        except OSError as error:  # the channel is about to tell us of its end
            raise self._lost(EOFError(self._reason("its helper ended"))) from error
        self._calls[self._number] = call
        return self._number

    def send(self, kind: int, number: int, payload: bytes = b"") -> None:
        """Send it, unless the channel is closed or about to be: then all calls get to know in `connection_lost`."""
        if not self.closed:
            with suppress(OSError):
                self._channel.write(wire.frame(kind, number, payload))

    def give_credit(self, number: int, count: int) -> None:
        """Let the helper send *count* bytes more."""
        if number in self._calls:
            self.send(wire.CREDIT, number, wire.COUNT.pack(count))

    # -- called by asyncssh

    def connection_made(self, chan: Any) -> None:
        self._channel = chan

    def data_received(self, data: bytes, datatype: int | None) -> None:
        if datatype is not None:
            self._said = (self._said + data)[-_SAID:]
        elif self._begun:
            self._parse(data)
        else:
            self._unread += data
            mark = wire.mark(self._token)
            _, found, rest = self._unread.partition(mark)
            if found:
                self._unread = bytearray()
                self._begun = True
                self._parse(bytes(rest))
            else:
                self._unread = self._unread[-len(mark) :]

    def _parse(self, data: bytes) -> None:
        at = 0
        if self._rest is not None:
            kind, number, length = self._rest
            self._rest = None
            at = self._feed(kind, number, length, data, 0)
        elif self._unread:
            self._unread += data
            if len(self._unread) < self._wanted:
                return
            data, self._unread = bytes(self._unread), bytearray()
        self._wanted = 0
        while len(data) - at >= wire.HEADER.size:
            kind, number, length = wire.HEADER.unpack_from(data, at)
            start = at + wire.HEADER.size
            if kind in (wire.OUT, wire.ERR):
                at = self._feed(kind, number, length, data, start)
            elif len(data) - start < length:
                if length > _LARGEST:
                    raise ValueError(f"a frame of {length} bytes is announced")  # asyncssh ends the connection
                self._wanted = wire.HEADER.size + length
                break
            else:
                at = start + length
                self._answer(kind, number, data[start:at])
        self._unread = bytearray(data[at:])

    def _feed(self, kind: int, number: int, length: int, data: bytes, start: int) -> int:
        """Pass on what there is of an output frame; return where the next frame begins."""
        piece = data[start : start + length]
        if len(piece) < length:
            self._rest = kind, number, length - len(piece)
        call = self._calls.get(number)
        if call is not None and piece:
            call.feed(kind, piece)
        return start + len(piece)

    def _answer(self, kind: int, number: int, payload: bytes) -> None:
        if kind == wire.STARTED:
            self._told[number] = payload
            return
        if kind == wire.CLOCK:
            if self._pulse is not None:
                self._pulse.sample(int(payload))
            if not self._greeted.done():
                self._greeted.set_result(None)
            return
        final = kind in (wire.EXIT, wire.DONE, wire.FAILED, wire.PONG)
        call = self._calls.pop(number, None) if final else self._calls.get(number)
        if final:
            self._told.pop(number, None)
        if call is not None:
            call.answer(kind, payload)

    def exit_status_received(self, status: int) -> None:
        self.how = f"exit code {status}"

    def exit_signal_received(self, signal_name: str, core_dumped: bool, msg: str, lang: str) -> None:  # noqa: ARG002
        self.how = f"killed by SIG{signal_name}"

    def connection_lost(self, exc: Exception | None) -> None:
        self._channel = None
        if self._pulse is not None:
            self._pulse.stop()
        if self._channels is not None:
            self._channels.closed(lasting=True)
        if not self._greeted.done():
            self._greeted.set_exception(exc if isinstance(exc, asyncssh.Error) else NoHelper(self._reason()))
            self._greeted.exception()
            return
        calls, self._calls = self._calls, {}
        ran = [number for number, call in calls.items() if isinstance(call, Running)]
        self.left = [*self._told.values(), *(wire.command_mark(self._token, number) for number in ran)]
        self._why = exc or (None if self._closing else EOFError(self._reason("its helper ended")))
        error = self._lost(self._why)
        for call in calls.values():
            call.end(error)
        if not self._closing:
            self._closing = True
            self._on_end(self)


def _digest(command: str, chain: Sequence[str], stdin: bytes) -> str:
    """What tells one durable command from another."""
    what = (command, chain, *([sha256(stdin).hexdigest()] if stdin else []))
    return sha256(repr(what).encode("utf-8", "surrogateescape")).hexdigest()
