"""The board: where a prefork child posts what it knows, for its parent to read without asking."""

import os
import struct
import tempfile
import zlib

_HEAD = struct.Struct("<II")  # length and checksum of what follows

_TRIES = 5


class Board:
    """Made before worker processes are forked. One writes, the other reads; neither waits."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - it has no name, and ends with the processes

    def post(self, content: bytes) -> None:
        """Put *content* in place of what was there."""
        os.pwrite(self._file.fileno(), _HEAD.pack(len(content), zlib.crc32(content)) + content, 0)

    def read(self) -> bytes | None:
        """Return what was posted last; None: nothing yet, or only halves, for its writer was killed at it."""
        for _ in range(_TRIES):
            head = os.pread(self._file.fileno(), _HEAD.size, 0)
            if len(head) < _HEAD.size:
                return None
            length, checksum = _HEAD.unpack(head)
            content = os.pread(self._file.fileno(), length, _HEAD.size)
            if zlib.crc32(content) == checksum and len(content) == length:
                return content
        return None

    def close(self) -> None:
        """Nobody reads any more."""
        self._file.close()
