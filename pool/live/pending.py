"""Output that waits to be written: bounded, the oldest goes first."""

from collections import deque

ENTRY_COST = 128
"""Bytes that a chunk takes up besides its data, here and in Redis, about."""


class Chunk:
    """Bytes of one stream that go into one entry."""

    __slots__ = ("data", "offset", "stream")

    def __init__(self, data: bytearray) -> None:
        self.stream = ""
        self.offset = 0
        self.data = data

    def follows(self, stream: str, offset: int) -> bool:
        """Whether what a stream writes at *offset* comes right after it."""
        return self.stream == stream and self.offset + len(self.data) == offset

    @property
    def size(self) -> int:
        """Bytes that it takes up."""
        return len(self.data) + ENTRY_COST

    @property
    def lines(self) -> int:
        """Line ends in it."""
        return self.data.count(b"\n")


class Pending:
    """At most *limit* bytes, in chunks of at most *entry* bytes of data; counts all that was added.

    A flood costs next to nothing: what is dropped was copied, but not looked at.
    """

    __slots__ = ("_chunks", "_dropped", "_entry", "_limit", "_lines", "_taken", "overflowed", "size", "totals")

    def __init__(self, limit: int, entry: int) -> None:
        self.totals: dict[str, int] = {}
        """Bytes of each stream, those that were dropped, too."""
        self.size = 0
        """Bytes that wait, with what each chunk takes up besides."""
        self.overflowed = False
        """Whether something was dropped since the last `take`."""
        self._limit = limit
        self._entry = entry
        self._chunks: deque[Chunk] = deque()
        self._lines = 0  # in what was taken
        self._taken = 0
        self._dropped = 0

    def __bool__(self) -> bool:
        return bool(self._chunks)

    @property
    def lines(self) -> int:
        """Line ends in all that was added; in what was dropped as many as in the same length of the rest."""
        waiting = list(self._chunks)  # the loop's thread may change them
        lines = self._lines + sum(chunk.lines for chunk in waiting)
        known = self._taken + sum(len(chunk.data) for chunk in waiting)
        return lines + (self._dropped * lines // known if known else 0)

    def add(self, stream: str, data: bytes, missing: int = 0) -> None:
        """Take what a stream has written next, *missing* bytes later; drop the oldest chunks there is no room for."""
        length, offset, chunks = len(data), self.totals.get(stream, 0) + missing, self._chunks
        self.totals[stream] = offset + length
        last = chunks[-1] if chunks else None
        if last is not None and last.follows(stream, offset) and len(last.data) + length <= self._entry:
            last.data += data
            self.size += length
        else:
            for start in range(0, length, self._entry):
                self._append(stream, offset + start, data[start : start + self._entry])
        self.shrink(self._limit)

    def _append(self, stream: str, offset: int, data: bytes) -> None:
        """Add a chunk; in the memory of one that has to go, or each would take new pages from the system."""
        full = self.size + len(data) > self._limit
        chunk = self._drop() if full and self._chunks else Chunk(bytearray())
        chunk.stream = stream
        chunk.offset = offset
        chunk.data[:] = data
        self._chunks.append(chunk)
        self.size += chunk.size

    def _drop(self) -> Chunk:
        """Drop and return the oldest chunk; but of all output the very first stays longest."""
        oldest = 1 if not self._taken and len(self._chunks) > 1 else 0
        chunk = self._chunks[oldest]
        del self._chunks[oldest]
        self.size -= chunk.size
        self._dropped += len(chunk.data)
        self.overflowed = True
        return chunk

    def shrink(self, limit: int) -> None:
        """Drop chunks until no more than *limit* bytes wait."""
        while self._chunks and self.size > limit:
            self._drop()

    def take(self, limit: int) -> list[Chunk]:
        """Remove and return the oldest chunks, of *limit* bytes about; one at least if there is one."""
        self.overflowed = False
        taken: list[Chunk] = []
        while self._chunks and limit > 0:
            chunk = self._chunks.popleft()
            taken.append(chunk)
            self.size -= chunk.size
            limit -= chunk.size
            self._taken += len(chunk.data)
            self._lines += chunk.lines
        return taken
