"""A folder of this machine."""

import asyncio
import contextlib
import os
import signal
import stat as stat_bits
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from pool.backends.base import Capabilities
from pool.backends.leftovers import owner
from pool.backends.output import Capture, Stream
from pool.backends.process import PipedProcess
from pool.backends.shell import KILL_GRACE, PipedCommand, ShellCommand, check_env
from pool.backends.workspace import MAX_OUTPUT, FileStat, Place, WorkspaceBackend
from pool.config import check_number
from pool.errors import BackendClosed, BackendUnavailable, FileOperationFailed, PathEscapeError
from pool.helper import files

T = TypeVar("T")

_PASSED_ON = ("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR")
"""Variables of the worker that commands see. Nothing else: the worker's environment holds its secrets."""

_KILL_PATIENCE = KILL_GRACE + 5.0
"""Seconds for a killed command to be gone."""


class LocalFilesystemBackend(WorkspaceBackend):
    """Commands and files under *root_dir* on the worker's own machine; the folder is made on connect.

    *env*: added to the environment of every command. *max_output*: bytes of each stream that are kept.

    It does not use ``trust``: the commands of a worker that is killed end, those of one that is frozen go on.
    """

    kind = "local"
    capabilities = Capabilities(exec=True, files=True)

    def __init__(
        self,
        root_dir: str | os.PathLike[str],
        *,
        env: Mapping[str, str] | None = None,
        max_output: int = MAX_OUTPUT,
    ) -> None:
        super().__init__()
        check_number("max_output", max_output, "must be more than 0", unit="bytes")
        self.root = os.path.abspath(os.path.expanduser(root_dir))
        self.max_output = max_output
        self.base_env = {**{n: os.environ[n] for n in _PASSED_ON if n in os.environ}, **check_env(env)}
        self._running: set[_Command] = set()

    async def open(self) -> None:
        try:
            await asyncio.to_thread(os.makedirs, self.root, exist_ok=True)
        except OSError as error:
            raise BackendUnavailable(f"root_dir {self.root!r}: {error.strerror}", "setup", None) from error
        self.root = os.path.realpath(self.root)

    async def close(self) -> None:
        await asyncio.gather(*(command.kill() for command in self._running))

    async def run(self, command: str, cwd: Place, env: Mapping[str, str], capture: Capture, stdin: bytes = b"") -> int:
        shell = ShellCommand(command, cwd.chain, {}, stdin=stdin)
        capture.hidden = shell.token.encode()
        running = _Command(capture, shell.argv, env=dict(env), cwd=self.root)
        self._running.add(running)
        try:
            await running.started()
            running.write(shell.setup)
            code = await running.ended()
        except OSError as error:
            raise FileOperationFailed.of(error.errno or 0, "start of", command[:80]) from error
        finally:
            self._running.discard(running)
        if not self.usable:
            raise BackendClosed(f"{self!r} was closed while the command ran")
        shell.raise_notice(code, capture.tail())
        return code

    async def start_process(self, argv: Sequence[str], cwd: Place, env: Mapping[str, str]) -> PipedProcess:
        command = PipedCommand(argv, cwd.chain, {**self.base_env, **env}, owner())
        pipe = asyncio.subprocess.PIPE
        try:
            process = await asyncio.create_subprocess_exec(
                *command.argv, stdin=pipe, stdout=pipe, stderr=pipe, env=self.base_env, cwd="/", start_new_session=True
            )
        except OSError as error:
            raise FileOperationFailed.of(error.errno or 0, "start of", argv[0]) from error
        return PipedProcess(process, command, lambda: _signal_group(process.pid, signal.SIGKILL))

    # -- files: the calls block, so they run in threads

    async def read_file(self, place: Place) -> bytes:
        def read(path: bytes, roots: list[bytes]) -> bytes:
            file = files.begin_read(path, roots)
            try:
                return b"".join(iter(lambda: os.read(file, 1 << 20), b""))
            finally:
                os.close(file)

        return await self._guarded("read", place, read)

    async def write_file(self, place: Place, data: bytes) -> None:
        def write(path: bytes, roots: list[bytes]) -> None:
            replacement = files.Replacement(path, roots)
            try:
                replacement.write(data)
                replacement.commit()
            finally:
                replacement.end()

        await self._guarded("write", place, write)

    async def list_folder(self, place: Place) -> list[str]:
        return [os.fsdecode(name) for name in await self._guarded("readdir", place, files.names)]

    async def make_folder(self, place: Place) -> None:
        await self._guarded("mkdir", place, files.make_folder)

    async def stat_file(self, place: Place) -> FileStat:
        found = await self._guarded("stat", place, files.stat)
        return FileStat(found.st_size, found.st_mtime, found.st_mode, stat_bits.S_ISDIR(found.st_mode))

    async def remove(self, place: Place, *, recursive: bool) -> None:
        await self._guarded("rm", place, lambda path, roots: files.remove(path, roots, recursive))

    async def move(self, source: Place, target: Place) -> None:
        await self._guarded("rename", source, lambda path, roots: files.move(path, roots, *_under(target)))

    async def touch_file(self, place: Place) -> None:
        await self._guarded("touch", place, files.touch)

    async def _guarded(self, operation: str, place: Place, work: Callable[[bytes, list[bytes]], T]) -> T:
        """Call *work* in a thread; map what it raises."""
        try:
            return await asyncio.to_thread(work, *_under(place))
        except files.Outside as error:
            text = f"path {place.path!r} leaves the root through a symlink, to {os.fsdecode(error.args[0])!r}"
            raise PathEscapeError(text) from error
        except OSError as error:
            raise FileOperationFailed.of(error.errno or 0, operation, place.path) from error


