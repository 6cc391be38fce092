"""Channels of one SSH connection: how many at a time, and one command on one of them."""

import asyncio
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

import asyncssh

from pool.backends.output import Capture, Stream
from pool.backends.shell import KILL_GRACE
from pool.errors import BackendUnavailable

if TYPE_CHECKING:
    from pool.backends.ssh import RemoteFilesystemBackend

T = TypeVar("T")

_REFUSED_PAUSE = 0.05
"""Seconds until a refused channel is asked for again, if none ends before."""
_REFUSED_PATIENCE = 2.0
"""Seconds for which a server may refuse although no channel is open."""

_KILL_PATIENCE = KILL_GRACE + 5.0
"""Seconds for the host to report that a killed command is gone."""


class Channels:
    """Slots for channels, first come first served.

    A server that refuses a channel (OpenSSH's MaxSessions, which also counts channels that have just ended) is asked
    again when another channel ends, or after `_REFUSED_PAUSE`. Only a server that refuses although nothing is open
    is an error.

    An *extra* channel lasts as long as the connection, beside the slots, and work can do without it: it is given up
    (``give_up``) before a server is believed to refuse everything.
    """

    give_up: Callable[[], None] | None = None

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._taken = 0
        self._opened = 0  # channels that the server has granted
        self._lasting = 0  # of those, how many stay as long as the connection (SFTP): no use in waiting for them
        self._waiting: list[asyncio.Future[None]] = []  # not a deque, and no event until it is needed: each of them
        self._freed: asyncio.Event | None = None  # takes 0.8 KB, and a process may have a thousand idle connections

    async def take(self) -> None:
        """Wait for a slot."""
        if self._taken < self._limit and not self._waiting:
            self._taken += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it was given a slot, too late
                self._give_back()
            elif turn in self._waiting:  # `_give_back` may have dropped it already
                self._waiting.remove(turn)
            raise

    def _give_back(self) -> None:
        self._taken -= 1
        while self._waiting and self._taken < self._limit:
            turn = self._waiting.pop(0)
            if not turn.done():
                self._taken += 1
                turn.set_result(None)

    def closed(self, *, lasting: bool = False) -> None:
        """A granted channel is closed by the server: its slot is free again, not before."""
        self._opened -= 1
        self._lasting -= lasting
        self._wake_refused()
        self._give_back()

    async def granted(
        self, connection: asyncssh.SSHClientConnection, opening: Callable[[], Awaitable[T]], *, lasting: bool = False
    ) -> T:
        """Take a slot and call *opening* until the server grants the channel; `closed` ends it.

        Raises `BackendUnavailable` when the server grants none, asyncssh's errors when the connection is dead.
        """
        await self.take()
        try:
            deadline: float | None = None
            while True:
                try:
                    result = await _answered(connection, opening)
                except asyncssh.ChannelOpenError as error:
                    if connection.is_closed():
                        raise
                    if deadline is None or self._opened > self._lasting:
                        deadline = monotonic() + _REFUSED_PATIENCE
                    elif monotonic() > deadline and self.give_up is not None:
                        self.give_up()
                        deadline = monotonic() + _REFUSED_PATIENCE
                    elif monotonic() > deadline:
                        text = f"the server refuses every channel: {error.reason} (MaxSessions?)"
                        raise BackendUnavailable(text, "sessions", 0.0) from error
                else:
                    self._opened += 1
                    self._lasting += lasting
                    return result
                self._freed = self._freed or asyncio.Event()
                self._freed.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(_REFUSED_PAUSE):  # `wait_for` of Python 3.11 can swallow a cancel
                        await self._freed.wait()
        except BaseException:
            self._give_back()
            raise

    async def open_extra(self, connection: asyncssh.SSHClientConnection, opening: Callable[[], Awaitable[T]]) -> T:
        """Ask once for an extra channel; `extra_closed` ends it. Raises asyncssh's errors."""
        # Like `start` in a task of its own: what was asked for before this call comes first, if there is one session.
        result = await asyncio.ensure_future(_answered(connection, opening))
        self._opened += 1
        self._lasting += 1
        return result

    def extra_closed(self) -> None:
        """The extra channel is closed by the server."""
        self._opened -= 1
        self._lasting -= 1
        self._wake_refused()

    def _wake_refused(self) -> None:
        """Have those whom the server refused ask again."""
        if self._freed is not None:
            self._freed.set()

    async def start(
        self, connection: asyncssh.SSHClientConnection, session: "CommandSession", line: str, setup: bytes
    ) -> None:
        """Start *line* on a channel of its own. Cancelled, it leaves no command behind. Raises as `granted`."""
        session.connection = connection

        async def opening() -> None:
            task = asyncio.ensure_future(connection.create_session(lambda: session, line, encoding=None))
            try:
                await asyncio.shield(task)
            except asyncio.CancelledError:
                task.add_done_callback(_close_late)  # first: a second cancel may come while it waits
                await asyncio.wait({task}, timeout=_KILL_PATIENCE)
                if session.started:
                    await session.kill()
                raise
            except asyncssh.ChannelOpenError as error:
                if session.started and not connection.is_closed():  # the channel was opened, and is closed again
                    text = f"the server refuses to run commands: {error.reason}"
                    raise BackendUnavailable(text, "setup", None) from error
                raise

        await self.granted(connection, opening)
        session.on_closed(self.closed)
        session.write(setup)


