"""Everything this package raises on purpose.

::

    PoolError
    |-- AcquireTimeout           waited too long for a backend; says in which phase
    |   `-- PoolExhausted        ... because the pool is full of busy backends
    |-- BackendUnavailable       could not connect, or the connection was lost (retry_after)
    |-- BackendClosed            the backend or its pool was closed
    |-- CommandFailed            the command exited with a non-zero code
    |-- CommandTimeout           the command ran into its timeout and was killed
    |-- CommandLost              nobody can tell how a durable command ended
    |-- TurnFailed               the agent refused the prompt, died or talked nonsense
    |   `-- TurnTimeout          the turn ran into its timeout and was cancelled
    |-- TaskCancelled            somebody had the task ended
    |-- FileOperationFailed      also an OSError, with errno and filename
    |   `-- FileMissing          also a FileNotFoundError
    |-- PathEscapeError          a path would leave its root
    |-- ConfigError              also a ValueError: a setting or an argument breaks a rule
    |-- InvalidKey               also a ValueError: not usable as a key
    `-- NotOwner                 this node does not own the key's shard

Celery stores an exception as its class and its ``args`` (JSON), so each error's ``args`` are exactly the arguments
of its constructor, plain JSON values, the message first.
"""

import errno as _errno
from collections.abc import Mapping
from typing import Any

__all__ = [
    "AcquireTimeout",
    "BackendClosed",
    "BackendUnavailable",
    "CommandFailed",
    "CommandLost",
    "CommandTimeout",
    "ConfigError",
    "FileMissing",
    "FileOperationFailed",
    "InvalidKey",
    "NotOwner",
    "PathEscapeError",
    "PoolError",
    "PoolExhausted",
    "TaskCancelled",
    "TurnFailed",
    "TurnTimeout",
]


class PoolError(Exception):
    """Base of every error of this package."""

    def __init__(self, message: str, *fields: Any) -> None:
        super().__init__(message, *fields)
        self.args = (message, *fields)

    def __str__(self) -> str:
        return str(self.args[0])

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self.args


class AcquireTimeout(PoolError):
    """No backend within ``acquire_timeout``.

    ``phase`` is what the caller was waiting for (``"connect"``, ``"turn"`` or ``"room"``), ``counts`` the pool's
    total, busy, idle and waiting at that moment.
    """

    def __init__(self, message: str, phase: str = "", counts: Mapping[str, int] | None = None) -> None:
        super().__init__(message, phase, dict(counts or {}))
        self.phase = phase
        self.counts = dict(counts or {})


class PoolExhausted(AcquireTimeout):
    """The pool holds ``max_backends``, and none of them became idle in time."""


class BackendUnavailable(PoolError):
    """The backend cannot be reached, or its connection was lost under way.

    ``retry_after``: seconds until another attempt makes sense, ``None`` when only a person can help (a changed host
    key, a wrong login). ``reason``: one of ``resolve refused unreachable timeout host_key login sessions lost
    setup store``; ``store``: the Redis that keeps the chats.
    """

    def __init__(self, message: str, reason: str = "lost", retry_after: float | None = None) -> None:
        super().__init__(message, reason, retry_after)
        self.reason = reason
        self.retry_after = retry_after


class BackendClosed(PoolError):
    """The backend, or the pool it belongs to, was closed."""


class CommandFailed(PoolError):
    """A command exited with a non-zero code and ``check`` was on.

    ``tail``: the end of stderr, or of stdout when stderr was empty.
    """

    def __init__(self, message: str, exit_code: int = -1, tail: str = "") -> None:
        super().__init__(message, exit_code, tail)
        self.exit_code = exit_code
        self.tail = tail


class CommandTimeout(PoolError):
    """A command ran longer than ``timeout`` seconds; its process group was killed."""

    def __init__(self, message: str, timeout: float = 0.0, tail: str = "") -> None:
        super().__init__(message, timeout, tail)
        self.timeout = timeout
        self.tail = tail


class CommandLost(PoolError):
    """A durable command's host was restarted, or its keeper killed: how it ended is unknown. It is not run again."""


class TurnFailed(PoolError):
    """An agent did not finish a turn. The chat goes on: the next turn finds the agent, or starts it anew.

    ``reason``: ``refused`` (it answered with an error), ``died``, ``garbage`` (it broke its protocol) or ``timeout``.
    ``tail``: the end of what it said on stderr, or of the turn's text.
    """

    def __init__(self, message: str, reason: str = "refused", tail: str = "") -> None:
        super().__init__(message, reason, tail)
        self.reason = reason
        self.tail = tail


class TurnTimeout(TurnFailed):
    """A turn ran longer than its timeout. It was cancelled; an agent that ignored that was ended.

    ``tail``: the end of the text that had come.
    """


class TaskCancelled(PoolError):
    """The task was cancelled while it ran (``pool_cancel``); the message says why. Its backend stays warm."""


class FileOperationFailed(PoolError, OSError):
    """A file operation failed on the backend; nothing was left half-written."""

    def __init__(self, message: str, errno: int = 0, filename: str = "") -> None:
        super().__init__(message, errno, filename)
        self.errno = errno
        self.filename = filename

    @classmethod
    def of(cls, errno: int, operation: str, path: str, detail: str = "") -> "FileOperationFailed":
        """Build the right class for *errno*, with a message that names the operation and the path."""
        kind = FileMissing if errno == _errno.ENOENT and issubclass(FileMissing, cls) else cls
        return kind(f"{operation} {path!r}: {detail or _strerror(errno)}", errno, path)


class FileMissing(FileOperationFailed, FileNotFoundError):
    """The file or folder does not exist."""


class PathEscapeError(PoolError):
    """A path would leave the backend's root, by ``..`` or through a symlink."""


class ConfigError(PoolError, ValueError):
    """A setting, a hosts file or an argument breaks a rule; the message names field, value, unit and rule."""


class InvalidKey(PoolError, ValueError):
    """Not usable as a key; the message says which rule it breaks."""


class NotOwner(PoolError):
    """The shard of the key is not owned by this node. ``epoch``: of the newer owner that a host knows of; else 0."""

    def __init__(self, message: str, epoch: int = 0) -> None:
        super().__init__(message, epoch)
        self.epoch = epoch


def _strerror(errno: int) -> str:
    import os

    return os.strerror(errno) if errno else "failed"
