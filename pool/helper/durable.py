"""Commands that outlive the connection: each has a folder with its output, and a keeper, a process of its own.

The folder is ``ROOT/.pool/durable/NAME``, for the user alone. In it: ``keeper`` (who keeps the command, and which one
that is; written once, under ``lock``), numbered segments of output, and in the end ``ended``, or ``refused`` when it
could not be started. Whoever asks for NAME follows what is in the folder, from the first byte (`pool.helper.follower`);
the first one also starts the command (`pool.helper.keeper`). A folder is removed a day after the end of its command.
"""

import os
import struct
import time

from pool.helper import family

FOLDER = b".pool/durable"
KEEP = 86400.0
"""Seconds for which the output and the end of a command are kept after it."""
SEGMENTS = 8
"""Segments of output that are kept: half of them the first, half the last."""
POSITION = struct.Struct(">QQ")
"""At the start of a segment: the bytes of stdout and of stderr before it."""
RECORD = struct.Struct(">BI")
"""Before each piece of output: kind, length."""


class Request:
    """What a DURABLE asks for."""

    def __init__(self, payload: bytes) -> None:
        self.name, self.digest, limit, timeout, self.command = payload.split(b"\0", 4)
        self.limit = int(limit)
        self.timeout = float(timeout) or None
        self.root = self.command.split(b"\0", 3)[2]


def boot() -> bytes:
    """Return what tells this boot of the machine from others."""
    try:
        with open("/proc/sys/kernel/random/boot_id", "rb") as file:
            return file.read().strip()
    except OSError:
        return b"-"


def open_folder(request: Request) -> int:
    """Open the folder, made if it is missing."""
    return open_below(request.root, FOLDER, request.name)


def open_below(root: bytes, *folders: bytes) -> int:
    """Open a private folder below a root, made if it is missing; a root that is gone is not made again."""
    path = root
    for name in b"/".join(folders).split(b"/"):
        path = os.path.join(path, name)
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            pass
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)


def read(folder: int, name: bytes) -> "bytes | None":
    """Return a small file; None: there is none."""
    try:
        file = os.open(name, os.O_RDONLY, dir_fd=folder)
    except FileNotFoundError:
        return None
    try:
        return os.read(file, 1 << 16)
    finally:
        os.close(file)


def write(folder: int, name: bytes, text: bytes) -> None:
    """Write a small file: it is there as a whole, or not at all."""
    beside = name + b".new"
    file = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600, dir_fd=folder)
    try:
        os.write(file, text)
    finally:
        os.close(file)
    os.rename(beside, name, src_dir_fd=folder, dst_dir_fd=folder)


def segment(number: int) -> bytes:
    """Return the name of a segment."""
    return b"%08d.out" % number


class KeptBy:
    """Who keeps a command, as the folder tells."""

    def __init__(self, text: bytes) -> None:
        pid, start, self.boot, self.digest = text.split()
        self.pid, self.start = int(pid), int(start)

    def lives(self) -> bool:
        """Whether it is still there."""
        if self.boot != boot():
            return False
        found = family.look(self.pid)
        if found is not None:
            return found.start == self.start and found.state not in (b"Z", b"X")
        if os.path.isdir(family.PROC + "/self"):
            return False
        try:
            os.kill(self.pid, 0)
        except OSError:
            return False
        return True


def keepers(root: bytes) -> "list[int]":
    """Return the keepers that live, of all commands in a root."""
    path = os.path.join(root, FOLDER)
    try:
        names = os.listdir(path)
    except OSError:
        return []
    found = [_keeper(os.path.join(path, name)) for name in names]
    return [keeper.pid for keeper in found if keeper is not None and keeper.lives()]


def clean(path: bytes) -> None:
    """Remove the folders of commands that ended long ago, or were lost with their keeper."""
    try:
        names = os.listdir(path)
    except OSError:
        return
    for name in names:
        folder = os.path.join(path, name)
        try:
            if time.time() - max(os.stat(folder).st_mtime, _ended_at(folder)) > KEEP and not _kept(folder):
                for file in os.listdir(folder):
                    os.unlink(os.path.join(folder, file))
                os.rmdir(folder)
        except OSError:
            pass


def _ended_at(folder: bytes) -> float:
    try:
        return os.stat(os.path.join(folder, b"ended")).st_mtime
    except OSError:
        return 0.0


def _keeper(folder: bytes) -> "KeptBy | None":
    try:
        with open(os.path.join(folder, b"keeper"), "rb") as file:
            return KeptBy(file.read())
    except (OSError, ValueError):
        return None


def _kept(folder: bytes) -> bool:
    """Whether its keeper lives."""
    keeper = _keeper(folder)
    return keeper is not None and keeper.lives()