def _under(place: Place) -> tuple[bytes, list[bytes]]:
    """The path and its roots, as `pool.helper.files` takes them."""
    return os.fsencode(place.full), [os.fsencode(root) for root in (*place.outer, place.root)]


class _Command(asyncio.SubprocessProtocol):
    """One command, started at once: feeds its output to the capture; ended when it exited and closed its output."""

    def __init__(self, capture: Capture, argv: Sequence[str], **options: Any) -> None:
        self._capture = capture
        self._transport: Any = None
        self._open_pipes = {1, 2}
        loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[int] = loop.create_future()
        self._starting = loop.create_task(loop.subprocess_exec(lambda: self, *argv, start_new_session=True, **options))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        stream: Stream = "stdout" if fd == 1 else "stderr"
        self._capture.feed(stream, data)
        pipe = self._transport.get_pipe_transport(fd)
        if self._capture.full(pipe.resume_reading):
            pipe.pause_reading()

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:  # noqa: ARG002
        self._open_pipes.discard(fd)
        self._finish()

    def process_exited(self) -> None:
        self._finish()

    def _finish(self) -> None:
        code = self._transport.get_returncode()
        if code is not None and not self._open_pipes and not self._ended.done():
            self._ended.set_result(code if code >= 0 else 128 - code)
            self._transport.close()

    def write(self, data: bytes) -> None:
        """Send *data* to the command's lifeline."""
        if data:
            self._transport.get_pipe_transport(0).write(data)

    async def started(self) -> None:
        """Wait until it runs; cancelled, kill the process group first. Raises `OSError`."""
        await self._or_kill(self._starting)

    async def ended(self) -> int:
        """Return the exit code; cancelled, kill the process group first."""
        return await self._or_kill(self._ended)

    async def _or_kill(self, stage: asyncio.Future[T]) -> T:
        try:
            return await asyncio.shield(stage)
        except asyncio.CancelledError:
            await self.kill()
            raise

    async def kill(self) -> None:
        """Let go of the lifeline, so that the supervising shell kills the group; make sure of it."""
        # It may run before asyncio is done with its start, which if cancelled would kill the supervising shell alone.
        await asyncio.wait({self._starting})
        if self._starting.exception() is not None:
            return
        self._capture.detach()
        for fd in self._open_pipes:  # a pipe that waits for a slow reader would not tell its end
            self._transport.get_pipe_transport(fd).resume_reading()
        lifeline = self._transport.get_pipe_transport(0)
        if not lifeline.is_closing():
            lifeline.abort()  # what it has not read of its stdin is dropped: it must not start on that now
        if self._transport.get_returncode() is not None:  # the shell has ended, a child of it holds the output
            self._signal_group(signal.SIGTERM)
            await asyncio.wait({self._ended}, timeout=KILL_GRACE)
            self._signal_group(signal.SIGKILL)
        done, _ = await asyncio.wait({self._ended}, timeout=_KILL_PATIENCE)
        if not done:
            self._signal_group(signal.SIGKILL)
            self._transport.close()

    def _signal_group(self, number: signal.Signals) -> None:
        _signal_group(self._transport.get_pid(), number)


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)
