"""The project's own app, and a task that gives its node many backends at once."""

from celery import shared_task

from pool import MemoryBackend, PooledTask
from pool.sharding.hashing import shard_of
from worker_config import app

__all__ = ["app", "fill"]


@shared_task(base=PooledTask, bind=True, key="key", name="bench.fill")
def fill(self: PooledTask, key: str, count: int) -> int:
    """Register *count* idle backends, of keys whose shards this node owns; return how many the pool has."""
    ownership = self.app.warm_pool.ownership
    made = 0
    for number in range(count):
        name = f"{key}-{number}"
        assert ownership.owns(shard_of(name, ownership.shards))
        backend = MemoryBackend()
        backend.run_sync(backend.connect())
        self.pool.register(name, "default", backend)
        made += 1
    return made
