"""JSON messages, one on each line, over the pipes of an agent's process: what the ACP SDK calls a transport."""

import asyncio
import json
from collections import deque
from collections.abc import Callable
from typing import Any

from pool.backends.process import PipedProcess

_GARBAGE_LINES = 1000
"""Lines that are no messages (an agent that logs to stdout) until it is believed to speak no ACP at all."""
_GARBAGE_KEPT = 2000
"""Characters of them that are kept for error messages."""


class LineTransport:
    """Messages of *process*; a line of more than *max_line* bytes, or too many that are no messages, end it.

    *full* says whether to read on, like `Sink.full`. *ended* is called once, when nothing more will come.
    """

    def __init__(
        self,
        process: PipedProcess,
        max_line: int,
        full: Callable[[Callable[[], None]], bool],
        ended: Callable[[], None],
    ) -> None:
        self._process = process
        self._max_line = max_line
        self._full = full
        self._ended = ended
        self._parts: list[bytes] = []  # of the line that is not complete yet
        self._size = 0
        self._messages: deque[dict[str, Any]] = deque()
        self._sending = asyncio.Lock()
        self._garbage = 0
        self.garbage = ""
        """The first lines that were no messages."""
        self.fault = ""
        """How the agent broke the protocol; "": it did not."""

    async def send(self, message: dict[str, Any]) -> None:
        """Raises `ConnectionError` when the process has ended."""
        data = json.dumps(message, separators=(",", ":")).encode() + b"\n"
        async with self._sending:
            await self._process.send(data)

    async def receive(self) -> dict[str, Any] | None:
        """Return the next message, None at the end."""
        while not self._messages:
            await self._room()
            data = await self._process.receive()
            if data:
                self._feed(data)
            if not data or self.fault:
                self._ended()
                return None
        return self._messages.popleft()

    async def _room(self) -> None:
        """Wait for a follower of the turn who is slow."""
        resume = asyncio.Event()
        while self._full(resume.set):
            await resume.wait()
            resume.clear()

    def _feed(self, data: bytes) -> None:
        *lines, rest = data.split(b"\n")
        for line in lines:
            self._parts.append(line)
            whole = b"".join(self._parts)
            self._parts, self._size = [], 0
            self._take(whole)
        self._parts.append(rest)
        self._size += len(rest)
        if self._size > self._max_line:
            self.fault = f"it wrote a line of more than {self._max_line} bytes"

    def _take(self, line: bytes) -> None:
        if len(line) > self._max_line:
            self.fault = f"it wrote a line of {len(line)} bytes: at most {self._max_line}"
        elif line.strip():
            try:
                message = json.loads(line)
            except (ValueError, RecursionError):
                message = None
            if _is_message(message):
                self._messages.append(message)
            else:
                self._note_garbage(line)

    def _note_garbage(self, line: bytes) -> None:
        self._garbage += 1
        if len(self.garbage) < _GARBAGE_KEPT:
            self.garbage += line[:_GARBAGE_KEPT].decode("utf-8", "replace") + "\n"
        if self._garbage > _GARBAGE_LINES:
            self.fault = f"it wrote {self._garbage} lines that are no messages, such as: {self.garbage[:200]}"

    async def close(self) -> None:
        """The process is ended by whoever started it."""


def _is_message(message: Any) -> bool:
    """Whether it is a request, a notification or a response; the SDK stops listening for good at what only looks so."""
    if not isinstance(message, dict) or not ("method" in message or "id" in message):
        return False
    rightly = isinstance(message.get("method"), str | None) and isinstance(message.get("error"), dict | None)
    return rightly and isinstance(message.get("id"), str | int | float | None)
