"""Showing the live output of a task: as it is, or so that it cannot act on the terminal."""

import codecs
import sys
from collections.abc import Iterable
from typing import BinaryIO

from pool.cli.screen import Screen
from pool.cli.words import count, harmless
from pool.live import Piece


class Output:
    """Writes pieces to stdout and stderr as they come.

    *raw*: also to a terminal as they are. A file or a pipe gets every byte as it was written anyway.
    """

    def __init__(self, screen: Screen, *, raw: bool = False) -> None:
        self._screen = screen
        self._raw = raw
        self._decoders: dict[str, codecs.IncrementalDecoder] = {}
        self.left_out = 0
        """Bytes that were not there any more."""

    def write(self, piece: Piece) -> None:
        """Show one piece, after what is left out before it."""
        if piece.skipped:
            self.left_out += piece.skipped
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


def text_of(pieces: Iterable[Piece], stream: str) -> str:
    """Return what one stream of the pieces wrote, for JSON."""
    return b"".join(piece.data for piece in pieces if piece.stream == stream).decode(errors="replace")
