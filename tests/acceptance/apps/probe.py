"""Tasks of the tests' own: any app knows them, nodes by ``celery worker -I``."""

import os
from typing import Any

from celery import shared_task

from pool import PooledTask
from pool.worker.rabbitmq import without_delay


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


@shared_task(base=PooledTask, bind=True, name="probe.by_header")
def by_header(self: PooledTask) -> dict[str, Any]:
    """No key among its arguments: the producer sends the header."""
    return report(self)


@shared_task(base=PooledTask, bind=True, key="key", name="probe.stats")
def stats(self: PooledTask, key: str) -> dict[str, Any]:
    """Tell what the pool of the key's process holds."""
    found = self.pool.get_stats()
    return {"pid": os.getpid(), "keys": sorted(found.backends_by_key), "evicted_idle": found.evicted_idle}


@shared_task(bind=True, name="probe.plain")
def plain(self: Any, value: Any) -> dict[str, Any]:
    """Nothing to do with keys."""
    return {"value": value, "node": self.request.hostname, "queue": self.request.delivery_info["routing_key"]}
