"""Files in memory: for tests of tasks, and the cheapest backend there is."""

import errno
import time
from collections.abc import Callable, Mapping, Sequence
from posixpath import dirname

from pool.backends.base import Capabilities
from pool.backends.output import Capture
from pool.backends.process import PipedProcess
from pool.backends.shell import check_env
from pool.backends.workspace import MAX_OUTPUT, FileStat, Place, WorkspaceBackend
from pool.errors import BackendUnavailable, ConfigError, FileOperationFailed

Handler = Callable[..., tuple[int, bytes, bytes]]
"""``(command, environment) -> (exit code, stdout, stderr)``; the third argument is the stdin, if there is any."""


class MemoryBackend(WorkspaceBackend):
    """A tree of files in this process; gone when it is destroyed.

    *handler* stands in for a shell; without one `exec` raises `ConfigError`. No symlinks, no permissions.
    """

    kind = "memory"

    def __init__(
        self,
        root_dir: str = "/",
        *,
        handler: Handler | None = None,
        env: Mapping[str, str] | None = None,
        max_output: int = MAX_OUTPUT,
    ) -> None:
        super().__init__()
        self.capabilities = Capabilities(exec=handler is not None, files=True)
        self.root = "/" + root_dir.strip("/")
        self.base_env = check_env(env)
        self.max_output = max_output
        self._handler = handler
        self._files: dict[str, tuple[bytes, float]] = {}
        self._folders: dict[str, float] = {self.root: time.time()}

    async def open(self) -> None:
        """Nothing to connect."""

    async def close(self) -> None:
        self._files.clear()
        self._folders.clear()

    async def start_process(self, argv: Sequence[str], cwd: Place, env: Mapping[str, str]) -> PipedProcess:  # noqa: ARG002
        raise BackendUnavailable("a 'memory' backend runs no processes: use 'local' or 'ssh'", "setup", None)

    async def run(self, command: str, cwd: Place, env: Mapping[str, str], capture: Capture, stdin: bytes = b"") -> int:
        if self._handler is None:
            raise ConfigError("MemoryBackend has no shell: give it handler= to run commands")
        if cwd.full not in self._folders:
            raise FileOperationFailed.of(errno.ENOENT, "cwd", cwd.full, "no such folder")
        code, stdout, stderr = self._handler(command, env, *([stdin] if stdin else []))
        if stdout:
            capture.feed("stdout", stdout)
        if stderr:
            capture.feed("stderr", stderr)
        return code

    async def read_file(self, place: Place) -> bytes:
        if place.full in self._folders:
            raise FileOperationFailed.of(errno.EISDIR, "read", place.path)
        return self._file("read", place)[0]

    async def write_file(self, place: Place, data: bytes) -> None:
        if place.full in self._folders:
            raise FileOperationFailed.of(errno.EISDIR, "write", place.path)
        self._make_parents("write", place, dirname(place.full))
        self._files[place.full] = (data, time.time())

    async def list_folder(self, place: Place) -> list[str]:
        if place.full not in self._folders:
            code = errno.ENOTDIR if place.full in self._files else errno.ENOENT
            raise FileOperationFailed.of(code, "readdir", place.path)
        start = place.full.rstrip("/") + "/"
        below = (path[len(start) :] for path in (*self._files, *self._folders) if path.startswith(start))
        return [name for name in below if name and "/" not in name]

    async def make_folder(self, place: Place) -> None:
        self._make_parents("mkdir", place, place.full)

    async def stat_file(self, place: Place) -> FileStat:
        if place.full in self._folders:
            return FileStat(0, self._folders[place.full], 0o040755, is_dir=True)
        data, mtime = self._file("stat", place)
        return FileStat(len(data), mtime, 0o100644, is_dir=False)

    async def remove(self, place: Place, *, recursive: bool) -> None:
        if place.full not in self._folders:
            self._file("rm", place)
            del self._files[place.full]
            return
        if not recursive and await self.list_folder(place):
            raise FileOperationFailed.of(errno.ENOTEMPTY, "rm", place.path)
        for path in self._below(place.full):
            self._files.pop(path, None)
            self._folders.pop(path, None)

    async def move(self, source: Place, target: Place) -> None:
        if dirname(target.full) not in self._folders:
            raise FileOperationFailed.of(errno.ENOENT, "rename", target.path)
        if source.full not in self._folders:
            if target.full in self._folders:
                raise FileOperationFailed.of(errno.EISDIR, "rename", target.path)
            self._files[target.full] = self._file("rename", source)
            if target.full != source.full:
                del self._files[source.full]
            return
        if target.full in self._files or f"{target.full}/".startswith(f"{source.full}/"):
            raise FileOperationFailed.of(errno.EINVAL, "rename", source.path)
        if target.full in self._folders and await self.list_folder(target):
            raise FileOperationFailed.of(errno.ENOTEMPTY, "rename", target.path)
        for path in self._below(source.full):
            moved = target.full + path[len(source.full) :]
            if path in self._folders:
                self._folders[moved] = self._folders.pop(path)
            else:
                self._files[moved] = self._files.pop(path)

    async def touch_file(self, place: Place) -> None:
        if place.full in self._folders:
            self._folders[place.full] = time.time()
            return
        data, _ = self._files.get(place.full, (b"", 0.0))
        await self.write_file(place, data)

    def _below(self, folder: str) -> list[str]:
        return [path for path in (*self._folders, *self._files) if path == folder or path.startswith(folder + "/")]

    def _file(self, operation: str, place: Place) -> tuple[bytes, float]:
        try:
            return self._files[place.full]
        except KeyError:
            raise FileOperationFailed.of(errno.ENOENT, operation, place.path) from None

    def _make_parents(self, operation: str, place: Place, folder: str) -> None:
        missing = []
        while folder not in self._folders:
            if folder in self._files:
                raise FileOperationFailed.of(errno.ENOTDIR, operation, place.path)
            missing.append(folder)
            folder = dirname(folder)
        for path in reversed(missing):
            self._folders[path] = time.time()
