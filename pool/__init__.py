"""Keyed pools of warm backends inside Celery workers.

The names below are the public surface. They are imported on first use: the pool itself needs neither Celery nor Redis.
"""

import importlib
from typing import TYPE_CHECKING, Any

from pool.errors import (
    AcquireTimeout,
    BackendClosed,
    BackendUnavailable,
    CommandFailed,
    CommandLost,
    CommandTimeout,
    ConfigError,
    FileMissing,
    FileOperationFailed,
    InvalidKey,
    NotOwner,
    PathEscapeError,
    PoolError,
    PoolExhausted,
    TaskCancelled,
    TurnFailed,
    TurnTimeout,
)

if TYPE_CHECKING:
    from pool.backends.agent import AgentBackend, check_prompt
    from pool.backends.base import Backend, BackendStatus, Capabilities, Claim
    from pool.backends.local import LocalFilesystemBackend
    from pool.backends.memory import MemoryBackend
    from pool.backends.output import ExecResult
    from pool.backends.scoped import ScopedBackend
    from pool.backends.ssh import RemoteFilesystemBackend
    from pool.backends.turn import Turn
    from pool.backends.workspace import FileStat
    from pool.borrowing import Borrowed
    from pool.config import GroupLimit, PoolConfig, Settings
    from pool.keys import SHARED, check_key
    from pool.live.follow import Piece, afollow, follow
    from pool.manager import BackendPoolManager
    from pool.observer import Observer, Step
    from pool.stats import PoolStats
    from pool.worker.chats import ChatTurn
    from pool.worker.install import install
    from pool.worker.maintenance import CHAT_LANE, cancel_turn, close_chat, close_idle_chats, sweep_shard
    from pool.worker.task import PooledTask

__all__ = [
    "CHAT_LANE",
    "SHARED",
    "AcquireTimeout",
    "AgentBackend",
    "Backend",
    "BackendClosed",
    "BackendPoolManager",
    "BackendStatus",
    "BackendUnavailable",
    "Borrowed",
    "Capabilities",
    "ChatTurn",
    "Claim",
    "CommandFailed",
    "CommandLost",
    "CommandTimeout",
    "ConfigError",
    "ExecResult",
    "FileMissing",
    "FileOperationFailed",
    "FileStat",
    "GroupLimit",
    "InvalidKey",
    "LocalFilesystemBackend",
    "MemoryBackend",
    "NotOwner",
    "Observer",
    "PathEscapeError",
    "Piece",
    "PoolConfig",
    "PoolError",
    "PoolExhausted",
    "PoolStats",
    "PooledTask",
    "RemoteFilesystemBackend",
    "ScopedBackend",
    "Settings",
    "Step",
    "TaskCancelled",
    "Turn",
    "TurnFailed",
    "TurnTimeout",
    "afollow",
    "cancel_turn",
    "check_key",
    "check_prompt",
    "close_chat",
    "close_idle_chats",
    "follow",
    "install",
    "sweep_shard",
]

_HOME = {
    "CHAT_LANE": "worker.maintenance",
    "SHARED": "keys",
    "AgentBackend": "backends.agent",
    "Backend": "backends.base",
    "BackendPoolManager": "manager",
    "BackendStatus": "backends.base",
    "Borrowed": "borrowing",
    "Capabilities": "backends.base",
    "ChatTurn": "worker.chats",
    "Claim": "backends.base",
    "ExecResult": "backends.output",
    "FileStat": "backends.workspace",
    "GroupLimit": "config",
    "LocalFilesystemBackend": "backends.local",
    "MemoryBackend": "backends.memory",
    "Observer": "observer",
    "Piece": "live.follow",
    "PoolConfig": "config",
    "PoolStats": "stats",
    "PooledTask": "worker.task",
    "RemoteFilesystemBackend": "backends.ssh",
    "ScopedBackend": "backends.scoped",
    "Settings": "config",
    "Step": "observer",
    "Turn": "backends.turn",
    "afollow": "live.follow",
    "cancel_turn": "worker.maintenance",
    "check_key": "keys",
    "check_prompt": "backends.agent",
    "close_chat": "worker.maintenance",
    "close_idle_chats": "worker.maintenance",
    "follow": "live.follow",
    "install": "worker.install",
    "sweep_shard": "worker.maintenance",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pool' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"pool.{_HOME[name]}"), name)
    globals()[name] = value
    return value
