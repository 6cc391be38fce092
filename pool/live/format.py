"""The live output of a task in Redis: what its entries say, and how a reader makes pieces of them.

A stream ``{pool}:live:<task id>`` holds entries of three kinds, all with the fields ``kind`` and ``attempt`` (an id: a
task that is retried, or delivered again, runs once more under the same task id; if its command has gone on, under the
same attempt, too)::

    begin   facts   JSON object: what the worker tells of the attempt. Written again after the stream was lost
    output  stream  stdout, stderr or update (an agent's)
            offset  bytes that this stream of the attempt had written before
            data    bytes
    end     facts   JSON object: state, exit_code, bytes, lines, ended (unix time), streams (bytes of each stream)

Offsets tell what is missing, whoever left it out, and what came twice, because the writer could not know whether it
had arrived.
"""

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from pool.errors import ConfigError
from pool.sharding.redis_store import keys_of

FINAL = frozenset({"SUCCESS", "FAILURE", "REVOKED"})
"""States after which no other attempt of a task follows."""
NO_FACTS: Mapping[str, Any] = MappingProxyType({})


def live_key(namespace: str, task_id: str) -> str:
    """Return the name of a task's stream. Raises `ConfigError` for an id that is none."""
    if not isinstance(task_id, str) or not task_id:
        raise ConfigError(f"task_id={task_id!r}: must be the id of a task")
    (key,) = keys_of(namespace, f"live:{task_id}")
    return key


class Piece(NamedTuple):
    """One piece of what a task wrote, or the begin or the end of an attempt. A documented interface: names stay."""

    stream: str
    """``stdout``, ``stderr`` or ``update``; "" for a begin or an end."""
    data: bytes
    """As it was written, cut anywhere; empty where nothing but a gap is told."""
    offset: int
    """Bytes that the stream of this attempt had written before ``data``."""
    skipped: int = 0
    """Bytes of the stream that are left out just before ``data``."""
    kind: Literal["begin", "output", "end"] = "output"
    facts: Mapping[str, Any] = NO_FACTS
    """begin: ``attempt`` and what the worker tells (``name key node started``). end: ``attempt state exit_code bytes
    lines``; one that was not written down, but told by the task's state, has no more than that."""


class Transcript:
    """Makes pieces of entries, in the order of the stream: pure."""

    def __init__(self) -> None:
        self.over = False
        """The last attempt that has begun has ended, and no other one follows."""
        self.running: set[str] = set()
        """Attempts that have begun and not ended."""
        self._positions: dict[str, dict[str, int]] = {}
        self._facts: dict[str, dict[str, Any]] = {}
        self._last = ""

    def add(self, fields: Mapping[bytes, bytes]) -> list[Piece]:
        """Return what an entry has told that is new."""
        kind, attempt = fields.get(b"kind"), fields.get(b"attempt", b"").decode(errors="replace")
        if kind == b"begin":
            return self._begin(attempt, _object(fields.get(b"facts")))
        pieces = self._begin(attempt, {}) if kind in (b"output", b"end") else []  # its begin was lost with the stream
        if kind == b"output":
            stream = fields.get(b"stream", b"").decode(errors="replace")
            pieces += self._output(attempt, stream, _number(fields.get(b"offset")), fields.get(b"data", b""))
        elif kind == b"end":
            pieces += self._end(attempt, _object(fields.get(b"facts")))
        return pieces

    def _begin(self, attempt: str, facts: dict[str, Any]) -> list[Piece]:
        if attempt in self._positions and facts in ({}, self._facts[attempt]):
            return []
        self._positions.setdefault(attempt, {})  # known: another worker goes on with it
        self._facts[attempt] = facts
        self.running.add(attempt)
        self._last = attempt
        self.over = False
        return [Piece("", b"", 0, 0, "begin", {**facts, "attempt": attempt})]

    def _output(self, attempt: str, stream: str, offset: int, data: bytes = b"") -> list[Piece]:
        positions = self._positions[attempt]
        seen = positions.get(stream, 0)
        if offset < seen:
            data = data[seen - offset :]
            offset = seen
        if not data and offset == seen:
            return []
        positions[stream] = offset + len(data)
        return [Piece(stream, data, offset, offset - seen)]

    def _end(self, attempt: str, facts: dict[str, Any]) -> list[Piece]:
        final = attempt == self._last and facts.get("state") in FINAL
        if attempt not in self.running and (self.over or not final):
            return []  # it comes twice; but of two workers that go on with an attempt, the second may end it for good
        self.running.discard(attempt)
        self.over = final
        totals = facts.pop("streams", None)
        known = totals.items() if isinstance(totals, dict) else ()
        gaps = [
            piece for name, total in known if isinstance(total, int) for piece in self._output(attempt, name, total)
        ]
        return [*gaps, Piece("", b"", 0, 0, "end", {**facts, "attempt": attempt})]


def _object(text: bytes | None) -> dict[str, Any]:
    try:
        found = json.loads(text or b"{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _number(text: bytes | None) -> int:
    return int(text) if text is not None and text.isdigit() else 0
