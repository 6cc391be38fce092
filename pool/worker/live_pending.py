"""Output that waits to be written: bounded, the oldest goes first."""

from collections import deque

ENTRY_COST = 128
"""Bytes that a chunk takes up besides its data, here and in Redis, about."""


class Chunk:
    """Bytes of one stream that go into one entry."""

    __slots__ = ("data", "offset", "stream")

    def __init__(self, stream: str, offset: int, data: bytearray) -> None:
        self.stream = stream
        self.offset = offset
        self.data = data

    @property
    def size(self) -> int:
        """Bytes that it takes up."""
        return len(self.data) + ENTRY_COST


class Pending:
    """At most *limit* bytes, in chunks of at most *entry* bytes of data; counts all that was added."""

    __slots__ = ("_chunks", "_entry", "_limit", "lines", "size", "totals")

    def __init__(self, limit: int, entry: int) -> None:
        self.totals: dict[str, int] = {}
        """Bytes of each stream, those that were dropped, too."""
        self.lines = 0
        self.size = 0
        """Bytes that wait, with what each chunk takes up besides."""
        self._limit = limit
        self._entry = entry
        self._chunks: deque[Chunk] = deque()

    def __bool__(self) -> bool:
        return bool(self._chunks)

    def add(self, stream: str, data: bytes) -> None:
        """Take what a stream has written next; drop the oldest chunks that there is no room for."""
        offset = self.totals.get(stream, 0)
        self.totals[stream] = offset + len(data)
        self.lines += data.count(b"\n")
        chunks = self._chunks
        if chunks and (last := chunks[-1]).stream == stream and len(last.data) + len(data) <= self._entry:
            last.data += data
            self.size += len(data)
        else:
            for start in range(0, len(data), self._entry):
                chunk = Chunk(stream, offset + start, bytearray(data[start : start + self._entry]))
                chunks.append(chunk)
                self.size += chunk.size
        if self.size > self._limit:
            self.shrink(self._limit)

    def shrink(self, limit: int) -> None:
        """Drop the oldest chunks until no more than *limit* bytes wait."""
        while self._chunks and self.size > limit:
            self.size -= self._chunks.popleft().size

    def take(self, limit: int) -> list[Chunk]:
        """Remove and return the oldest chunks, of *limit* bytes about; one at least if there is one."""
        taken: list[Chunk] = []
        while self._chunks and limit > 0:
            chunk = self._chunks.popleft()
            taken.append(chunk)
            self.size -= chunk.size
            limit -= chunk.size
        return taken
