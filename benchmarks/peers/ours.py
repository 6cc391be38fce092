"""This project's SSH backend, in both of its ways to run commands."""

import asyncio
import inspect
from collections.abc import Sequence
from typing import Any, ClassVar, Self

from benchmarks.peers.base import Missing, Peer, Target, gathered
from pool import RemoteFilesystemBackend
from pool.runtime import loop_thread


def backend_config(target: Target, mode: str, **more: Any) -> dict[str, Any]:
    """Fields of a hosts file for *target*. Raises `Missing` for a mode that this version does not have."""
    config = {
        "host": "127.0.0.1",
        "port": target.port,
        "username": target.username,
        "client_keys": str(target.client_key),
        "known_hosts": str(target.known_hosts),
        "root_dir": target.folder,
        **more,
    }
    if "exec_mode" in inspect.signature(RemoteFilesystemBackend.__init__).parameters:
        config["exec_mode"] = mode
    elif mode != "channel":
        raise Missing("not in this version")
    return config


class Ours(Peer):
    name = "ours, helper"
    mode: ClassVar[str] = "helper"

    def connect(self) -> None:
        self.backend = RemoteFilesystemBackend(**backend_config(self.target, self.mode, max_output=1 << 20))
        loop_thread().run(self.backend.connect())

    def run(self, command: str) -> int:
        return self.backend.exec(command, check=False, encoding=None).exit_code

    def read(self, path: str) -> bytes:
        content: bytes = self.backend.read(self._inside(path), encoding=None)
        return content

    def write(self, path: str, data: bytes) -> None:
        self.backend.write(self._inside(path), data)

    def many(self, command: str, count: int) -> int:
        return loop_thread().run(self.amany(command, count))

    @classmethod
    def crowd(cls, peers: Sequence[Self], command: str, count: int) -> int:
        return loop_thread().run(gathered([peer.amany(command, count) for peer in peers]))

    async def amany(self, command: str, count: int) -> int:
        calls = [self.backend.aexec(command, check=False) for _ in range(count)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        return sum(isinstance(result, BaseException) or result.exit_code != 0 for result in results)

    def _inside(self, path: str) -> str:
        """Our paths are relative to the backend's root, which is the folder of this run."""
        return path.removeprefix(f"{self.target.folder}/")

    def close(self) -> None:
        if "backend" in vars(self):
            self.backend.destroy()


class OursOnChannels(Ours):
    name = "ours, channel"
    mode = "channel"
