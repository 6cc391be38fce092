"""What else runs commands and files over SSH, each behind the same few calls, for tables that compare.

A peer that is not installed, or cannot do something, becomes a row that says so: `Missing`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from benchmarks.harness import console
from benchmarks.peers.agent_backends import AgentBackendNode, AgentBackendPython
from benchmarks.peers.base import Missing, Peer, Target, target_of
from benchmarks.peers.libraries import ControlMaster, Mitogen, ParallelSsh, Paramiko
from benchmarks.peers.on_asyncssh import Asyncssh, ForkingShell, StartingShell
from benchmarks.peers.ours import Ours, OursOnChannels

__all__ = ["ALL", "FLOORS", "Missing", "Peer", "Target", "opened", "target_of"]

ALL: tuple[type[Peer], ...] = (
    Ours,
    OursOnChannels,
    Asyncssh,
    Paramiko,
    ControlMaster,
    Mitogen,
    ParallelSsh,
    AgentBackendPython,
    AgentBackendNode,
)
"""Ours first, in both modes."""

FLOORS: tuple[type[Peer], ...] = (ForkingShell, StartingShell)
"""No peers that anyone would use: what the cheapest way to run a command on an open connection costs."""


@contextmanager
def opened(
    kinds: Sequence[type[Peer]], target: Target, missing: Callable[[str, str], None]
) -> Iterator[dict[str, Peer]]:
    """Connect one of each kind and run a first command; yield those that could, by name.

    *missing* is called with the name of each that could not, and with the reason.
    """
    peers: dict[str, Peer] = {}
    try:
        for kind in kinds:
            peer = None
            try:
                peer = kind(target)
                peer.connect()
                if peer.run("true") != 0:
                    raise Missing("`true` failed")  # noqa: TRY301
                peers[kind.name] = peer
            except Missing as why:
                missing(kind.name, str(why))
                _close(peer)
            except Exception as error:
                missing(kind.name, f"failed: {type(error).__name__}: {str(error)[:100]}")
                _close(peer)
        yield peers
    finally:
        for peer in peers.values():
            _close(peer)


def _close(peer: Peer | None) -> None:
    try:
        if peer is not None:
            peer.close()
    except Exception as error:
        console.print(f"{peer.name if peer else ''}: closing failed: {error}", style="dim")