async def _answered(connection: asyncssh.SSHClientConnection, opening: Callable[[], Awaitable[T]]) -> T:
    """Await *opening*; a connection that ends in the middle of it is a lost one."""
    try:
        return await opening()
    except (AttributeError, OSError) as error:  # asyncssh 2.24 forgets the session it is about to start, or
        if connection.is_closed():  # passes on what its socket has told
            raise asyncssh.ConnectionLost("the connection ended while a channel was opened") from error
        raise


def _close_late(opening: "asyncio.Future[Any]") -> None:
    """Close a channel that opened after its caller had gone."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result()[0].close()


class CommandSession(asyncssh.SSHClientSession[bytes]):
    """One running command: feeds its output to the capture; ended when the server closes the channel."""

    connection: asyncssh.SSHClientConnection

    def __init__(self, backend: "RemoteFilesystemBackend", capture: Capture) -> None:
        self._backend = backend
        self._capture = capture
        self._channel: Any = None
        self._code: int | None = None
        self._eof = False
        self._ended: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        self._on_closed: Callable[[], None] | None = None

    @property
    def started(self) -> bool:
        """Whether a channel was opened for it."""
        return self._channel is not None

    def connection_made(self, chan: Any) -> None:
        self._channel = chan

    def eof_received(self) -> bool:
        self._eof = True
        return False

    def data_received(self, data: bytes, datatype: int | None) -> None:
        stream: Stream = "stdout" if datatype is None else "stderr"
        self._capture.feed(stream, data)
        if self._capture.full(self._channel.resume_reading):
            self._channel.pause_reading()

    def exit_status_received(self, status: int) -> None:
        self._code = status

    def exit_signal_received(self, signal_name: str, core_dumped: bool, msg: str, lang: str) -> None:  # noqa: ARG002
        number = getattr(signal, f"SIG{signal_name}", None)
        self._code = 128 + (number.value if number is not None else 0)

    def on_closed(self, call: Callable[[], None]) -> None:
        """Call *call* when the server has closed the channel; at once if it has already."""
        if self._ended.done():
            call()
        else:
            self._on_closed = call

    def connection_lost(self, exc: Exception | None) -> None:
        if self._on_closed is not None:
            self._on_closed()
        if not self._ended.done():
            self._ended.set_result(exc)

    def write(self, data: bytes) -> None:
        """Send *data* to the command's lifeline, unless it has ended already: its exit code tells that."""
        if data:
            with suppress(OSError):
                self._channel.write(data)

    async def ended(self) -> int:
        """Return the exit code. Cancelled, kill the process group first.

        A channel that ends without telling an exit code is a lost connection, never a success.
        """
        try:
            error = await asyncio.shield(self._ended)
        except asyncio.CancelledError:
            await self.kill()
            raise
        if error is not None or self._code is None or (not self._eof and self.connection.is_closed()):
            raise self._backend.lost_error(error or BackendUnavailable("the session ended without an exit code"))
        return self._code

    async def kill(self) -> None:
        """Let go of the lifeline, so that the supervising shell kills the group, and wait until it is gone."""
        if self._ended.done():
            return
        self._capture.detach()
        self._channel.resume_reading()  # a channel that waits for a slow reader would not tell its end
        if self._channel.get_write_buffer_size():  # of what it was to read: it must not start on that now
            self._channel.abort()
        else:
            self._channel.write_eof()
        done, _ = await asyncio.wait({self._ended}, timeout=_KILL_PATIENCE)
        if not done:
            self._channel.close()
