"""The few calls that every peer has, and where it connects to."""

import asyncio
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar, Self


class Missing(Exception):
    """A peer is not installed, or has no such call; the text says which."""


@dataclass(frozen=True)
class Target:
    """An account on a server. ``folder``: of this run, relative to the account's home."""

    port: int
    username: str
    client_key: Path
    known_hosts: Path
    home: Path
    folder: str
    way: Callable[[int], int] = field(default=lambda port: port)

    def through(self, way: Callable[[int], int], folder: Path) -> "Target":
        """The same server by way of a proxy: *way* opens one to a port and returns the proxy's.

        *folder* gets a file of known hosts that names the proxy. A peer that has a server of its own asks `way` too.
        """
        port = way(self.port)
        host_key = self.known_hosts.read_text().split(" ", 1)[1]
        known = folder / f"known_hosts-{port}"
        known.write_text(f"[127.0.0.1]:{port} {host_key}")
        return replace(self, port=port, known_hosts=known, way=way)

    @property
    def path(self) -> Path:
        """The absolute path of `folder`, which a server on this machine shares with us."""
        return self.home / self.folder


def target_of(info: Any, folder: str) -> Target:
    """The account of a `LoopbackSshd` or an `OpenSshd`, and *folder* in its home, which is made."""
    target = Target(info.port, info.username, info.client_key, info.known_hosts, info.home, folder)
    target.path.mkdir(exist_ok=True)
    if os.geteuid() == 0:
        account = target.home.stat()
        os.chown(target.path, account.st_uid, account.st_gid)
    return target


class Peer(ABC):
    """One connection. Every call blocks, as it does for the code of a Celery task, in a thread without a loop."""

    name: ClassVar[str]
    serial: ClassVar[bool] = False
    """Whether `many` runs one command after the other."""

    def __init__(self, target: Target) -> None:
        self.target = target

    @abstractmethod
    def connect(self) -> None:
        """Log in. Raises `Missing`."""

    @abstractmethod
    def run(self, command: str) -> int:
        """Run it, take its output whole, return its exit code."""

    def read(self, path: str) -> bytes:  # noqa: ARG002
        """Return the file; *path* is relative to the account's home."""
        raise Missing("has no files")

    def write(self, path: str, data: bytes) -> None:  # noqa: ARG002
        """Write the file."""
        raise Missing("has no files")

    def many(self, command: str, count: int) -> int:  # noqa: ARG002
        """Run it *count* times at once, as well as one connection can; return how many failed."""
        raise Missing("runs one command at a time")

    @classmethod
    def crowd(cls, peers: Sequence[Self], command: str, count: int) -> int:
        """`many` on several connections at once, *count* times on each; return how many failed of all."""
        with ThreadPoolExecutor(len(peers)) as threads:
            return sum(threads.map(lambda peer: peer.many(command, count), peers))

    @abstractmethod
    def close(self) -> None:
        """Log out; also after a `connect` that failed."""

    # -- in ms. A peer in a process of its own looks at its own clock instead.

    def time_run(self, command: str) -> float:
        return timed(lambda: self._checked(command))

    def time_read(self, path: str) -> float:
        return timed(lambda: self.read(path))

    def time_write(self, path: str, data: bytes) -> float:
        return timed(lambda: self.write(path, data))

    def _checked(self, command: str) -> None:
        code = self.run(command)
        assert code == 0, f"{self.name}: {command}: exit code {code}"


def threaded(run: Callable[[str], int], command: str, count: int, threads: int) -> int:
    """Call *run* in so many threads; return how many failed."""

    def failed(_: int) -> bool:
        try:
            return run(command) != 0
        except Exception:
            return True

    with ThreadPoolExecutor(threads) as executor:
        return sum(executor.map(failed, range(count)))


async def gathered(calls: Sequence[Coroutine[Any, Any, int]]) -> int:
    """The sum of what the coroutines return."""
    return sum(await asyncio.gather(*calls))


def timed(call: Callable[[], object]) -> float:
    """What *call* takes, in ms."""
    started = perf_counter()
    call()
    return 1e3 * (perf_counter() - started)
