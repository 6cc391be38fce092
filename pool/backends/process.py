"""A long-running process at a workspace: its stdin and stdout are a byte stream, its stderr is kept for error messages.

The same for both kinds of workspace: asyncio's processes and asyncssh's have streams of one shape. What runs there is a
`PipedCommand`, so nothing of it outlives its end, its caller or the connection.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any

from pool.backends.output import HeadTail
from pool.backends.shell import EOF_GRACE, KILL_GRACE, PipedCommand

logger = logging.getLogger(__name__)

_KEPT = 64 * 1024
"""Bytes of stderr that are kept: the first and the last half."""
_CHUNK = 64 * 1024
_END_PATIENCE = EOF_GRACE + KILL_GRACE + 5.0
"""Seconds for a process whose input has ended to be gone with all that it started."""
_LAST_WORDS = 0.5
"""Seconds for the rest of stderr to arrive after stdout has ended."""


class PipedProcess:
    """*process*: of asyncio or asyncssh, running *command*. *force* ends it when it does not end by itself."""

    def __init__(self, process: Any, command: PipedCommand, force: Callable[[], None]) -> None:
        self._process = process
        self._command = command
        self._force = force
        self._stderr = HeadTail(_KEPT)
        self._closing: asyncio.Future[None] | None = None
        self.closed: asyncio.Future[None] | None = None  # kept for whoever watches its channel
        self._draining = asyncio.create_task(self._drain())
        with contextlib.suppress(OSError):  # it has ended already, which whoever talks to it gets to know
            process.stdin.write(command.setup)

    @property
    def local_pid(self) -> int | None:
        """The process group on this machine; None: it is elsewhere."""
        pid: int | None = getattr(self._process, "pid", None)
        return pid

    async def send(self, data: bytes) -> None:
        """Write to its stdin; waits while it does not read. Raises `ConnectionError` when it has ended."""
        try:
            self._process.stdin.write(data)
            await self._process.stdin.drain()
        except asyncio.CancelledError:
            raise
        except Exception as error:
            raise ConnectionError(f"the process has ended: {error}") from error

    async def receive(self) -> bytes:
        """Return what it writes to stdout as it comes, ``b""`` at its end; a connection that is lost is an end."""
        try:
            data: bytes = await self._process.stdout.read(_CHUNK)
            return data
        except asyncio.CancelledError:
            raise
        except Exception as error:
            logger.debug("reading from %r: %s", self, error)
            return b""

    async def _drain(self) -> None:
        with contextlib.suppress(Exception):
            while data := await self._process.stderr.read(_CHUNK):
                self._stderr.add(0, data)

    def tail(self, limit: int = 2000) -> str:
        """The end of what it said on stderr."""
        return self._command.said(self._stderr.tail_text(_KEPT))[-limit:]

    async def last_words(self) -> str:
        """Say how it ended, with the end of its stderr; after `receive` returned ``b""``."""
        await asyncio.wait({self._draining}, timeout=_LAST_WORDS)
        stderr = self._stderr.tail_text(_KEPT)
        code = self._command.exit_code(stderr)
        how = "it was cut off" if code is None else f"it ended with exit code {code}"
        said = self._command.said(stderr)[-2000:]
        return f"{how}:\n{said}" if said else how

    def exit_code(self) -> int | None:
        """What it ended with; None: it runs, or was cut off."""
        return self._command.exit_code(self._stderr.tail_text(_KEPT))

    def raise_notice(self) -> None:
        """Raise what was found wrong before it started: a missing folder, a symlink that leads out of the root."""
        self._command.raise_notice(254, self._stderr.tail_text(_KEPT))

    async def close(self) -> None:
        """End it, and everything that it started; returns when that is gone. Can be repeated."""
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        with contextlib.suppress(Exception):
            self._process.stdin.write_eof()
        gone = asyncio.ensure_future(self._gone())
        await asyncio.wait({gone}, timeout=_END_PATIENCE)
        if not gone.done():
            logger.warning("%r did not end within %g s", self, _END_PATIENCE)
            self._force()
            gone.cancel()
        self._draining.cancel()

    async def _gone(self) -> None:
        """Read on, so that no full pipe holds it up, until it has ended."""
        while await self.receive():
            pass
        with contextlib.suppress(Exception):
            await self._process.wait()
            await asyncio.wait({self._draining}, timeout=_LAST_WORDS)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} pid={self.local_pid or 'elsewhere'}>"
