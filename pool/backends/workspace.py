"""Commands and files under a root: the doors that task code uses, the same for every kind of backend.

Each door exists twice: ``exec`` blocks the calling thread, ``aexec`` is awaited, from any event loop. Both check
their arguments and the path rules, then hand over to a `Driver`, which does the IO on the pool's event loop.
"""

import asyncio
import errno
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

from pool.backends.base import Backend
from pool.backends.output import (
    TAP,
    Capture,
    Decoder,
    DirectSink,
    ExecResult,
    OnOutput,
    Sink,
    Tap,
    ThreadSink,
    check_encoding,
)
from pool.backends.paths import normalise
from pool.backends.process import PipedProcess
from pool.backends.shell import check_command, check_durable, check_env, check_stdin
from pool.config import check_number
from pool.errors import CommandFailed, CommandTimeout, ConfigError, FileOperationFailed
from pool.runtime import loop_thread

if TYPE_CHECKING:
    from pool.backends.scoped import ScopedBackend

T = TypeVar("T")

MAX_OUTPUT = 1 << 20
"""Bytes of each output stream that are kept, unless the backend's config says otherwise."""

DURABLE_OUTPUT = 8
"""Times ``max_output`` bytes of a durable command's output are kept on the host: enough for whoever follows later."""

DURABLE_PATIENCE = 10.0
"""Seconds for a host to end a durable command whose time is over, and to say so."""


@dataclass(frozen=True)
class FileStat:
    """What `stat` tells. ``size`` in bytes, ``mtime`` in seconds since 1970, ``mode`` as in `os.stat_result`."""

    size: int
    mtime: float
    mode: int
    is_dir: bool


@dataclass(frozen=True)
class Place:
    """A path that has passed the rules: ``path`` relative to ``root``, which is absolute.

    ``outer``: the roots that ``root`` itself must be inside, symlinks resolved; the outermost first.
    """

    root: str
    path: str
    outer: tuple[str, ...] = ()

    @property
    def full(self) -> str:
        """The absolute path."""
        return self.root if self.path == "." else f"{self.root.rstrip('/')}/{self.path}"

    @property
    def chain(self) -> list[str]:
        """The absolute path after the roots it must be inside of, the outermost first."""
        return [*self.outer, self.root, self.full]


@dataclass(frozen=True)
class Durable:
    """A command that outlives the connection. *name*: who asks for the same one follows the same command.

    *timeout*: seconds from its start, whoever follows. *keep*: bytes of its output that the host keeps.
    """

    name: str
    timeout: float | None
    keep: int


class DurableTimeout(TimeoutError):
    """The host ended a durable command when its time was over."""


