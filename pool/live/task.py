"""What the writer of live output knows of one attempt of a task."""

import builtins
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pool.live.pending import Chunk, Pending
from pool.live.tape import Tape

if TYPE_CHECKING:
    from pool.live.output import LiveOutput


class LiveTask:
    """One attempt of a task, made by `LiveOutput.open`."""

    __slots__ = (
        "_attempt", "_facts", "_tape", "done", "end", "flooding", "flying", "held", "key", "live", "opened", "paused",
        "pending", "queued", "touched", "wrote",
    )  # fmt: skip

    def __init__(self, live: "LiveOutput", key: str, facts: Mapping[str, Any], attempt: str | None = None) -> None:
        self.live = live
        self.key = key
        self.opened = time.monotonic()
        self.end: dict[str, Any] | None = None
        self.pending = Pending(live.pending_limit, live.entry_limit)
        self.done = False  # its end was written
        self.touched = False  # there is, or will be, something of it in Redis
        self.queued = False  # in the next batch, in the one under way, or paused
        self.flooding = False
        self.paused = False  # until `FLOOD_PAUSE` is over
        self.flying: list[Chunk] = []  # handed to Redis, not known to have arrived
        self.wrote = 0.0
        self.held = 0  # what it counts of `ENDED_BYTES`
        self._facts = facts
        self._attempt = attempt
        self._tape: Tape | None = None

    @property
    def bytes(self) -> int:
        """Bytes of output so far."""
        return sum(self.pending.totals.values())

    @property
    def lines(self) -> int:
        """Line ends in it; estimated where more was written than could be looked at."""
        return self.pending.lines

    @property
    def tape(self) -> Tape:
        """What it has in Redis."""
        if self._tape is None:
            live = self.live
            self._tape = Tape(self.key, self._facts, live.keep_bytes, live.ttl, self._attempt)
        return self._tape

    def feed(self, stream: str, data: builtins.bytes, missing: int = 0) -> None:
        """Take a piece of output (stdout, stderr or update), and how many bytes are missing before it.

        On the loop's thread, which it never holds up.
        """
        if self.end is not None:
            return
        self.pending.add(stream, data, missing)
        if not self.queued:
            self.live.queue(self)

    def close(self, state: str, exit_code: int | None = None) -> None:
        """Say that the attempt has ended, with this Celery state; from any thread. The first call counts."""
        if self.end is not None:
            return
        self.end = {"state": state, "exit_code": exit_code, "ended": time.time()}
        self.live.ended(self)

    def end_facts(self) -> dict[str, Any] | None:
        """What its end entry is to say; None: it runs, or has said so."""
        if self.end is None or self.done:
            return None
        return {**self.end, "bytes": self.bytes, "lines": self.lines, "streams": self.pending.totals}
