"""Tasks that look after the pool. They go through the shard queues like everything else, so they reach the owner."""

from typing import Any

from celery import shared_task

from pool.sharding.hashing import shard_of
from pool.worker.task import PooledTask


@shared_task(base=PooledTask, bind=True, shard="shard", name="pool.sweep_shard")
def sweep_shard(self: PooledTask, shard: int) -> dict[str, Any]:
    """Evict the idle backends of the process that owns *shard*.

    Returns ``{"shard": shard, "evicted": [[key, agent], ...]}``.
    """
    return {"shard": shard, "evicted": [list(identity) for identity in self.pool.sweep()]}


@shared_task(base=PooledTask, bind=True, key="chat_id", name="pool.close_chat")
def close_chat(self: PooledTask, chat_id: str) -> dict[str, Any]:
    """End all backends of a chat (or user): idle ones now, busy ones when their tasks are done. Can be repeated.

    Returns ``{"key": chat_id, "closed": [agents], "retired": [agents]}``.
    """
    return {"key": chat_id, **self.pool.close_key(chat_id)}


@shared_task(base=PooledTask, bind=True, shard="shard", name="pool.close_idle_chats")
def close_idle_chats(self: PooledTask, shard: int) -> dict[str, Any]:
    """Close the chats of *shard* none of whose backends was used for ``chat_ttl`` seconds.

    Returns ``{"shard": shard, "closed": [keys]}``.
    """
    settings = self.app.warm_pool.settings
    closed = [key for key in self.pool.idle_keys(settings.chat_ttl) if shard_of(key, settings.shards) == shard]
    for key in closed:
        self.pool.close_key(key)
    return {"shard": shard, "closed": closed}
