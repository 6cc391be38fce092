"""asyncssh as it comes, and the two floors: a shell on one of its channels that reads commands line by line."""

import asyncio
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import asyncssh

from benchmarks.peers.base import Peer, Target, gathered
from pool.runtime import loop_thread

MAX_CHANNELS = 10
"""Commands at a time: the default of OpenSSH's MaxSessions."""


def options_for(target: Target) -> dict[str, Any]:
    """What asyncssh needs to log in."""
    return {
        "host": "127.0.0.1",
        "port": target.port,
        "username": target.username,
        "known_hosts": str(target.known_hosts),
        "client_keys": [str(target.client_key)],
        "config": None,
        "agent_path": None,
    }


async def connected(target: Target) -> asyncssh.SSHClientConnection:
    return await asyncssh.connect(**options_for(target))


class Asyncssh(Peer):
    """Called through the pool's own event loop thread, so the way there and back costs the same as ours."""

    name = "asyncssh"

    def connect(self) -> None:
        self.connection = loop_thread().run(connected(self.target))
        self.sftp: asyncssh.SFTPClient | None = None

    def run(self, command: str) -> int:
        return loop_thread().run(self.arun(command))

    async def arun(self, command: str) -> int:
        code = (await self.connection.run(command, encoding=None)).exit_status
        return -1 if code is None else code

    def read(self, path: str) -> bytes:
        return loop_thread().run(self._read(path))

    async def _read(self, path: str) -> bytes:
        async with (await self._files()).open(path, "rb") as file:
            content: bytes = await file.read()
            return content

    def write(self, path: str, data: bytes) -> None:
        loop_thread().run(self._write(path, data))

    async def _write(self, path: str, data: bytes) -> None:
        async with (await self._files()).open(path, "wb") as file:
            await file.write(data)

    async def _files(self) -> asyncssh.SFTPClient:
        if self.sftp is None:
            self.sftp = await self.connection.start_sftp_client()
        return self.sftp

    def many(self, command: str, count: int) -> int:
        return loop_thread().run(self.amany(command, count))

    @classmethod
    def crowd(cls, peers: Sequence[Self], command: str, count: int) -> int:
        return loop_thread().run(gathered([peer.amany(command, count) for peer in peers]))

    async def amany(self, command: str, count: int) -> int:
        slots = asyncio.Semaphore(MAX_CHANNELS)

        async def one() -> int:
            async with slots:
                return await self.arun(command)

        results = await asyncio.gather(*(one() for _ in range(count)), return_exceptions=True)
        return sum(result != 0 for result in results)

    def close(self) -> None:
        if "connection" in vars(self):
            loop_thread().run(self._close())

    async def _close(self) -> None:
        self.connection.close()
        await self.connection.wait_closed()


class ForkingShell(Peer):
    """The floor: the command is read by a shell that is there already, and costs one fork."""

    name = "floor: shell loop, forks"
    loop: ClassVar[str] = 'while read -r line; do (eval "$line") </dev/null; echo $?; done'

    def connect(self) -> None:
        self.shell = loop_thread().run(self._connect())

    async def _connect(self) -> asyncssh.SSHClientProcess[bytes]:
        self.connection = await connected(self.target)
        return await self.connection.create_process(self.loop, encoding=None)

    def run(self, command: str) -> int:
        return loop_thread().run(self._run(command))

    async def _run(self, command: str) -> int:
        self.shell.stdin.write(command.encode() + b"\n")
        return int(await self.shell.stdout.readline())

    def close(self) -> None:
        if "connection" in vars(self):
            loop_thread().run(self._close())

    async def _close(self) -> None:
        self.connection.close()
        await self.connection.wait_closed()


class StartingShell(ForkingShell):
    """The same, but each command has a ``/bin/sh`` of its own, which is what any of the peers gives it."""

    name = "floor: shell loop, starts sh"
    loop = 'while read -r line; do /bin/sh -c "$line" </dev/null; echo $?; done'
