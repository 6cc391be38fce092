"""A git worktree for each chat, so that agents of several chats work on one repository side by side."""

import hashlib
import re
import shlex
from typing import Any

from pool.backends.workspace import Workspace
from pool.errors import BackendUnavailable, CommandFailed

_GIT_TIMEOUT = 120.0
"""Seconds for one git command: a checkout of a large repository takes its time."""


def worktree_name(chat: str) -> str:
    """Return a name for a chat that is good for a folder and a branch, and that no other chat has."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", chat).strip("-")[:40]
    return f"{plain or 'chat'}-{hashlib.sha256(chat.encode()).hexdigest()[:10]}"


class Worktree:
    """The worktree of *chat*, from *repository* (absolute, on the workspace's machine), on a branch of its own.

    *base*: what a new branch starts from; None: the repository's HEAD.
    """

    def __init__(self, chat: str, repository: str, base: str | None) -> None:
        self.repository = repository
        self.path = f"worktrees/{worktree_name(chat)}"
        self.branch = f"chat/{worktree_name(chat)}"
        self._base = base

    async def make(self, workspace: Workspace) -> None:
        """Make it, or use the one that is there. Raises `BackendUnavailable` (``setup``) with what git said."""
        if await workspace.aexists(f"{self.path}/.git"):
            return
        branch = shlex.quote(self.branch)
        await workspace.amkdir("worktrees")
        # What a removed folder left in git's books goes first. A branch that an earlier close has kept is used again.
        command = (
            f"git worktree prune && if git show-ref -q --verify refs/heads/{branch};"
            f' then git worktree add -q "$POOL_HERE" {branch};'
            f' else git worktree add -q -b {branch} "$POOL_HERE" {shlex.quote(self._base or "HEAD")}; fi'
        )
        try:
            await workspace.aexec(self._here + self._in_repository(command), timeout=_GIT_TIMEOUT)
        except CommandFailed as error:
            text = f"worktree {self.path!r} of {self.repository!r}: {error.tail or error}"
            raise BackendUnavailable(text, "setup", None) from error

    async def remove(self, workspace: Workspace) -> dict[str, Any]:
        """Remove it if nothing in it would be lost, and its branch if that is merged.

        Returns ``{"worktree": path, "removed": bool, "branch": kept branch or "", "why": why it was kept}``.
        """
        told = {"worktree": self.path, "removed": True, "branch": "", "why": ""}
        if await workspace.aexists(f"{self.path}/.git"):
            remove = self._in_repository('git worktree remove "$POOL_HERE"')
            gone = await workspace.aexec(self._here + remove, timeout=_GIT_TIMEOUT, check=False)
            if gone.exit_code:
                return {**told, "removed": False, "branch": self.branch, "why": gone.stderr.strip()[-500:]}
        branch = shlex.quote(self.branch)
        delete = f"if git show-ref -q --verify refs/heads/{branch}; then git branch -q -d {branch}; fi"
        kept = await workspace.aexec(self._here + self._in_repository(delete), timeout=_GIT_TIMEOUT, check=False)
        if kept.exit_code:
            unmerged = "not fully merged" in kept.stderr
            why = "its branch has commits that are merged nowhere" if unmerged else kept.stderr.strip()[-500:]
            told |= {"branch": self.branch, "why": why}
        return told

    @property
    def _here(self) -> str:
        return f'export LC_ALL=C; POOL_HERE="$PWD"/{shlex.quote(self.path)}; '

    def _in_repository(self, command: str) -> str:
        return f"cd -- {shlex.quote(self.repository)} && {{ {command}; }}"
