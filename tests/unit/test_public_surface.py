"""What ``from pool import ...`` offers: exactly this."""

import importlib
from pathlib import Path

import pytest

import pool

SURFACE = """
    AcquireTimeout AgentBackend Backend BackendClosed BackendPoolManager BackendStatus BackendUnavailable
    Borrowed CHAT_LANE Capabilities ChatTurn Claim CommandFailed CommandLost CommandTimeout ConfigError ExecResult FileMissing
    FileOperationFailed FileStat GroupLimit InvalidKey LocalFilesystemBackend MemoryBackend NotOwner
    Observer PathEscapeError Piece PoolConfig PoolError PoolExhausted PoolStats PooledTask RemoteFilesystemBackend SHARED
    ScopedBackend Settings Step TaskCancelled Turn TurnFailed TurnTimeout afollow cancel_turn check_key check_prompt
    close_chat    close_idle_chats follow install
    sweep_shard
""".split()


def test_the_public_surface_is_this():
    """A name that comes or goes is a decision, made here too."""
    assert sorted(pool.__all__) == sorted(SURFACE)
    assert len(set(pool.__all__)) == len(pool.__all__)


@pytest.mark.parametrize("name", SURFACE)
def test_each_public_name_can_be_imported(name):
    """And has a docstring, unless it is a plain value."""
    value = getattr(importlib.import_module("pool"), name)
    assert isinstance(value, str) or value.__doc__


def test_lazy_names_are_public_names():
    """Nothing is reachable that is not listed."""
    assert set(pool._HOME) <= set(pool.__all__)


def test_an_unknown_name_raises_attribute_error():
    """As for any module."""
    with pytest.raises(AttributeError, match="has no attribute 'NoSuchThing'"):
        _ = pool.NoSuchThing


def test_the_package_says_that_it_is_typed():
    """Type checkers of users look for this file."""
    assert (Path(pool.__file__).parent / "py.typed").is_file()
