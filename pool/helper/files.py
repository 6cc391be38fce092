"""File operations under path rules: for the helper on a host, and for this machine's own folders.

Paths are bytes. Each function takes the absolute path and the roots that it must be inside of, symlinks resolved, the
outermost first; it raises `Outside` when it is not, and `OSError`. Each call may block.
"""

import os
import stat as bits


class Outside(Exception):
    """A path leaves its root through a symlink; ``args[0]`` is where it leads to."""


def inside(path: bytes, root: bytes) -> bool:
    """Whether the absolute, normal *path* is *root* or below it."""
    return path == root or path.startswith(root.rstrip(b"/") + b"/")


def real(path: bytes, roots: "list[bytes]", follow: bool = True) -> bytes:
    """Return the path without symlinks; without *follow* the last part stays as it is, symlink or not."""
    outer = None
    for root in roots:
        inner = os.path.realpath(root)
        if outer is not None and not inside(inner, outer):
            raise Outside(inner)
        outer = inner
    if follow or path == roots[-1]:
        found = os.path.realpath(path)
    else:
        folder, name = os.path.split(path)
        found = os.path.join(os.path.realpath(folder), name)
    if outer is not None and not inside(found, outer):
        raise Outside(found)
    return found


def begin_read(path: bytes, roots: "list[bytes]") -> int:
    """Open the file; return its descriptor."""
    return os.open(real(path, roots), os.O_RDONLY | os.O_NONBLOCK)  # what is a pipe has no end to wait for


class Replacement:
    """A file that is written beside the one it replaces, and renamed over it by `commit`."""

    def __init__(self, path: bytes, roots: "list[bytes]") -> None:
        self.path = real(path, roots)
        folder, name = os.path.split(self.path)
        os.makedirs(folder, exist_ok=True)
        if os.path.isdir(self.path):
            raise IsADirectoryError(21, os.strerror(21))
        self._beside = os.path.join(folder, b".%s.%s" % (name[:100], os.urandom(6).hex().encode()))
        self._file = os.open(self._beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)

    def write(self, data: bytes) -> None:
        """Add *data*."""
        view = memoryview(data)
        while view:
            view = view[os.write(self._file, view) :]

    def commit(self) -> None:
        """Make it the file, with the mode of the one it replaces."""
        os.close(self._file)
        self._file = -1
        os.chmod(self._beside, _mode_for(self.path))
        os.replace(self._beside, self.path)
        self._beside = b""

    def end(self) -> None:
        """Leave nothing behind, if it was not committed."""
        if self._file >= 0:
            os.close(self._file)
        if self._beside:
            os.unlink(self._beside)


def _mode_for(path: bytes) -> int:
    """Return the mode of the file that is replaced, or the ordinary one for a new file."""
    try:
        return bits.S_IMODE(os.stat(path).st_mode)
    except FileNotFoundError:
        return 0o666 & ~_UMASK


def _read_umask() -> int:
    umask = os.umask(0o022)
    os.umask(umask)
    return umask


_UMASK = _read_umask()  # once, at import: reading it changes it for a moment


def names(path: bytes, roots: "list[bytes]") -> "list[bytes]":
    """Return the names in a folder."""
    return os.listdir(real(path, roots))


def make_folder(path: bytes, roots: "list[bytes]") -> None:
    """Make a folder and its parents; one that exists is fine."""
    os.makedirs(real(path, roots), exist_ok=True)


def stat(path: bytes, roots: "list[bytes]") -> os.stat_result:
    """Describe what is there, following symlinks inside the root."""
    return os.stat(real(path, roots))


def remove(path: bytes, roots: "list[bytes]", recursive: bool) -> None:
    """Remove a file, an empty folder, or (*recursive*) any folder. A symlink is removed, never its target."""
    found = real(path, roots, follow=False)
    if os.path.islink(found) or not os.path.isdir(found):
        os.unlink(found)
    elif recursive:
        import shutil

        shutil.rmtree(found)
    else:
        os.rmdir(found)


def move(path: bytes, roots: "list[bytes]", target: bytes, target_roots: "list[bytes]") -> None:
    """Rename; an existing target file is replaced."""
    found = real(path, roots, follow=False)
    os.replace(found, real(target, target_roots, follow=False))


def touch(path: bytes, roots: "list[bytes]") -> None:
    """Make an empty file, or set the time of an existing one to now."""
    found = real(path, roots)
    try:
        os.utime(found)
    except FileNotFoundError:
        os.makedirs(os.path.dirname(found), exist_ok=True)
        os.close(os.open(found, os.O_WRONLY | os.O_CREAT, 0o666))
