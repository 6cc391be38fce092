"""File operations of the SSH backend: one SFTP channel, opened on first use."""

import asyncio
import errno
import posixpath
import secrets
import stat as stat_bits
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

import asyncssh
from asyncssh import constants

from pool.backends.paths import inside, refuse_nested, refuse_outside
from pool.backends.workspace import FileStat, Place
from pool.errors import FileOperationFailed

if TYPE_CHECKING:
    from pool.backends.ssh import RemoteFilesystemBackend

T = TypeVar("T")

_ERRNO = {
    constants.FX_NO_SUCH_FILE: errno.ENOENT,
    constants.FX_PERMISSION_DENIED: errno.EACCES,
    constants.FX_FAILURE: errno.EIO,
    constants.FX_OP_UNSUPPORTED: errno.ENOTSUP,
    constants.FX_NO_SPACE_ON_FILESYSTEM: errno.ENOSPC,
    constants.FX_QUOTA_EXCEEDED: errno.EDQUOT,
}


class RemoteFiles:
    """The files of one connection."""

    def __init__(self, backend: "RemoteFilesystemBackend") -> None:
        self._backend = backend
        self._client: asyncssh.SFTPClient | None = None
        self._starting = asyncio.Lock()

    async def read(self, place: Place) -> bytes:
        async def read(sftp: asyncssh.SFTPClient, real: str) -> bytes:
            async with sftp.open(real, "rb", encoding=None) as file:
                data: bytes = await file.read()
                return data

        return await self._do("read", place, read)

    async def write(self, place: Place, data: bytes) -> None:
        """Write beside the file, then rename over it, so that nobody sees a part."""

        async def write(sftp: asyncssh.SFTPClient, real: str) -> None:
            folder, name = posixpath.split(real)
            temporary = posixpath.join(folder, f".{name[:100]}.{secrets.token_hex(6)}")
            mode = await _mode(sftp, real)
            try:
                await _write_new(sftp, temporary, data)
            except asyncssh.SFTPNoSuchFile:
                await sftp.makedirs(folder, exist_ok=True)
                await _write_new(sftp, temporary, data)
            try:
                if mode is not None:
                    await sftp.chmod(temporary, mode)
                await sftp.posix_rename(temporary, real)
            except BaseException:
                await _discard(sftp, temporary)
                raise

        await self._do("write", place, write)

    async def names(self, place: Place) -> list[str]:
        async def names(sftp: asyncssh.SFTPClient, real: str) -> list[str]:
            return [str(name) for name in await sftp.listdir(real) if name not in (".", "..")]

        return await self._do("readdir", place, names)

    async def mkdir(self, place: Place) -> None:
        await self._do("mkdir", place, lambda sftp, real: sftp.makedirs(real, exist_ok=True))

    async def stat(self, place: Place) -> FileStat:
        async def describe(sftp: asyncssh.SFTPClient, real: str) -> FileStat:
            found = await sftp.stat(real)
            mode = found.permissions or 0
            return FileStat(found.size or 0, float(found.mtime or 0), mode, stat_bits.S_ISDIR(mode))

        return await self._do("stat", place, describe)

    async def remove(self, place: Place, *, recursive: bool) -> None:
        async def remove(sftp: asyncssh.SFTPClient, real: str) -> None:
            mode = (await sftp.lstat(real)).permissions or 0
            if not stat_bits.S_ISDIR(mode):
                await sftp.remove(real)
            elif recursive:
                await _remove_tree(sftp, real)
            else:
                await sftp.rmdir(real)

        await self._do("rm", place, remove, follow=False)

    async def move(self, source: Place, target: Place) -> None:
        async def move(sftp: asyncssh.SFTPClient, real: str) -> None:
            await sftp.posix_rename(real, await _real(sftp, target, follow=False))

        await self._do("rename", source, move, follow=False)

    async def touch(self, place: Place) -> None:
        async def touch(sftp: asyncssh.SFTPClient, real: str) -> None:
            try:
                await sftp.utime(real)
            except asyncssh.SFTPNoSuchFile:
                await sftp.makedirs(posixpath.dirname(real), exist_ok=True)
                async with sftp.open(real, "ab"):
                    pass

        await self._do("touch", place, touch)

    async def _do(
        self,
        operation: str,
        place: Place,
        work: Callable[[asyncssh.SFTPClient, str], Awaitable[T]],
        *,
        follow: bool = True,
    ) -> T:
        """Call *work* with the symlink-free path; map what asyncssh raises."""
        sftp: asyncssh.SFTPClient | None = None
        try:
            sftp = await self._sftp()
            real = await _real(sftp, place, follow=follow)
            return await work(sftp, real)
        except asyncssh.SFTPError as error:
            if error.code in (constants.FX_CONNECTION_LOST, constants.FX_NO_CONNECTION):
                self._forget(sftp)
                raise self._backend.lost_error(error) from error
            code = _ERRNO.get(error.code, errno.EIO)
            detail = "" if code in (errno.ENOENT, errno.EACCES) else await self._explain(error, place)
            raise FileOperationFailed.of(code, operation, place.path, detail) from error
        except asyncssh.Error as error:
            raise self._backend.lost_error(error) from error

    async def _explain(self, error: asyncssh.SFTPError, place: Place) -> str:
        """SFTP says "Failure" to most things; ask whether the disk is full."""
        detail = error.reason or "the server gives no reason"
        try:
            assert self._client is not None
            room = await self._client.statvfs(place.root)
        except (asyncssh.Error, AssertionError):
            return detail
        if room.bavail == 0:
            return f"{detail}: no space left on the host's disk"
        return detail

    async def _sftp(self) -> asyncssh.SFTPClient:
        """Return the SFTP client; it holds one channel for as long as the connection lives."""
        async with self._starting:
            if self._client is None:
                connection = await self._backend.live_connection()
                if (files := self._backend.sftp_files) is not self:  # a new connection was made: its files are others
                    return await files._sftp()
                self._client = await self._backend.channels.granted(
                    connection,
                    lambda: connection.start_sftp_client(path_errors="surrogateescape"),
                    lasting=True,  # as long as the connection
                )
            return self._client

    def _forget(self, sftp: asyncssh.SFTPClient | None) -> None:
        """Let the next operation open a new channel: this one ended, though the connection may live."""
        if sftp is not None and sftp is self._client and self._backend._files is self:
            self._client = None
            self._backend.channels.closed(lasting=True)


