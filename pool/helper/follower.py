"""Following a durable command: from the first byte of its output to its end, by whatever helper, as often as asked."""

import os

from pool.helper import durable, family, wire

_POLLS = 0.005, 0.1
"""Seconds between two looks at a folder: after news, and at most; they double."""
_LIVES = 1.0
"""Seconds between two looks at whether the keeper lives."""


class Follower:
    """Follows one durable command, on the helper's loop. *keeper*: the child that may be its keeper."""

    def __init__(self, number: int, request: durable.Request, keeper: int) -> None:
        self.number, self._request, self.child = number, request, keeper
        self.failed = 0
        """The error number with which the child ended, if it did."""
        self.credit = wire.WINDOW
        self.due = 0.0
        self._to_kill = self._over = False
        self._pause = _POLLS[0]
        self._folder = -1
        self._keeper = None  # type: durable.KeptBy | None
        self._looked = 0.0
        self._segment = -1
        self._file = -1
        self._unread = b""
        self._positions = {wire.OUT: 0, wire.ERR: 0}

    def step(self, now: float) -> "list[tuple[int, bytes]]":
        """Return the frames that there are to send, kind and payload; the last one is EXIT or FAILED, at the end."""
        self.due = now + self._pause
        self._pause = min(_POLLS[1], 2 * self._pause)
        try:
            if self._folder < 0:
                self._folder = durable.open_folder(self._request)
            return self._follow(now)
        except OSError as error:
            return [(wire.FAILED, wire.join(b"os", b"%d" % (error.errno or 0), b"/bin/sh"))]

    def _follow(self, now: float) -> "list[tuple[int, bytes]]":
        trouble = self._meet()
        if trouble is not None:
            return [(wire.FAILED, trouble)] if trouble else []
        assert self._keeper is not None
        if self._to_kill:
            self._to_kill = False
            if self._keeper.lives():
                family.ask_to_end(self._keeper.pid)
        ended = self._ended(now)  # before the output: what there is then is all of it
        frames = [] if self._over else self._output()
        if frames:
            self.hurry()
        elif ended is not None:
            return self._last(ended)
        return frames

    def _meet(self) -> "bytes | None":
        """Get to know the keeper; return why there is none, "" for not yet."""
        if self._keeper is None:
            told = durable.read(self._folder, b"keeper")
            if not told:  # empty: the host went down before it was on the disk
                if self.child:
                    return b""
                return wire.join(b"os", b"%d" % self.failed, b"/bin/sh") if self.failed else b"gone"
            self._keeper = durable.KeptBy(told)
            if self._keeper.digest != self._request.digest:
                return b"another"
        why = durable.read(self._folder, b"refused")
        return b"gone" if why == b"" else why

    def _ended(self, now: float) -> "bytes | None":
        """Return how the command ended; "" when nobody can tell any more, None while it runs."""
        ended = durable.read(self._folder, b"ended")
        if ended is not None or now < self._looked + _LIVES:
            return ended
        self._looked = now
        assert self._keeper is not None
        if self._keeper.lives():
            return None
        return durable.read(self._folder, b"ended") or b""

    def _last(self, ended: bytes) -> "list[tuple[int, bytes]]":
        """Return the last frames."""
        if not ended:
            return [(wire.FAILED, b"gone")]
        end, out, err = ended.rsplit(b" ", 2)
        return [*self._move_to(int(out), int(err)), (wire.EXIT, end)]

    def _move_to(self, out: int, err: int) -> "list[tuple[int, bytes]]":
        """Go to these positions; tell what is missing before them."""
        missing = max(0, out - self._positions[wire.OUT]), max(0, err - self._positions[wire.ERR])
        self._positions = {wire.OUT: out, wire.ERR: err}
        return [(wire.GAP, b"%d %d" % missing)] if any(missing) else []

    def _output(self) -> "list[tuple[int, bytes]]":
        """Read on, as far as there is credit."""
        frames = []  # type: list[tuple[int, bytes]]
        while self.credit > 0 and len(frames) < 16:
            if self._file < 0 and not self._next(frames):
                break
            complete = bool(self._later())  # asked before: what is read then is all of the segment
            data = os.read(self._file, wire.CHUNK)
            self._unread += data
            if self._records(frames) or data:
                continue
            if not complete:
                break
            os.close(self._file)
            self._file = -1
        return frames

    def _records(self, frames: "list[tuple[int, bytes]]") -> bool:
        """Make frames of the whole records that were read."""
        at = 0
        while len(self._unread) - at >= durable.RECORD.size:
            kind, length = durable.RECORD.unpack_from(self._unread, at)
            end = at + durable.RECORD.size + length
            if len(self._unread) < end:
                break
            frames.append((kind, self._unread[at + durable.RECORD.size : end]))
            self._positions[kind] += length
            self.credit -= length
            at = end
        self._unread = self._unread[at:]
        return at > 0

    def _later(self) -> "list[int]":
        """Return the segments after the present one that are there."""
        numbers = [int(name[:8]) for name in os.listdir(self._folder) if name.endswith(".out")]
        return sorted(number for number in numbers if number > self._segment)

    def _next(self, frames: "list[tuple[int, bytes]]") -> bool:
        """Open the next segment that is there; tell what is missing before it."""
        for later in self._later():
            try:
                file = os.open(durable.segment(later), os.O_RDONLY, dir_fd=self._folder)
                break
            except FileNotFoundError:  # the keeper has removed it meanwhile
                continue
        else:
            return False
        head = os.read(file, durable.POSITION.size)
        if len(head) < durable.POSITION.size:  # just being made
            os.close(file)
            return False
        frames += self._move_to(*durable.POSITION.unpack(head))
        self._segment, self._file, self._unread = later, file, b""
        return True

    def kill(self) -> None:
        """Have the keeper end the command."""
        self._to_kill = self._over = True
        self.credit = max(1, self.credit)  # nobody reads its output any more, and its end costs none
        self.hurry()

    def hurry(self) -> None:
        """Look at once."""
        self._pause, self.due = _POLLS[0], 0.0

    def close(self) -> None:
        """Follow it no more; the command runs on."""
        for descriptor in (self._file, self._folder):
            if descriptor >= 0:
                os.close(descriptor)
