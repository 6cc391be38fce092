"""Durable records of chats: what an agent's session needs to be found again, whichever node comes next.

The record is the truth; the backend pool is a warm cache of it. `pool.sessions` keeps the records in Redis.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, Protocol


@dataclass(frozen=True)
class Chat:
    """One agent's session of one chat."""

    chat: str
    agent: str
    session_id: str = ""
    """The agent's own id of the session; "": none yet."""
    worktree: str = ""
    """Path where the agent works, relative to its root; "": the root."""
    branch: str = ""
    """Git branch of the worktree."""
    version: str = ""
    """Of the agent that wrote the session."""
    created: float = 0.0
    """Seconds since 1970, by the store's clock."""
    last_active: float = 0.0
    """Seconds since 1970, by the store's clock: when a turn began, saved or finished last."""
    epoch: int = 0
    """Of the shard's lease under which it was last written; it only grows. 0: placement was always static."""
    state: Literal["open", "closing"] = "open"
    turn: str = ""
    """Id of the task whose turn is running; "": none. A node that died leaves it here."""


@dataclass(frozen=True)
class Begun:
    """What `ChatStore.begin` found."""

    chat: Chat
    repeated: bool
    """An earlier attempt of this very turn had begun and not finished; whether the agent has seen it is unknown."""


class ChatStore(Protocol):
    """Records by chat and agent. Any thread may call any method; each is one round trip, and atomic.

    **Fence.** *epoch* is that of the caller's lease of the chat's shard. A write is refused with `NotOwner`, and
    changes nothing, when a record of the chat was written under a higher one, or when the lease table names a higher
    one for the shard. 0: placement is static, no fence. (`Ownership.epoch` says 0 too: of a shard that is not held.)

    Every method raises `InvalidKey` for a chat or agent that is no key, `ConfigError` for another argument that breaks
    a rule, and `BackendUnavailable` (reason ``store``) when the store cannot be reached: it is then unknown whether it
    has heard, and every method can be repeated. A record that cannot be decoded raises `PoolError`, whose ``args`` are
    message, chat and agent; only `delete` is for it. Other records of the chat are not held up by it: what had to be
    done for them is done before that is raised. Records never expire by themselves.
    """

    def begin(self, chat: str, agent: str, epoch: int, turn: str) -> Begun:
        """Make the record or read it, and note that *turn* (id of its task) runs from now on.

        A record that is closing is returned as it is: finish the close (`delete`), then begin again.
        """
        ...

    def save(self, chat: Chat, epoch: int) -> Chat:
        """Write session_id, worktree, branch and version of the running turn ``chat.turn``; return the record.

        Also counts as activity. Raises `PoolError` when that turn is not the running one (any more).
        """
        ...

    def finish(self, chat: str, agent: str, epoch: int, turn: str) -> None:
        """*turn* has ended. A later one that has begun meanwhile stays; a record that is gone stays gone."""
        ...

    def mark_closing(self, chat: str, epoch: int) -> list[Chat]:
        """All records of the chat become closing; return them, by agent. Empty: there is no such chat."""
        ...

    def delete(self, chat: str, agent: str, epoch: int) -> None:
        """Remove the record; the last one takes the chat out of `idle`. No record: nothing happens."""
        ...

    def records(self, chat: str) -> list[Chat]:
        """Return what there is of the chat, by agent."""
        ...

    def idle(self, shard: int, idle_for: float, limit: int = 100) -> list[str]:
        """Return up to *limit* chats of *shard*: those with a closing record, then those idle for *idle_for* seconds.

        Each kind with the least recently active first; a chat is as active as its most active agent. A turn that has
        run for longer than *idle_for* does not keep its chat out: the caller knows what runs.
        """
        ...

    def request_cancel(self, chat: str, agent: str | None = None) -> list[str]:
        """Ask for the running turn of *agent* (None: of each agent) to be cancelled; return the turns that were asked.

        Empty: none runs. The mark expires after an hour. Any process may call it.
        """
        ...

    def cancelled(self, turns: Collection[str]) -> set[str]:
        """Return those of *turns* that were asked to be cancelled."""
        ...
