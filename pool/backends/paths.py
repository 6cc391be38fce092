"""Path rules, the same for every kind of backend.

A path is relative to the root. An absolute one is taken as relative, unless it is under the root already.
``..`` is resolved by its letters before anything touches a disk; what leaves the root raises `PathEscapeError`.
Symlinks are checked by the backends that have them, with `inside`.
"""

import os
import posixpath
from itertools import pairwise
from typing import Any

from pool.errors import ConfigError, PathEscapeError


def normalise(path: Any, root: str) -> str:
    """Return *path* relative to *root* (absolute, "/"-separated), ``"."`` for the root itself.

    Raises `PathEscapeError`, and `ConfigError` for what is no path at all.
    """
    try:
        text = os.fspath(path)
    except TypeError:
        raise ConfigError(f"path={path!r}: must be text or a path, not {type(path).__name__}") from None
    if isinstance(text, bytes):
        text = os.fsdecode(text)
    if "\x00" in text:
        raise ConfigError(f"path={text!r}: must not contain a NUL character")
    if not encodable(text):
        raise ConfigError(f"path={text!r}: must not contain a lone surrogate")
    if not text:
        raise ConfigError("path='': must not be empty; '.' is the root")
    if inside(posixpath.normpath(text), root):
        text = posixpath.relpath(text, root)
    relative = posixpath.normpath(text.lstrip("/") or ".")
    if relative == ".." or relative.startswith("../"):
        raise PathEscapeError(f"path {path!r} leaves the root {root!r}")
    return relative


def encodable(text: str) -> bool:
    """Whether *text* has a form in bytes: UTF-8, or what `os.fsdecode` makes of bytes that are none."""
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


def inside(path: str, root: str) -> bool:
    """Whether the absolute, normal *path* is *root* or below it."""
    return path == root or path.startswith(root.rstrip("/") + "/")


def refuse_outside(real: str, real_root: str, path: str) -> None:
    """Raise `PathEscapeError` unless *real*, the symlink-free form of *path*, is under *real_root*."""
    if not inside(real, real_root):
        raise PathEscapeError(f"path {path!r} leaves the root through a symlink, to {real!r}")


def refuse_nested(real_roots: list[str], path: str) -> str:
    """Return the last of *real_roots*; raise `PathEscapeError` unless each is inside the one before."""
    for outer, inner in pairwise(real_roots):
        refuse_outside(inner, outer, path)
    return real_roots[-1]
