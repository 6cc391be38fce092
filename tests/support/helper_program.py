"""The program that a host runs for its worker, as a process of this machine, and the frames it speaks."""

import os
import select
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import psutil

from pool.helper import wire
from pool.helper.bundle import BOOT, bundle

PATIENCE = 30.0
"""Seconds for what has to happen."""

Frame = tuple[int, int, bytes]
FINAL = (wire.EXIT, wire.DONE, wire.FAILED, wire.PONG)


@dataclass
class Call:
    """What the helper has sent for one number."""

    out: bytearray = field(default_factory=bytearray)
    err: bytearray = field(default_factory=bytearray)
    told: bytes = b""
    missing: bytes = b""  # of stdout and stderr, as told last
    granted: int = 0  # credit for what we send
    kind: int = 0
    payload: bytes = b""

    @property
    def code(self) -> int:
        """The exit code of a command."""
        assert self.kind == wire.EXIT, (self.kind, self.payload)
        return int(self.payload.split()[0])

    @property
    def content(self) -> bytes:
        """What was read of a file: the last piece is the result."""
        assert self.kind == wire.DONE, (self.kind, self.payload)
        return bytes(self.out) + self.payload

    @property
    def usage(self) -> tuple[float, int]:
        """CPU seconds, and the largest RSS in bytes."""
        _, seconds, size = self.payload.split()
        return float(seconds), int(size)

    @property
    def failure(self) -> list[bytes]:
        """The error of a call, and its arguments."""
        assert self.kind == wire.FAILED, (self.kind, self.payload)
        return self.payload.split(b"\0")


