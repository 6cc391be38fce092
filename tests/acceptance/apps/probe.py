"""Tasks of the tests' own: any app knows them, nodes by ``celery worker -I``."""

import os
import time
from typing import Any

from celery import shared_task
from celery.worker.control import control_command

from pool import PooledTask
from pool.sharding.hashing import shard_of
from pool.worker.rabbitmq import without_delay
from tests.support import ledger


def report(task: PooledTask) -> dict[str, Any]:
    with task.acquire_backend() as borrowed:
        return {
            "key": task.pool_key,
            "pid": os.getpid(),
            "node": task.request.hostname,
            "warm": borrowed.warm,
            "queue": without_delay(task.request.delivery_info["routing_key"]),
            "retries": task.request.retries,
        }


@shared_task(base=PooledTask, bind=True, key="key", name="probe.where")
def where(self: PooledTask, key: str) -> dict[str, Any]:
    """Tell who works for the key."""
    return report(self)


@shared_task(base=PooledTask, bind=True, key="key", name="probe.after")
def after(self: PooledTask, before: Any, key: str) -> dict[str, Any]:
    """A link of a chain: what came before, and who works for the key."""
    return {**report(self), "before": before}


@shared_task(base=PooledTask, bind=True, key="key", name="probe.retried", default_retry_delay=0)
def retried(self: PooledTask, key: str) -> dict[str, Any]:
    """Ask for one retry, then tell."""
    if not self.request.retries:
        raise self.retry()
    return report(self)


@shared_task(base=PooledTask, bind=True, key="key", name="probe.retried_later")
def retried_later(self: PooledTask, key: str) -> dict[str, Any]:
    """Ask for two retries with a delay below a second, then tell."""
    if self.request.retries < 2:
        raise self.retry(countdown=0.2)
    return report(self)


@shared_task(base=PooledTask, bind=True, name="probe.by_header")
def by_header(self: PooledTask) -> dict[str, Any]:
    """No key among its arguments: the producer sends the header."""
    return report(self)


@shared_task(base=PooledTask, bind=True, key="key", name="probe.stats")
def stats(self: PooledTask, key: str) -> dict[str, Any]:
    """Tell what the pool of the key's process holds."""
    found = self.pool.get_stats()
    return {"pid": os.getpid(), "keys": sorted(found.backends_by_key), "evicted_idle": found.evicted_idle}


@shared_task(base=PooledTask, bind=True, key="key", name="probe.ledger_build")
def ledger_build(self: PooledTask, key: str, seconds: float) -> None:
    """A build that takes so long, and is written down at the build host (folder: ``TEST_LEDGER``)."""
    pool = self.app.warm_pool
    epoch = pool.ownership.epoch(shard_of(key, pool.settings.shards))
    told = (os.environ["TEST_LEDGER"], key, epoch, self.request.id, self.request.hostname, os.getpid(), seconds)
    with self.backend() as backend:
        backend.exec(ledger.COMMAND, env=ledger.environment(*told))


@shared_task(bind=True, name="probe.plain")
def plain(self: Any, value: Any) -> dict[str, Any]:
    """Nothing to do with keys."""
    return {"value": value, "node": self.request.hostname, "queue": self.request.delivery_info["routing_key"]}


@control_command()
def probe_consume(state: Any, add: list[str], cancel: list[str]) -> dict[str, Any]:
    """Change the queues that a live node consumes, in its event loop as a coordinator does; tell how long it took."""
    consumer, queues = state.consumer.task_consumer, state.app.amqp.queues
    start = time.perf_counter()
    consumer.auto_declare = False  # the worker has declared them all
    for name in add:
        consumer.add_queue(queues.select_add(queues[name]))
    consumer.auto_declare = True
    if add:
        consumer.consume()
    added = time.perf_counter()
    for name in cancel:
        queues.deselect(name)
        consumer.cancel_by_queue(name)
    return {"add_ms": (added - start) * 1000, "cancel_ms": (time.perf_counter() - added) * 1000}