class Driver(ABC):
    """What a kind of backend does on the event loop. File errors are `FileOperationFailed`, never the library's."""

    root: str
    """Absolute; known once it is connected."""
    max_output: int = MAX_OUTPUT
    base_env: Mapping[str, str] = {}

    @abstractmethod
    def timed(self) -> AbstractContextManager[None]:
        """Tell an observer how long the block took; see `Backend.timed`."""

    @abstractmethod
    async def ready(self) -> None:
        """Connect if it is not connected. Raise `BackendClosed` after `destroy`."""

    @abstractmethod
    async def run(self, command: str, cwd: Place, env: Mapping[str, str], capture: Capture, stdin: bytes = b"") -> int:
        """Run to the end and return the exit code; 128 + n for a command that died of signal n.

        Cancelled, it kills the command's process group before it ends. A connection that is lost under way raises.
        """

    async def run_durable(
        self,
        command: str,  # noqa: ARG002 - most kinds have none
        cwd: Place,  # noqa: ARG002
        env: Mapping[str, str],  # noqa: ARG002
        capture: Capture,  # noqa: ARG002
        stdin: bytes,  # noqa: ARG002
        durable: Durable,
    ) -> int:
        """As `run`, but a connection that is lost, and the end of this process, leave the command alone.

        The next call with the same name goes on with it, from the first byte of its output to its end. Raises
        `CommandLost` when nobody can tell any more how it ended, `DurableTimeout`, `ConfigError` for a kind of backend
        that has no durable commands.
        """
        raise ConfigError(f"durable={durable.name!r}: {self!r} has no durable commands; SSH with a helper has")

    @abstractmethod
    async def start_process(self, argv: Sequence[str], cwd: Place, env: Mapping[str, str]) -> PipedProcess:
        """Start a process that talks through stdin and stdout; the caller closes it.

        What is wrong with *cwd* or *argv* is told by the process itself, by its early end. A connection that is lost
        raises `BackendUnavailable`.
        """

    @abstractmethod
    async def read_file(self, place: Place) -> bytes:
        """Return the whole file."""

    @abstractmethod
    async def write_file(self, place: Place, data: bytes) -> None:
        """Replace the file as a whole: readers see the old content or the new one. Makes missing folders."""

    @abstractmethod
    async def list_folder(self, place: Place) -> list[str]:
        """Return the names in the folder."""

    @abstractmethod
    async def make_folder(self, place: Place) -> None:
        """Make the folder and its parents; one that exists is fine."""

    @abstractmethod
    async def stat_file(self, place: Place) -> FileStat:
        """Describe the file or folder, following symlinks inside the root."""

    @abstractmethod
    async def remove(self, place: Place, *, recursive: bool) -> None:
        """Remove a file or an empty folder (*recursive*: any folder). A symlink is removed, never its target."""

    @abstractmethod
    async def move(self, source: Place, target: Place) -> None:
        """Rename; an existing target file is replaced."""

    @abstractmethod
    async def touch_file(self, place: Place) -> None:
        """Make an empty file, or set the time of an existing one to now."""


