"""What goes on under one number of a helper's channel: a command, a file operation, a question whether it is there."""

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from pool.backends.output import STREAMS, Capture, Stream
from pool.backends.workspace import DurableTimeout
from pool.errors import CommandLost, ConfigError, FileOperationFailed, PathEscapeError, PoolError
from pool.helper import wire

if TYPE_CHECKING:
    from pool.backends.helper import Helper

T = TypeVar("T")


class Call(Generic[T]):
    """One call; ``ended`` has what became of it, ``number`` is given when it is sent."""

    _credit = wire.WINDOW

    def __init__(self, helper: "Helper") -> None:
        self.number = 0
        self.ended: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._helper = helper
        self._consumed = 0
        self._more: asyncio.Event | None = None  # while it waits for credit

    async def send(self, kind: int, content: bytes) -> None:
        """Send *content* in frames of this kind as the helper takes it; return at once when the call has ended."""
        view = memoryview(content)
        while view and not self.ended.done():
            if self._credit <= 0:
                self._more = asyncio.Event()
                await self._more.wait()
                continue
            piece = bytes(view[: min(wire.CHUNK, self._credit)])
            self._helper.send(kind, self.number, piece)
            self._credit -= len(piece)
            view = view[len(piece) :]

    def granted(self, payload: bytes) -> None:
        """The helper has consumed some of it."""
        self._credit += wire.COUNT.unpack(payload)[0]
        if self._more is not None:
            self._more.set()

    def feed(self, kind: int, data: bytes) -> None:
        """Take a piece of output, or of a file."""

    def answer(self, kind: int, payload: bytes) -> None:
        """Take any other frame."""

    def end(self, result: T | Exception) -> None:
        """Tell what became of it, unless that is known."""
        if self._more is not None:
            self._more.set()
        if self.ended.done():
            return
        if isinstance(result, Exception):
            self.ended.set_exception(result)
        else:
            self.ended.set_result(result)

    def give_credit(self) -> None:
        """Let the helper send as much as was consumed."""
        consumed, self._consumed = self._consumed, 0
        self._helper.give_credit(self.number, consumed)


class Running(Call[int]):
    """A command that runs; it ends with its exit code."""

    def __init__(self, helper: "Helper", command: str, folder: str, capture: Capture) -> None:
        super().__init__(helper)
        self._command = command
        self._folder = folder
        self._capture = capture

    def feed(self, kind: int, data: bytes) -> None:
        stream: Stream = "stdout" if kind == wire.OUT else "stderr"
        self._capture.feed(stream, data)
        self._consumed += len(data)
        if not self._capture.full(self.give_credit) and self._consumed >= wire.CREDIT_AT:
            self.give_credit()

    def detach(self) -> None:
        """Wait for no slow reader any more."""
        self._capture.detach()

    def answer(self, kind: int, payload: bytes) -> None:
        if kind == wire.GAP:
            for stream, count in zip(STREAMS, payload.split(), strict=True):
                self._capture.skip(stream, int(count))
        elif kind == wire.CREDIT:
            self.granted(payload)
        elif kind == wire.EXIT:
            code, seconds, size, *timeout = payload.split()
            self._capture.usage = float(seconds), int(size)
            self.end(DurableTimeout() if timeout else int(code))
        elif kind == wire.FAILED:
            self.end(self._refusal(*_texts(payload)))

    def _refusal(self, what: str, *rest: str) -> int | PoolError:
        """What it means that the command was not started, or nobody knows how it ended."""
        short = self._command[:80]
        if what == "toobig":  # a shell that cannot execute it says so and ends with this code
            self._capture.feed("stderr", b"/bin/sh: Argument list too long\n")
            return 126
        if what == "gone":
            why = "the host was restarted, or what kept the command was killed; how it ended is not known"
            return CommandLost(f"{why}: {short}")
        if what == "another":
            return ConfigError(f"durable: the name belongs to another command on this host, not to {short!r}")
        if what == "cwd":
            return FileOperationFailed.of(2, "cwd", self._folder, "no such folder, or not accessible")
        if what == "escape":
            return PathEscapeError(f"cwd {self._folder!r} leaves its root through a symlink, to {rest[0]!r}")
        return FileOperationFailed.of(int(rest[0]), "stdin of" if what == "stdin" else "start of", short)


@dataclass
class Answer:
    """What a file operation returned: its result, and the content of a file, of which that is the last piece."""

    result: bytes
    content: bytes


class Transfer(Call[Answer]):
    """A file operation."""

    def __init__(self, helper: "Helper", operation: str, path: str) -> None:
        super().__init__(helper)
        self._operation, self._path = operation, path
        self._pieces: list[bytes] = []

    def feed(self, kind: int, data: bytes) -> None:  # noqa: ARG002 - a file has one stream
        self._pieces.append(data)
        self._consumed += len(data)
        if self._consumed >= wire.CREDIT_AT:
            self.give_credit()

    def answer(self, kind: int, payload: bytes) -> None:
        if kind == wire.CREDIT:
            self.granted(payload)
        elif kind == wire.DONE:
            self.end(Answer(payload, b"".join([*self._pieces, payload])))
        elif kind == wire.FAILED:
            self.end(self._failure(*_texts(payload)))

    def _failure(self, what: str, *rest: str) -> PoolError:
        if what == "outside":
            return PathEscapeError(f"path {self._path!r} leaves the root through a symlink, to {rest[0]!r}")
        if what == "os":
            return FileOperationFailed.of(int(rest[0]), self._operation, self._path)
        return FileOperationFailed.of(5, self._operation, self._path, ": ".join([what, *rest]))


class Ping(Call[None]):
    """A question whether it is there."""

    def answer(self, kind: int, payload: bytes) -> None:  # noqa: ARG002
        self.end(None)


def _texts(payload: bytes) -> list[str]:
    return [text.decode("utf-8", "surrogateescape") for text in payload.split(b"\0")]
