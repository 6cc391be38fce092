"""The frames that a worker and its helper on a host exchange.

A frame is `HEADER` (kind, number of the call, length) and its payload. The worker numbers its calls; both sides go on
with a call until the helper has sent EXIT, DONE or FAILED for it. Output, input and file contents are sent against
credit: a side starts with `WINDOW` bytes for each call, and a CREDIT gives back what the other has consumed. So one
slow reader holds up its own call only. Texts in a payload are separated by NUL, which none of them can contain.
"""

import struct

VERSION = 1
HEADER = struct.Struct(">BII")

# From the worker.
EXEC = 1  # command NUL count of folders NUL folders... NUL name=value...
INPUT = 2  # bytes of a file's content; none: its end
CREDIT = 3  # a number of bytes, COUNT (from both sides)
KILL = 4  # end the command and all that it started; give the file operation up
FILE = 5  # name of the operation NUL its arguments...
PING = 6
SWEEP = 7  # what a helper that is no more has left of its commands: marks, and what STARTED told, separated by NUL
DURABLE = 8  # name NUL digest of the command NUL bytes of output to keep NUL seconds or 0 NUL an EXEC
STDIN = 9  # bytes that the command of the EXEC or DURABLE which follows under this number is to read
UNTIL = 10  # end, with all that runs, when the helper's clock has come to this moment; empty: no moment is known

# From the helper.
OUT = 65  # bytes of stdout, ...
ERR = 66  # ... of stderr, or of a file
EXIT = 67  # exit code (128 + n for a death by signal n) SPACE CPU seconds SPACE largest RSS in bytes
DONE = 68  # result of a file operation
FAILED = 69  # name of an error NUL its arguments...
PONG = 70
STARTED = 71  # a command that takes longer: its process, and since when that runs
GAP = 72  # bytes of stdout and of stderr that are left out here, as decimal numbers
CLOCK = 73  # the present moment, in hundredths of seconds as a decimal number: first of all, and after each UNTIL

COUNT = struct.Struct(">I")

WINDOW = 1 << 21
"""Bytes of a call that may be under way: as much as one SSH channel of asyncssh has."""
CREDIT_AT = WINDOW // 4
"""Bytes consumed after which the other side is told."""
CHUNK = 1 << 16
"""Bytes of output or of a file in one frame at most."""

OVER = 75
"""The helper's exit code when the moment of the last UNTIL has come: EX_TEMPFAIL of sysexits.h."""

KILL_GRACE = 0.1
"""Seconds between TERM and KILL."""


def mark(token: str) -> bytes:
    """What the helper says first; before it the login shell's start-up files may say what they like."""
    return ("pool-helper %d %s\n" % (VERSION, token)).encode()


def command_mark(token: str, number: int) -> bytes:
    """The value of `family.MARK` in the environment of a command."""
    return ("%s.%d" % (token, number)).encode()


def frame(kind: int, number: int, payload: bytes = b"") -> bytes:
    """One frame."""
    return HEADER.pack(kind, number, len(payload)) + payload


def join(*texts: bytes) -> bytes:
    """A payload of texts."""
    return b"\0".join(texts)
