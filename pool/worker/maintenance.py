"""Tasks that look after the pool. They go through the shard queues like everything else, so they reach the owner."""

from typing import Any

from celery import shared_task

from pool.sharding.hashing import shard_of
from pool.worker.task import PooledTask

CHAT_LANE = "chat"
"""Turns and closes of one chat: one at a time, in order."""


@shared_task(base=PooledTask, bind=True, shard="shard", name="pool.sweep_shard")
def sweep_shard(self: PooledTask, shard: int) -> dict[str, Any]:
    """Evict the idle backends of the process that owns *shard*.

    Returns ``{"shard": shard, "evicted": [[key, agent], ...]}``.
    """
    return {"shard": shard, "evicted": [list(identity) for identity in self.pool.sweep()]}


@shared_task(base=PooledTask, bind=True, key="chat_id", lane=CHAT_LANE, retry_exhausted=True, name="pool.close_chat")
def close_chat(self: PooledTask, chat_id: str) -> dict[str, Any]:
    """End all that a chat (or user) has: its agents' sessions, processes, worktrees and records, and every backend.

    It waits for a running turn; other busy backends are closed when their tasks are done. Can be repeated. Returns
    ``{"key": chat_id, "closed": [agents], "retired": [agents]}`` and, where agents are configured, ``"agents"``:
    what became of each one's session and worktree. While a host is unavailable, or the pool is full, it is retried.
    """
    extension = self.app.warm_pool
    return {"key": chat_id, **extension.chats.close(chat_id, self.pool, extension.settings.pool.acquire_timeout)}


@shared_task(bind=True, name="pool.cancel_turn", ignore_result=False)
def cancel_turn(self: Any, chat_id: str, agent: str | None = None) -> dict[str, Any]:
    """Ask for the running turn of a chat to be cancelled; its `run_turn` then returns ``cancelled``.

    Any worker can run this, and so can a plain call, ``cancel_turn(chat_id)``, in any process that has the app: it does
    not go through the chat's own queue, where it would wait behind the turns to come. Turns that have not begun are
    not concerned (revoke those). Returns ``{"key": chat_id, "cancelled": [ids of the turns that were asked]}``.
    """
    return {"key": chat_id, "cancelled": self.app.warm_pool.chats.store.request_cancel(chat_id, agent)}


@shared_task(base=PooledTask, bind=True, shard="shard", name="pool.close_idle_chats")
def close_idle_chats(self: PooledTask, shard: int) -> dict[str, Any]:
    """Close the chats of *shard* that nobody used for ``chat_ttl`` seconds, and finish closes that were interrupted.

    Returns ``{"shard": shard, "closed": [keys]}``.
    """
    extension = self.app.warm_pool
    settings = extension.settings
    closed = extension.chats.close_idle(shard, settings.chat_ttl, self.pool)
    idle = [key for key in self.pool.idle_keys(settings.chat_ttl) if shard_of(key, settings.shards) == shard]
    for key in idle:
        self.pool.close_key(key)
    return {"shard": shard, "closed": sorted({*closed, *idle})}
