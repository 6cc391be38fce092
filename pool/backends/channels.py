"""Channels of one SSH connection: how many at a time, and one command on one of them."""

import asyncio
import signal
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import asyncssh

from pool.backends.output import Capture, Stream
from pool.backends.shell import KILL_GRACE
from pool.errors import BackendUnavailable

if TYPE_CHECKING:
    from pool.backends.ssh import RemoteFilesystemBackend

_KILL_PATIENCE = KILL_GRACE + 5.0
"""Seconds for the host to report that a killed command is gone."""


REFUSAL_PATIENCE = (0.02, 0.1, 0.4, 1.0)
"""Seconds between tries while a server refuses a channel although none is open."""


class Channels:
    """Slots for channels, first come first served.

    A server that refuses one (OpenSSH's MaxSessions) is believed: the limit sinks to what is open, and the caller
    waits for one of those to end.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.open_now = 0
        self.lasting = 0  # of those open now, how many stay open as long as the connection (SFTP)
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def take(self) -> None:
        """Wait for a slot."""
        if self.open_now < self.limit and not self._waiting:
            self.open_now += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it was given a slot, too late
                self.give_back()
            elif turn in self._waiting:  # `give_back` may have dropped it already
                self._waiting.remove(turn)
            raise

    def give_back(self) -> None:
        """End the use of a slot; the next one in line gets it."""
        self.open_now -= 1
        while self._waiting and self.open_now < self.limit:
            turn = self._waiting.popleft()
            if not turn.done():
                self.open_now += 1
                turn.set_result(None)

    def refused(self) -> bool:
        """The server refused a channel, whose slot is given back; returns whether waiting for another one can help."""
        others = self.open_now - 1
        if others > self.lasting:
            self.limit = min(self.limit, others)
        self.give_back()
        return others > self.lasting

    async def open(
        self, connection: asyncssh.SSHClientConnection, session: "CommandSession", line: str, setup: bytes
    ) -> None:
        """Start *line* on a channel. The slot is free again when the server has closed the channel, not before.

        Cancelled, it does not leave a command behind. Raises asyncssh's errors when the connection is dead.
        """
        patience = iter(REFUSAL_PATIENCE)
        while True:
            await self.take()
            session.on_closed = self.give_back
            opening = asyncio.ensure_future(connection.create_session(lambda: session, line, encoding=None))
            try:
                await asyncio.shield(opening)
            except asyncio.CancelledError:
                await asyncio.wait({opening}, timeout=_KILL_PATIENCE)
                opening.add_done_callback(self._close_late)
                if session.started:
                    await session.kill()
                raise
            except asyncssh.ChannelOpenError as error:
                await self._refusal(connection, session, error, patience)
            except Exception:
                if not session.started:
                    self.give_back()
                raise
            else:
                session.write(setup)
                return

    async def _refusal(
        self,
        connection: asyncssh.SSHClientConnection,
        session: "CommandSession",
        error: asyncssh.ChannelOpenError,
        patience: Iterator[float],
    ) -> None:
        """Raise what a channel that was not opened means, unless waiting can help."""
        if session.started:  # its channel was opened, and is closed again
            raise BackendUnavailable(f"the server refuses to run commands: {error.reason}", "setup", None) from error
        if connection.is_closed():
            self.give_back()
            raise error
        if not self.refused():
            await self.be_patient(error, patience)

    @staticmethod
    async def be_patient(error: asyncssh.ChannelOpenError, patience: Iterator[float]) -> None:
        """Wait a little, because the server may still hold channels that ended for us; raise when that did not help."""
        if (seconds := next(patience, None)) is None:
            text = f"the server refuses every channel: {error.reason} (MaxSessions?)"
            raise BackendUnavailable(text, "sessions", 0.0) from error
        await asyncio.sleep(seconds)

    @staticmethod
    def _close_late(opening: "asyncio.Future[Any]") -> None:
        """A channel that opened after its caller had gone is closed; its slot follows by `on_closed`."""
        if not opening.cancelled() and opening.exception() is None:
            opening.result()[0].close()


class CommandSession(asyncssh.SSHClientSession[bytes]):
    """One running command: feeds its output to the capture; ended when the server closes the channel."""

    def __init__(self, backend: "RemoteFilesystemBackend", capture: Capture) -> None:
        self._backend = backend
        self._capture = capture
        self._channel: Any = None
        self._code: int | None = None
        self._ended: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        self.on_closed: Callable[[], None] = lambda: None

    @property
    def started(self) -> bool:
        """Whether a channel was opened for it."""
        return self._channel is not None

    def connection_made(self, chan: Any) -> None:
        self._channel = chan

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

    def connection_lost(self, exc: Exception | None) -> None:
        self.on_closed()
        if not self._ended.done():
            self._ended.set_result(exc)

    def write(self, data: bytes) -> None:
        """Send *data* to the command's lifeline."""
        if data:
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
        if error is not None or self._code is None:
            raise self._backend.lost_error(error or BackendUnavailable("the session ended without an exit code"))
        return self._code

    async def kill(self) -> None:
        """Let go of the lifeline, so that the supervising shell kills the group, and wait until it is gone."""
        if self._ended.done():
            return
        self._capture.detach()
        self._channel.resume_reading()  # a channel that waits for a slow reader would not tell its end
        self._channel.write_eof()
        done, _ = await asyncio.wait({self._ended}, timeout=_KILL_PATIENCE)
        if not done:
            self._channel.close()