class Workspace(ABC):
    """Commands and files under one folder of a driver."""

    _driver: Driver
    _base = "."  # of this workspace, relative to the driver's root
    _outer: tuple[str, ...] = ()  # the bases of the workspaces that this one is a scope of
    _env: Mapping[str, str] = {}

    # -- commands

    def exec(
        self,
        command: str,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float | None = None,
        check: bool = True,
        on_output: OnOutput | None = None,
        *,
        encoding: str | None = "utf-8",
        durable: str | None = None,
        stdin: str | bytes | None = None,
    ) -> ExecResult[Any]:
        """Run *command* by ``/bin/sh -c`` and wait until it has ended and closed its output.

        *cwd* is relative to the root. *timeout*: seconds for the whole call, after which the command's process group
        is killed. *on_output* is called in this thread with each piece of output and its stream's name. Output is
        text (errors replaced), or bytes with ``encoding=None``; of each stream ``max_output`` bytes are kept.
        *stdin*: what the command reads, as a file that is there before it starts, 64 MiB at most; without, it is empty.

        *durable*: a name; the command then runs on when the connection or this process ends, and a call with the same
        name and command goes on with it, up to a day after its end: its output from the start, its exit code, and it
        ran once. The timeout counts from its start then; a timeout or a cancel ends it. Only over SSH with a helper.

        Raises `CommandFailed` (unless ``check=False``), `CommandTimeout`, `BackendUnavailable` when the connection is
        lost, `BackendClosed`, `PathEscapeError`, `ConfigError`; `CommandLost` when a durable command's host was
        restarted.
        """
        with self._driver.timed():
            if on_output is None:
                call = self._exec(command, cwd, env, timeout, check, None, encoding, TAP.get(), durable, stdin)
                return loop_thread().run(call)
            check_encoding(encoding)
            sink = ThreadSink(Decoder(on_output, encoding))
            call = self._exec(command, cwd, env, timeout, check, sink, encoding, TAP.get(), durable, stdin)
            return sink.drive(loop_thread().spawn(call))

    async def aexec(
        self,
        command: str,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float | None = None,
        check: bool = True,
        on_output: OnOutput | None = None,
        *,
        encoding: str | None = "utf-8",
        durable: str | None = None,
        stdin: str | bytes | None = None,
    ) -> ExecResult[Any]:
        """`exec` for any event loop; *on_output* is called on the pool's own loop and must not block it."""
        check_encoding(encoding)
        sink = None if on_output is None else DirectSink(Decoder(on_output, encoding))
        call = self._exec(command, cwd, env, timeout, check, sink, encoding, TAP.get(), durable, stdin)
        with self._driver.timed():
            return await loop_thread().arun(call if sink is None else sink.drive(call))

    async def _exec(
        self,
        command: str,
        cwd: str | None,
        env: Mapping[str, str] | None,
        timeout: float | None,
        check: bool,
        sink: Sink | None,
        encoding: str | None,
        tap: Tap | None,
        durable: str | None,
        stdin: str | bytes | None,
    ) -> ExecResult[Any]:
        check_command(command)
        check_encoding(encoding)
        content = check_stdin(stdin, encoding)
        own_env = check_env(env)
        if timeout is not None:
            check_number("timeout", timeout, "must be more than 0, or None for no limit")
        if durable is not None:
            check_durable(durable)
        capture = Capture(self._driver.max_output, sink, tap)
        started = monotonic()
        try:
            limit = timeout if timeout is None or durable is None else timeout + DURABLE_PATIENCE
            async with asyncio.timeout(limit) as clock:
                await self._driver.ready()
                environment = {**self._driver.base_env, **self._env, **own_env}
                place = self._place(cwd or ".")
                if durable is None:
                    code = await self._driver.run(command, place, environment, capture, content)
                else:
                    kept = Durable(durable, timeout, DURABLE_OUTPUT * self._driver.max_output)
                    code = await self._driver.run_durable(command, place, environment, capture, content, kept)
        except TimeoutError as error:
            if not (clock.expired() or isinstance(error, DurableTimeout)):
                raise
            when = "when its time was over" if timeout is None else f"after {timeout:g} s"
            tail = capture.tail()
            raise CommandTimeout(f"killed {when}: {_short(command)}{_quote_tail(tail)}", timeout or 0.0, tail) from None
        result = capture.result(code, monotonic() - started, encoding)
        if check and code:
            tail = capture.tail()
            raise CommandFailed(f"exit code {code}: {_short(command)}{_quote_tail(tail)}", code, tail)
        return result

    async def astart(
        self, argv: Sequence[str], cwd: str | None = None, env: Mapping[str, str] | None = None
    ) -> PipedProcess:
        """Start a process that talks through its stdin and stdout, for a backend that is built on this one.

        Await it on the pool's event loop. It runs until it ends or is closed.
        """
        environment = {**self._env, **check_env(env)}
        await self._driver.ready()
        return await self._driver.start_process(argv, self._place(cwd or "."), environment)

    # -- files

    def read(self, path: str, encoding: str | None = "utf-8") -> Any:
        """Return the content of a file: text (errors replaced), or bytes with ``encoding=None``."""
        return loop_thread().run(self._read(path, encoding))

    async def aread(self, path: str, encoding: str | None = "utf-8") -> Any:
        """`read` for any event loop."""
        return await loop_thread().arun(self._read(path, encoding))

    async def _read(self, path: str, encoding: str | None) -> Any:
        check_encoding(encoding)
        data = await self._on(path, self._driver.read_file)
        return data if encoding is None else data.decode(encoding, errors="replace")

    def write(self, path: str, data: str | bytes) -> None:
        """Write a file (text as UTF-8), with its folders; readers see the old content or the new one, never a part."""
        loop_thread().run(self._write(path, data))

    async def awrite(self, path: str, data: str | bytes) -> None:
        """`write` for any event loop."""
        await loop_thread().arun(self._write(path, data))

    async def _write(self, path: str, data: str | bytes) -> None:
        if not isinstance(data, str | bytes | bytearray | memoryview):
            raise ConfigError(f"data: must be text or bytes, not {type(data).__name__}")
        content = data.encode("utf-8", "surrogateescape") if isinstance(data, str) else bytes(data)
        await self._driver.ready()
        await self._driver.write_file(self._place(path), content)

    def readdir(self, path: str = ".") -> list[str]:
        """Return the names in a folder, sorted."""
        return loop_thread().run(self._readdir(path))

    async def areaddir(self, path: str = ".") -> list[str]:
        """`readdir` for any event loop."""
        return await loop_thread().arun(self._readdir(path))

    async def _readdir(self, path: str) -> list[str]:
        return sorted(await self._on(path, self._driver.list_folder))

    def mkdir(self, path: str) -> None:
        """Make a folder and its parents; one that exists is fine."""
        loop_thread().run(self._on(path, self._driver.make_folder))

    async def amkdir(self, path: str) -> None:
        """`mkdir` for any event loop."""
        await loop_thread().arun(self._on(path, self._driver.make_folder))

    def exists(self, path: str) -> bool:
        """Whether there is a file or folder of this name."""
        return loop_thread().run(self._exists(path))

    async def aexists(self, path: str) -> bool:
        """`exists` for any event loop."""
        return await loop_thread().arun(self._exists(path))

    async def _exists(self, path: str) -> bool:
        try:
            await self._on(path, self._driver.stat_file)
        except FileOperationFailed as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                return False
            raise
        return True

    def stat(self, path: str) -> FileStat:
        """Describe a file or folder."""
        return loop_thread().run(self._stat(path))

    async def astat(self, path: str) -> FileStat:
        """`stat` for any event loop."""
        return await loop_thread().arun(self._stat(path))

    async def _stat(self, path: str) -> FileStat:
        found: FileStat = await self._on(path, self._driver.stat_file)
        return found

    def rm(self, path: str, recursive: bool = False) -> None:
        """Remove a file or an empty folder; with *recursive* a folder and all in it. Symlinks are not followed."""
        loop_thread().run(self._rm(path, recursive))

    async def arm(self, path: str, recursive: bool = False) -> None:
        """`rm` for any event loop."""
        await loop_thread().arun(self._rm(path, recursive))

    async def _rm(self, path: str, recursive: bool) -> None:
        await self._driver.ready()
        place = self._place(path)
        if place.path == ".":
            raise ConfigError(f"path={path!r}: the root itself is not removed")
        await self._driver.remove(place, recursive=recursive)

    def rename(self, source: str, target: str) -> None:
        """Rename a file or folder; an existing target file is replaced."""
        loop_thread().run(self._rename(source, target))

    async def arename(self, source: str, target: str) -> None:
        """`rename` for any event loop."""
        await loop_thread().arun(self._rename(source, target))

    async def _rename(self, source: str, target: str) -> None:
        await self._driver.ready()
        await self._driver.move(self._place(source), self._place(target))

    def touch(self, path: str) -> None:
        """Make an empty file, or set the time of an existing one to now."""
        loop_thread().run(self._on(path, self._driver.touch_file))

    async def atouch(self, path: str) -> None:
        """`touch` for any event loop."""
        await loop_thread().arun(self._on(path, self._driver.touch_file))

    # -- scopes and paths

    def scope(self, path: str, env: Mapping[str, str] | None = None) -> "ScopedBackend":
        """Return the same backend with *path* as its root and *env* added to every command. Can be nested.

        The folder need not exist yet; the first write, or `mkdir(".")`, makes it.
        """
        from pool.backends.scoped import ScopedBackend

        return ScopedBackend(self, path, env)

    def _place(self, path: str) -> Place:
        root = Place(self._driver.root, self._base).full
        outer = tuple(Place(self._driver.root, base).full for base in self._outer)
        return Place(root, normalise(path, root), outer)

    async def _on(self, path: str, operation: Any) -> Any:
        await self._driver.ready()
        return await operation(self._place(path))


class WorkspaceBackend(Workspace, Driver, Backend):
    """A kind of backend that runs commands and keeps files under ``root``."""

    def __init__(self) -> None:
        super().__init__()
        self._reconnecting = asyncio.Lock()

    @property
    def _driver(self) -> Driver:  # type: ignore[override]
        return self

    def timed(self) -> AbstractContextManager[None]:  # type: ignore[override]
        return Backend.timed(self)

    async def ready(self) -> None:
        """Connect on first use, and again after the connection was lost."""
        if not self.usable:
            async with self._reconnecting:  # one at a time, however many callers find it down
                if not self.usable:
                    await self.connect()


def _short(command: str) -> str:
    line = command.strip().replace("\n", "; ")
    return line if len(line) <= 120 else line[:117] + "..."


def _quote_tail(tail: str) -> str:
    return f"\n{tail}" if tail else ""
