"""File operations through the helper on a host: each is one request, which checks the path and does it."""

import stat as stat_bits
from typing import TYPE_CHECKING

from pool.backends.workspace import FileStat, Place

if TYPE_CHECKING:
    from pool.backends.helper import Helper


class HelperFiles:
    """The files of one connection."""

    def __init__(self, helper: "Helper") -> None:
        self._helper = helper

    async def read(self, place: Place) -> bytes:
        return (await self._helper.operate("read", place.path, *_path(place))).content

    async def write(self, place: Place, data: bytes) -> None:
        await self._helper.operate("write", place.path, *_path(place), content=data)

    async def names(self, place: Place) -> list[str]:
        found = (await self._helper.operate("readdir", place.path, *_path(place))).result
        return [_text(name) for name in found.split(b"\0")] if found else []

    async def mkdir(self, place: Place) -> None:
        await self._helper.operate("mkdir", place.path, *_path(place))

    async def stat(self, place: Place) -> FileStat:
        size, mtime, mode = (await self._helper.operate("stat", place.path, *_path(place))).result.split()
        return FileStat(int(size), float(mtime), int(mode), stat_bits.S_ISDIR(int(mode)))

    async def remove(self, place: Place, *, recursive: bool) -> None:
        await self._helper.operate("rm", place.path, b"%d" % recursive, *_path(place))

    async def move(self, source: Place, target: Place) -> None:
        paths = _path(source)
        await self._helper.operate("rename", source.path, b"%d" % len(paths), *paths, *_path(target))

    async def touch(self, place: Place) -> None:
        await self._helper.operate("touch", place.path, *_path(place))


def _path(place: Place) -> list[bytes]:
    """The path and its roots, as `pool.helper.files` takes them."""
    return [text.encode("utf-8", "surrogateescape") for text in (place.full, *place.outer, place.root)]


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
