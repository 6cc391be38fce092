"""Where an agent works: a folder of the worker's machine, or of the chat's build host over its warm connection."""

import os
from typing import Any

from pool.backends.local import LocalFilesystemBackend
from pool.backends.scoped import ScopedBackend
from pool.backends.workspace import WorkspaceBackend
from pool.backends.worktree import Worktree
from pool.borrowing import Borrowed
from pool.errors import BackendUnavailable, ConfigError

PLACES = ("worker", "host")


class Site:
    """The folder that the agent of *chat* works in, once `open` has returned.

    *where*: ``"worker"`` has a folder of its own, *root_dir*; ``"host"`` borrows the chat's backend from the pool,
    which stays connected while the site is open. *cwd*: relative to the root, or to the worktree. *repository*:
    absolute path of a git repository on that machine, from which the chat gets a worktree, from *base* (None: its
    HEAD).
    """

    def __init__(
        self, chat: str, where: str, root_dir: str | None, cwd: str, repository: str | None, base: str | None
    ) -> None:
        if where not in PLACES:
            raise ConfigError(f"where={where!r}: must be 'worker' or 'host'")
        if where == "worker" and not root_dir:
            raise ConfigError(
                "root_dir is missing: where = 'worker' needs a folder for each chat, as '/srv/chats/{key}'"
            )
        if where == "host" and root_dir:
            raise ConfigError(
                f"root_dir={root_dir!r}: where = 'host' works in the root_dir of the chat's host; use cwd"
            )
        if repository is not None and not os.path.isabs(repository):
            raise ConfigError(f"repository={repository!r}: must be an absolute path")
        if base is not None and repository is None:
            raise ConfigError(f"base={base!r}: means nothing without repository")
        self.chat = chat
        self.where = where
        self._root_dir = root_dir
        self._cwd = cwd
        self.worktree = Worktree(chat, repository, base) if repository is not None else None
        self._borrowed: Borrowed[Any] | None = None
        self._root: WorkspaceBackend | None = None

    async def enter(self, pool: Any) -> WorkspaceBackend:
        """Connect the workspace, and nothing else; `leave` it."""
        if self.where == "host":
            if pool is None:
                raise ConfigError("where = 'host' borrows the chat's backend: this agent is in no pool")
            self._borrowed = await pool.aacquire_backend(self.chat)
            root = self._borrowed.backend
            if not isinstance(root, WorkspaceBackend):
                self.leave_host()
                raise BackendUnavailable(f"where = 'host': {root!r} has no files and commands", "setup", None)
            self._root = root
        else:
            self._root = LocalFilesystemBackend(str(self._root_dir))
            await self._root.connect()
        return self._root

    async def open(self, pool: Any) -> None:
        """`enter`, and have the folder ready. Raises `BackendUnavailable`, `PathEscapeError`."""
        root = await self.enter(pool)
        if self.worktree is not None:
            await self.worktree.make(root)
        await self.folder.amkdir(".")

    @property
    def root(self) -> WorkspaceBackend:
        """The workspace under whose root everything is; the worktree's path is relative to it."""
        assert self._root is not None, "not open"
        return self._root

    @property
    def folder(self) -> ScopedBackend:
        """The folder that the agent works in."""
        base = self.root.scope(self.worktree.path) if self.worktree is not None else self.root
        return base.scope(self._cwd)

    @property
    def folder_path(self) -> str:
        """`folder`, absolute, on its machine."""
        return self.folder._place(".").full

    @property
    def lost(self) -> bool:
        """Whether the connection to the machine is gone."""
        return self._root is None or not self._root.usable

    async def leave(self) -> None:
        """Give back what `enter` took. Can be repeated, also after half an `open`."""
        root, self._root = self._root, None
        if self._borrowed is not None:
            self.leave_host()
        elif root is not None:
            await root.adestroy()

    def leave_host(self) -> None:
        """Release the chat's backend."""
        borrowed, self._borrowed = self._borrowed, None
        if borrowed is not None:
            borrowed.release()

    async def clear_away(self, pool: Any) -> dict[str, Any] | None:
        """Remove the worktree if that loses nothing; on a site that is not open. None: there is none."""
        if self.worktree is None:
            return None
        try:
            return await self.worktree.remove(await self.enter(pool))
        finally:
            await self.leave()