async def _real(sftp: asyncssh.SFTPClient, place: Place, *, follow: bool = True) -> str:
    """Return the symlink-free path, which may not exist yet, if it is inside its root.

    Without *follow* the last part stays as it is, symlink or not.
    """
    if follow or place.path == ".":
        real = await _resolve(sftp, place.full)
    else:
        folder, name = posixpath.split(place.full)
        real = posixpath.join(await _resolve(sftp, folder), name)
    if not inside(real, place.root):  # the root of a scope may be reached by a symlink itself
        roots = [await _resolve(sftp, root) for root in (*place.outer, place.root)]
        refuse_outside(real, refuse_nested(roots, place.path), place.path)
    return real


async def _resolve(sftp: asyncssh.SFTPClient, path: str) -> str:
    """realpath, also of a path whose last parts do not exist."""
    missing: list[str] = []
    while True:
        try:
            real = str(await sftp.realpath(path))
        except asyncssh.SFTPError as error:
            if error.code not in (constants.FX_NO_SUCH_FILE, constants.FX_NO_SUCH_PATH) or path == "/":
                raise
            path, name = posixpath.split(path)
            missing.append(name)
        else:
            return posixpath.join(real, *reversed(missing))


async def _remove_tree(sftp: asyncssh.SFTPClient, folder: str) -> None:
    """Like asyncssh's `rmtree`, which refuses names with a backslash."""
    for entry in await sftp.readdir(folder):
        name = str(entry.filename)
        if name in (".", ".."):
            continue
        path = posixpath.join(folder, name)
        if stat_bits.S_ISDIR((await sftp.lstat(path)).permissions or 0):
            await _remove_tree(sftp, path)
        else:
            await sftp.remove(path)
    await sftp.rmdir(folder)


async def _mode(sftp: asyncssh.SFTPClient, path: str) -> int | None:
    """Return the mode of an existing file, None for a new one; refuse a folder."""
    try:
        mode = (await sftp.stat(path)).permissions or 0
    except asyncssh.SFTPNoSuchFile:
        return None
    if stat_bits.S_ISDIR(mode):
        raise asyncssh.SFTPFailure("it is a folder")
    return stat_bits.S_IMODE(mode)


async def _write_new(sftp: asyncssh.SFTPClient, path: str, data: bytes) -> None:
    """Write a new file; it is gone again when that fails."""
    try:
        async with sftp.open(path, "wb", encoding=None) as file:
            await file.write(data)
    except asyncssh.SFTPNoSuchFile:
        raise
    except BaseException:
        await _discard(sftp, path)
        raise


async def _discard(sftp: asyncssh.SFTPClient, path: str) -> None:
    try:
        await asyncio.shield(sftp.remove(path))
    except asyncssh.Error:
        return
