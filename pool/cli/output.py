"""Showing the live output of a task: as it is, or so that it cannot act on the terminal."""

import codecs
import sys
from typing import Any, BinaryIO

from pool.cli.screen import Screen
from pool.cli.words import count, harmless
from pool.live.format import Piece

KEPT = 10**6
"""Bytes."""


class Output:
    """Writes pieces to stdout and stderr as they come.

    *raw*: also to a terminal as they are. A file or a pipe gets every byte as it was written anyway.
    """

    def __init__(self, screen: Screen, *, raw: bool = False) -> None:
        self._screen = screen
        self._raw = raw
        self._decoders: dict[str, codecs.IncrementalDecoder] = {}

    def write(self, piece: Piece) -> None:
        """Show one piece, after what is left out before it."""
        if piece.skipped:
            self._decoders.pop(piece.stream, None)
            self._screen.note(f"... {count(piece.skipped)} bytes left out ...", "dim")
        if not piece.data:
            return
        stream = sys.stderr if piece.stream == "stderr" else sys.stdout
        if stream.isatty() and not self._raw:
            decoder = self._decoders.setdefault(piece.stream, codecs.getincrementaldecoder("utf-8")("replace"))
            stream.write(harmless(decoder.decode(piece.data)))
        else:
            stream.flush()  # notes that were written before stay before
            binary: BinaryIO = stream.buffer
            binary.write(piece.data)
        stream.flush()


class Kept:
    """The end of what a task wrote, for JSON."""

    def __init__(self) -> None:
        self._streams: dict[str, bytearray] = {}
        self._left_out = 0

    def add(self, piece: Piece) -> None:
        """Take a piece; `KEPT` bytes of each stream are kept."""
        stream = self._streams.setdefault("stderr" if piece.stream == "stderr" else "stdout", bytearray())
        stream += piece.data
        over = max(0, len(stream) - KEPT)
        del stream[:over]
        self._left_out += piece.skipped + over

    def told(self) -> dict[str, Any]:
        """Return ``stdout``, ``stderr`` and how many bytes were ``left_out`` of them."""
        texts = {name: self._streams.get(name, b"").decode(errors="replace") for name in ("stdout", "stderr")}
        return {**texts, "left_out": self._left_out}
