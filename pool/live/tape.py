"""What one attempt of a task has in its stream, and the commands that write on: pure, replies come back to it.

It knows the size of each of its entries, so it can keep the stream within a number of bytes: the oldest output goes,
begin and end stay. What was there before its begin (earlier attempts, or what itself had written before the connection
broke) is one block, whose size Redis tells, and the first to go.
"""

import json
import secrets
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pool.live.pending import Chunk

Command = tuple[Any, ...]


class _Kept(NamedTuple):
    id: bytes
    size: int
    all_before: bool
    """Everything before this entry, instead of the entry."""


class Tape:
    """Of the stream *key*, which may hold *keep_bytes* and is gone *ttl* seconds after the last write."""

    def __init__(
        self, key: str, facts: Mapping[str, Any], keep_bytes: int, ttl: float, attempt: str | None = None
    ) -> None:
        self.attempt = attempt or secrets.token_hex(4)
        self._key = key
        self._facts = json.dumps(dict(facts), default=str)
        self._keep_bytes = keep_bytes
        self._expire: Command = ("PEXPIRE", key, max(1, int(1000 * ttl)))
        self._begun = False
        self._kept: deque[_Kept] = deque()
        self._size = 0
        self._sent: tuple[int, list[int]] = (0, [])  # replies before those of the chunks; the chunks' sizes

    @property
    def excess(self) -> bool:
        """Whether the stream holds too much; `commands` make up for it."""
        return self._size > self._keep_bytes

    def commands(self, chunks: Sequence[Chunk], end: Mapping[str, Any] | None = None) -> list[Command]:
        """Return what writes the chunks, and the end; `written` or `forget` has to follow."""
        sizes = [chunk.size for chunk in chunks]
        before = self._make_room(sum(sizes)) if self._begun else self._opening()
        add = self._begun  # a stream that was lost is begun again, not just written to
        entries = [
            self._add("output", "stream", chunk.stream, "offset", chunk.offset, "data", memoryview(chunk.data), old=add)
            for chunk in chunks
        ]
        if end is not None:
            entries.append(self._add("end", "facts", json.dumps(end), old=add))
        self._sent = len(before), sizes
        return [*before, *entries, self._expire]

    def _opening(self) -> list[Command]:
        return [("MEMORY USAGE", self._key), self._add("begin", "facts", self._facts, old=False)]

    def _add(self, kind: str, *fields: Any, old: bool) -> Command:
        where = ("NOMKSTREAM", "*") if old else ("*",)
        return ("XADD", self._key, *where, "kind", kind, "attempt", self.attempt, *fields)

    def _make_room(self, size: int) -> list[Command]:
        """Delete the oldest until there is room for *size* more bytes."""
        commands: list[Command] = []
        gone: list[bytes] = []
        while self._kept and self._size + size > self._keep_bytes:
            oldest = self._kept.popleft()
            self._size -= oldest.size
            if oldest.all_before:
                commands.append(("XTRIM", self._key, "MINID", oldest.id))
            else:
                gone.append(oldest.id)
        return [*commands, ("XDEL", self._key, *gone)] if gone else commands

    def written(self, replies: Sequence[Any]) -> bool:
        """Note the replies to `commands`; False: the stream was lost, and all of it is to be written again.

        Raises what Redis has refused a command with; then nothing is known of the stream.
        """
        first, sizes = self._sent
        usage = None if self._begun else replies[0]
        answers = replies if self._begun else replies[1:]  # a server may not tell how much memory there is in use
        for answer in answers:
            if isinstance(answer, Exception):
                self.forget()
                raise answer
        if None in replies[first:] or not replies[-1]:
            self.forget()
            return False
        if not self._begun:
            self._begun = True
            if isinstance(usage, int):
                self._keep(_Kept(replies[1], usage, all_before=True))
        for entry, size in zip(replies[first:], sizes, strict=False):
            self._keep(_Kept(entry, size, all_before=False))
        return True

    def _keep(self, kept: _Kept) -> None:
        self._kept.append(kept)
        self._size += kept.size

    def forget(self) -> None:
        """Nobody knows what was written: the next commands begin again, under the same attempt."""
        self._begun = False
        self._kept.clear()
        self._size = 0