class Program:
    """A running helper; a context manager. It gets credit for all that it sends, unless *credit* is False.

    *source*: another program than ours. *limit_files*: its RLIMIT_NOFILE. *limit_size*: 512-byte blocks that it may
    write into a file. Whatever is left of it at the end is killed.
    """

    def __init__(
        self,
        *,
        source: bytes | None = None,
        python: str = sys.executable,
        env: Mapping[str, str] | None = None,
        limit_files: int | None = None,
        limit_size: int | None = None,
    ) -> None:
        source = bundle() if source is None else source
        argv = [python, "-I", "-S", "-c", BOOT, str(len(source)), "token"]
        for option, limit in (("n", limit_files), ("f", limit_size)):
            if limit is not None:
                argv = ["/bin/sh", "-c", f'ulimit -{option} {limit} && exec "$@"', "sh", *argv]
        self._errors = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, env=env, bufsize=0
        )
        self.pid = self.process.pid
        self.credit = True
        self.clock = 0
        """What the helper told of its clock last, in hundredths of seconds."""
        self.calls: dict[int, Call] = {}
        self._unread = b""
        self._number = 0
        self._write(source)

    def __enter__(self) -> Self:
        mark = wire.mark("token")
        while len(self._unread) < len(mark):
            self._receive()
        assert self._unread.startswith(mark), self._unread
        self._unread = self._unread[len(mark) :]
        self._take()
        while not self.clock:
            self.pump()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _exc: BaseException | None, _tb: TracebackType | None
    ) -> None:
        try:
            family = psutil.Process(self.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            family = []
        self.process.kill()
        self.process.wait()
        for process in family:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass
        self.process.stdin.close()
        self.process.stdout.close()
        self._errors.close()

    # -- asking

    def send(self, kind: int, number: int, payload: bytes = b"") -> None:
        """Send one frame."""
        self._write(wire.frame(kind, number, payload))

    def open(self, kind: int, payload: bytes = b"") -> int:
        """Begin a call; returns its number."""
        self._number += 1
        self.calls.setdefault(self._number, Call())
        self.send(kind, self._number, payload)
        return self._number

    def exec(self, command: str, folders: Sequence[str] = ("/",), **env: str) -> int:
        """Start a command; returns its number."""
        variables = [f"{name}={value}" for name, value in env.items()]
        return self.open(wire.EXEC, "\0".join([command, str(len(folders)), *folders, *variables]).encode())

    def give(self, *pieces: bytes) -> int:
        """Send what the next call's command is to read; returns its number."""
        for piece in pieces:
            self.send(wire.STDIN, self._number + 1, piece)
        self.calls[self._number + 1] = Call()
        return self._number + 1

    def run(self, command: str, folders: Sequence[str] = ("/",), **env: str) -> Call:
        """Run a command to its end."""
        return self.wait(self.exec(command, folders, **env))

    def file(self, operation: str, *arguments: str | os.PathLike[str]) -> int:
        """Begin a file operation; returns its number."""
        return self.open(wire.FILE, "\0".join([operation, *map(os.fspath, arguments)]).encode())

    def operate(self, operation: str, *arguments: str | os.PathLike[str]) -> Call:
        """Do a file operation to its end."""
        return self.wait(self.file(operation, *arguments))

    def feed(self, number: int, data: bytes) -> None:
        """Send a content against credit, and its end."""
        call, sent = self.calls[number], 0
        while sent < len(data):
            while sent >= wire.WINDOW + call.granted:
                self.pump()
            piece = data[sent : min(sent + wire.CHUNK, wire.WINDOW + call.granted)]
            self.send(wire.INPUT, number, piece)
            sent += len(piece)
        self.send(wire.INPUT, number)

    def ping(self) -> None:
        """Return when it has answered: it has done all that was asked before."""
        self.wait(self.open(wire.PING))

    # -- hearing

    def wait(self, number: int) -> Call:
        """Take frames until the call has ended."""
        while not self.calls[number].kind:
            self.pump()
        return self.calls[number]

    def wait_out(self, number: int, text: bytes) -> None:
        """Take frames until the command has written *text*."""
        while text not in self.calls[number].out:
            self.pump()

    def wait_told(self, number: int) -> bytes:
        """Take frames until the process of the command is known, and return what is told."""
        while not self.calls[number].told:
            self.pump()
        return self.calls[number].told

    def pump(self) -> None:
        """Take some frames; fail when none comes or the helper has ended."""
        if not self._receive():
            raise EOFError(f"the helper has ended: {self.errors()}")
        self._take()

    def _take(self) -> None:
        for kind, number, payload in self._frames():
            if kind == wire.CLOCK:
                self.clock = int(payload)
                continue
            call = self.calls[number]
            assert not call.kind, "a frame after the last one"
            if kind in (wire.OUT, wire.ERR):
                (call.out if kind == wire.OUT else call.err).extend(payload)
                if self.credit:
                    self.send(wire.CREDIT, number, wire.COUNT.pack(len(payload)))
            elif kind == wire.CREDIT:
                call.granted += struct.unpack(">I", payload)[0]
            elif kind == wire.STARTED:
                call.told = payload
            elif kind == wire.GAP:
                call.missing = payload
            else:
                assert kind in FINAL, kind
                call.kind, call.payload = kind, payload

    def end(self) -> int:
        """Wait for it to end, taking what it says; return its exit code."""
        while self._receive():
            pass
        return self.process.wait(PATIENCE)

    def hang_up(self) -> int:
        """Close its stdin, as a channel that is closed, and return its exit code."""
        self.process.stdin.close()
        return self.end()

    def errors(self) -> str:
        """What it has written to stderr."""
        self._errors.seek(0)
        return self._errors.read().decode()

    # -- bytes

    def _frames(self) -> list[Frame]:
        frames, at, data = [], 0, self._unread
        while len(data) - at >= wire.HEADER.size:
            kind, number, length = wire.HEADER.unpack_from(data, at)
            start = at + wire.HEADER.size
            if len(data) - start < length:
                break
            at = start + length
            frames.append((kind, number, data[start:at]))
        self._unread = data[at:]
        return frames

    def _receive(self) -> bool:
        ready, _, _ = select.select([self.process.stdout], [], [], PATIENCE)
        assert ready, f"the helper says nothing for {PATIENCE} s: {self.errors()}"
        data = os.read(self.process.stdout.fileno(), 1 << 20)
        self._unread += data
        return bool(data)

    def _write(self, data: bytes) -> None:
        deadline = time.monotonic() + PATIENCE
        view = memoryview(data)
        while view:
            assert time.monotonic() < deadline, f"the helper takes nothing for {PATIENCE} s"
            view = view[os.write(self.process.stdin.fileno(), view) :]
