"""Terminals that an agent asks its client for: commands in its folder, whose output it reads as they run."""

import asyncio
import contextlib
import shlex
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

from pool.backends.scoped import ScopedBackend
from pool.errors import ConfigError, PoolError

MAX_TERMINALS = 32
"""Terminals of one agent at a time."""
MAX_OUTPUT = 1 << 20
"""Bytes of output that are kept, the last ones, unless the agent asks for less."""


class Terminal:
    """One command."""

    def __init__(
        self, folder: ScopedBackend, command: str, cwd: str | None, env: Mapping[str, str], limit: int
    ) -> None:
        self._limit = limit
        self._output = b""
        self.truncated = False
        self.exit_code: int | None = None
        self._running = asyncio.create_task(self._run(folder, command, cwd, env))

    async def _run(self, folder: ScopedBackend, command: str, cwd: str | None, env: Mapping[str, str]) -> None:
        try:
            result = await folder.aexec(command, cwd, env, check=False, on_output=self._take, encoding=None)
            self.exit_code = result.exit_code
        except PoolError as error:
            self._take(f"{error}\n".encode(), "stderr")
            self.exit_code = 255

    def _take(self, data: Any, stream: Any) -> None:  # noqa: ARG002 - a terminal has one
        self._output += data
        if len(self._output) > self._limit:
            self.truncated = True
            self._output = self._output[-self._limit :]

    @property
    def output(self) -> str:
        """The end of what it has written so far; a character that was cut is left out."""
        return self._output.decode("utf-8", "ignore" if self.truncated else "replace")

    @property
    def ended(self) -> bool:
        """Whether the command has ended."""
        return self._running.done()

    async def wait(self) -> None:
        """Wait for its end."""
        await asyncio.wait({self._running})

    async def kill(self) -> None:
        """End it with all that it started; its output stays."""
        self._running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._running
        if self.exit_code is None:
            self.exit_code = 137


class Terminals:
    """The terminals of one agent, by id."""

    def __init__(self) -> None:
        self._terminals: dict[str, Terminal] = {}
        self._ids = count(1)

    def create(
        self,
        folder: ScopedBackend,
        command: Sequence[str],
        cwd: str | None,
        env: Mapping[str, str],
        limit: int | None,
    ) -> str:
        """Start *command* in *cwd*, a path under *folder*; returns its id. Raises `ConfigError` for one too many."""
        if len(self._terminals) >= MAX_TERMINALS:
            raise ConfigError(f"{MAX_TERMINALS} terminals are open: release one first")
        line = command[0] if len(command) == 1 else shlex.join(command)  # alone, it may be a whole shell line
        terminal_id = f"terminal-{next(self._ids)}"
        self._terminals[terminal_id] = Terminal(folder, line, cwd, env, min(limit or MAX_OUTPUT, MAX_OUTPUT))
        return terminal_id

    def find(self, terminal_id: str) -> Terminal:
        """Raises `ConfigError` for an id that is none."""
        if terminal_id not in self._terminals:
            raise ConfigError(f"there is no terminal {terminal_id!r}")
        return self._terminals[terminal_id]

    async def release(self, terminal_id: str) -> None:
        """End the command, and forget it."""
        await self.find(terminal_id).kill()
        self._terminals.pop(terminal_id, None)

    async def close(self) -> None:
        """Release all."""
        await asyncio.gather(*(self.release(terminal_id) for terminal_id in list(self._terminals)))
