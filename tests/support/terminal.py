"""A program in a terminal of its own: what it shows, and keys that are typed."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from tests.support.waiting import wait_until

ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|[()][A-Z0-9]|[=>78])")


class Terminal:
    """Entered: the program runs; it ends with the block."""

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str], cwd: Path, *, columns: int = 100, lines: int = 30
    ) -> None:
        self.command = list(command)
        self.env = {"TERM": "xterm-256color", **env}
        self.cwd = cwd
        self.size = columns, lines
        self.output = b""
        self._closed = False

    def __enter__(self) -> Self:
        self._ours, theirs = pty.openpty()
        columns, lines = self.size
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.process = subprocess.Popen(
            self.command, env=self.env, cwd=self.cwd, stdin=theirs, stdout=theirs, stderr=theirs,
            start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509
        )  # fmt: skip
        os.close(theirs)
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait(20)
        self._closed = True
        os.close(self._ours)

    def _read(self) -> bool:
        """Take what there is; False: the program has closed the terminal."""
        while not self._closed and select.select([self._ours], [], [], 0)[0]:
            try:
                data = os.read(self._ours, 65536)
            except OSError:
                return False
            if not data:
                return False
            self.output += data
        return True

    @property
    def text(self) -> str:
        """Everything it has shown, without the sequences that move and colour."""
        self._read()
        return ESCAPES.sub("", self.output.decode(errors="replace")).replace("\r\n", "\n")

    def wait_for(self, text: str, timeout: float = 30.0) -> str:
        """Wait until *text* was shown; return everything."""
        wait_until(lambda: text in self.text, lambda: f"{text!r} is shown, not only {self.text!r}", timeout)
        return self.text

    def type(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def end(self, timeout: float = 30.0) -> int:
        """Wait for the end; return the exit code."""
        wait_until(
            lambda: not self._read() or self.process.poll() is not None, lambda: f"it ends: {self.text}", timeout
        )
        code = self.process.wait(timeout)
        self._read()
        return code
