"""What a command writes: kept up to a bound, head and tail, and passed on while it runs."""

import asyncio
import codecs
import queue
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

from pool.errors import ConfigError, PoolError
from pool.interrupt import interruptible
from pool.runtime import Call

Stream = Literal["stdout", "stderr"]
STREAMS: tuple[Stream, Stream] = "stdout", "stderr"
OnOutput = Callable[[str | bytes, Stream], object]
"""Called with each piece of output, text (or bytes with ``encoding=None``), and the name of its stream."""

Text = TypeVar("Text", str, bytes)
T = TypeVar("T")

Tap = Callable[[str, bytes, int], object]
"""Gets each piece of output with the name of its stream, and how many bytes are missing before it; on the event loop:
must not block."""

TAP: ContextVar[Tap | None] = ContextVar("pool_tap", default=None)
"""Listens to all commands, and turns of agents, that are run from its context."""

HIGH_WATER = 1 << 20
"""Bytes that may wait for a slow ``on_output``; beyond it the command is made to wait."""


def check_encoding(encoding: str | None) -> None:
    """Raise `ConfigError` unless *encoding* is None or the name of a text encoding."""
    try:
        if encoding is not None:
            b"x".decode(encoding, errors="replace")
    except (LookupError, TypeError):
        raise ConfigError(f"encoding={encoding!r}: must be the name of a text encoding, or None for bytes") from None


@dataclass(frozen=True)
class ExecResult(Generic[Text]):
    """How a command ended. ``duration`` in seconds; ``truncated``: the middle of its output was left out."""

    exit_code: int
    stdout: Text
    stderr: Text
    duration: float
    truncated: bool
    output: Text
    """Both streams in the order in which they arrived."""
    cpu_seconds: float | None = None
    """CPU time of the command and what it waited for; None: the host does not tell."""
    max_rss: int | None = None
    """Bytes of memory of the largest process among those; None: the host does not tell."""


class HeadTail:
    """The first and the last ``limit / 2`` bytes of a stream, in numbered pieces."""

    def __init__(self, limit: int) -> None:
        self._head_room = limit - limit // 2
        self._tail_limit = limit // 2
        self._head: list[tuple[int, bytes]] = []
        self._tail: deque[tuple[int, bytes]] = deque()
        self._tail_size = 0
        self.omitted = 0

    def add(self, number: int, data: bytes) -> None:
        if self._head_room:
            self._head.append((number, data[: self._head_room]))
            self._head_room -= len(self._head[-1][1])
            data = data[len(self._head[-1][1]) :]
        if not data:
            return
        self._tail.append((number, data))
        self._tail_size += len(data)
        while self._tail_size > self._tail_limit:
            first_number, first = self._tail.popleft()
            excess = self._tail_size - self._tail_limit
            dropped = min(excess, len(first))
            self.omitted += dropped
            self._tail_size -= dropped
            if dropped < len(first):
                self._tail.appendleft((first_number, first[dropped:]))

    def omit(self, number: int, count: int) -> None:
        """Note that *count* bytes never came; what comes later belongs to the tail."""
        self._head_room = 0
        if not self._head:
            self._head.append((number, b""))
        self.omitted += count

    def pieces(self, encoding: str | None) -> list[tuple[int, bytes]]:
        """What was kept, in order, with a note (in text only) where something was left out."""
        gap: list[tuple[int, bytes]] = []
        if self.omitted and encoding is not None:
            gap = [
                (
                    self._head[-1][0] if self._head else 0,
                    f"\n... [{self.omitted} bytes left out] ...\n".encode(),
                )
            ]
        return [*self._head, *gap, *self._tail]

    def tail_text(self, limit: int) -> str:
        """The last *limit* bytes as text."""
        data = b"".join(piece for _, piece in [*self._head, *self._tail])
        return data[-limit:].decode(errors="replace")


class Sink(Protocol):
    """Where output goes while the command runs."""

    def push(self, stream: Stream, data: bytes) -> None:
        """Take one piece; on the event loop's thread."""

    def full(self, resume: Callable[[], None]) -> bool:
        """Say whether to pause; then *resume* is called on the event loop when there is room again."""


class Capture:
    """Collects both streams of one command."""

    def __init__(self, limit: int, sink: Sink | None = None, tap: Tap | None = None) -> None:
        self.streams: dict[Stream, HeadTail] = {name: HeadTail(limit) for name in STREAMS}
        self._sink = sink
        self._tap = tap
        self.hidden = b""
        """Pieces of stderr that hold this are for us alone, and not passed on."""
        self.usage: tuple[float, int] | tuple[None, None] = None, None
        """CPU seconds and largest RSS in bytes, where the host tells."""
        self._count = 0

    def feed(self, stream: Stream, data: bytes) -> None:
        """Take one piece as it arrives."""
        self._count += 1
        self.streams[stream].add(self._count, data)
        if self.hidden and stream == "stderr" and self.hidden in data:
            return
        if self._tap is not None:
            self._tap(stream, data, 0)
        if self._sink is not None:
            self._sink.push(stream, data)

    def skip(self, stream: Stream, count: int) -> None:
        """Note that *count* bytes were left out here, if any."""
        if not count:
            return
        self._count += 1
        self.streams[stream].omit(self._count, count)
        if self._tap is not None:
            self._tap(stream, b"", count)

    def full(self, resume: Callable[[], None]) -> bool:
        """See `Sink.full`."""
        return self._sink is not None and self._sink.full(resume)

    def detach(self) -> None:
        """Pass nothing on any more: the command is being killed, and who reads may be gone."""
        self._sink = None

    def tail(self, limit: int = 2000) -> str:
        """The end of stderr, or of stdout when stderr is empty."""
        return (self.streams["stderr"].tail_text(limit) or self.streams["stdout"].tail_text(limit)).strip()

    def result(self, exit_code: int, duration: float, encoding: str | None) -> ExecResult[Any]:
        """Everything that was kept, decoded."""
        stdout, stderr = (self.streams[name].pieces(encoding) for name in STREAMS)
        both = sorted(stdout + stderr, key=lambda piece: piece[0]) if stdout and stderr else stdout or stderr

        def join(pieces: list[tuple[int, bytes]]) -> str | bytes:
            data = b"".join(piece for _, piece in pieces)
            return data if encoding is None else data.decode(encoding, errors="replace")

        texts = join(stdout), join(stderr)
        output = join(both) if stdout and stderr else texts[0] or texts[1]
        truncated = any(stream.omitted for stream in self.streams.values())
        return ExecResult(exit_code, texts[0], texts[1], duration, truncated, output, *self.usage)


class Consumer(Protocol):
    """Takes what a sink passes on: pieces of one of two streams, or encoded updates."""

    def __call__(self, stream: Any, data: bytes) -> None: ...

    def finish(self) -> None:
        """No more will come."""


class Decoder:
    """Calls ``on_output`` with whole characters: a character that is cut by a chunk waits for its rest."""

    def __init__(self, on_output: OnOutput, encoding: str | None) -> None:
        self._on_output = on_output
        self._decoders = (
            {name: codecs.getincrementaldecoder(encoding)(errors="replace") for name in STREAMS} if encoding else {}
        )

    def __call__(self, stream: Stream, data: bytes) -> None:
        if not self._decoders:
            self._on_output(data, stream)
        elif text := self._decoders[stream].decode(data):
            self._on_output(text, stream)

    def finish(self) -> None:
        """Pass on what is left of a cut character."""
        for stream in STREAMS:
            if self._decoders and (text := self._decoders[stream].decode(b"", final=True)):
                self._on_output(text, stream)


class DirectSink:
    """``on_output`` called on the event loop, for async callers; an exception in it cancels *task*."""

    def __init__(self, decoder: Consumer) -> None:
        self._decoder = decoder
        self.error: Exception | None = None
        self.task: asyncio.Task[Any] | None = None

    def push(self, stream: Stream, data: bytes) -> None:
        if self.error is not None:
            return
        try:
            self._decoder(stream, data)
        except Exception as error:
            # Raised here, it would end in the event loop's log, or end an SSH connection that others use.
            self.error = error
            if self.task is not None:
                self.task.cancel()

    def full(self, resume: Callable[[], None]) -> bool:  # noqa: ARG002 - the interface of Sink
        return False

    async def drive(self, call: Coroutine[Any, Any, T]) -> T:
        """Await *call*; an exception in ``on_output`` ends the command."""
        self.task = asyncio.current_task()
        assert self.task is not None
        try:
            result = await call
        except asyncio.CancelledError:
            if self.error is None:
                raise
            self.task.uncancel()
            raise self.error from None
        except PoolError:
            self._decoder.finish()
            raise
        self._decoder.finish()
        return result


class ThreadSink:
    """``on_output`` called in the thread that waits for the command, so that a task's context is there.

    At most about `HIGH_WATER` bytes wait for it; then the command is made to wait.
    """

    def __init__(self, decoder: Consumer) -> None:
        self._decoder = decoder
        self._queue: queue.SimpleQueue[tuple[Stream, bytes] | None] = queue.SimpleQueue()
        self._pushed = 0
        self._taken = 0
        self._resume: list[Callable[[], None]] = []

    def push(self, stream: Stream, data: bytes) -> None:
        self._pushed += len(data)
        self._queue.put((stream, data))

    def full(self, resume: Callable[[], None]) -> bool:
        if self._pushed - self._taken < HIGH_WATER:
            return False
        if resume not in self._resume:
            self._resume.append(resume)  # first, then look again: the reader may have taken everything meanwhile
        return self._pushed - self._taken >= HIGH_WATER // 2

    def drive(self, call: Call[T]) -> T:
        """Pass output on until the command has ended; an exception in ``on_output`` ends the command."""
        call.future.add_done_callback(lambda _: self._queue.put(None))
        try:
            with interruptible(call.cancel):
                self._read(call)
            self._decoder.finish()
        except BaseException:
            call.abandon()
            raise
        return call.wait()

    def _read(self, call: Call[T]) -> None:
        while (piece := self._queue.get()) is not None:
            self._decoder(*piece)
            self._taken += len(piece[1])
            if self._resume and self._pushed - self._taken < HIGH_WATER // 2:
                call.owner.loop.call_soon_threadsafe(self._resume_once)

    def _resume_once(self) -> None:
        waiting, self._resume = self._resume, []
        for resume in waiting:
            resume()
