"""The worker's side of the backend pool: which queues to consume, when to open and close."""

import logging
from typing import Any

import click
from celery import bootsteps

from pool.errors import ConfigError
from pool.worker import rabbitmq
from pool.worker.execution import check_execution_pool, interruptible

logger = logging.getLogger(__name__)

STOP_GRACE = 5.0
"""Seconds for tasks to give their backends back after the execution pool has stopped (they have, by then)."""


class BackendPoolStep(bootsteps.StartStopStep):
    """Started first and stopped last of all steps, so that no task outlives the pool in a warm shutdown."""

    label = "Backend pool"
    requires = ("celery.worker.components:Pool",)  # made after the step that reads --autoscale, and checked with it

    def __init__(self, worker: Any, **kwargs: Any) -> None:
        super().__init__(worker, **kwargs)
        self.extension = worker.app.warm_pool
        try:
            self.in_process = check_execution_pool(worker)
            if rabbitmq.is_amqp(self.extension.settings.broker_url):
                limits = {"time_limit": worker.time_limit, "soft_time_limit": worker.soft_time_limit}
                rabbitmq.check_time_limits(worker.app, self.extension.settings.consumer_timeout, limits)
        except ConfigError as error:
            if click.get_current_context(silent=True) is None:
                raise
            raise click.UsageError(str(error)) from None
        if self.in_process:
            worker.pool_cls = interruptible(worker.pool_cls, self.extension)
        queues = worker.app.amqp.queues
        for shard in self.extension.settings.owned_shards:
            queues.select_add(self.extension.router.queues[shard])

    def include(self, worker: Any) -> bool:
        """Take the first place: Celery's own steps know no way to say so."""
        worker.steps.insert(0, self)
        return True

    def start(self, worker: Any) -> None:  # noqa: ARG002 - Celery's signature
        settings = self.extension.settings
        logger.info(
            "backend pool: %d of %d shards, backends from %s",
            len(settings.owned_shards),
            settings.shards,
            self.extension.backends_from,
        )
        if self.in_process:
            self.extension.closing = False
            _ = self.extension.pool

    def stop(self, worker: Any) -> None:  # noqa: ARG002
        """Warm shutdown: the running tasks have finished."""
        self.extension.close(grace=STOP_GRACE)

    def info(self, worker: Any) -> dict[str, Any]:  # noqa: ARG002
        """What ``celery inspect stats`` and Flower show; empty where the pool lives in a child process."""
        if not self.in_process:
            return {}
        stats = self.extension.pool.get_stats()
        return {
            "backend_pool": {
                "total": stats.total_backends,
                "busy": stats.active_backends,
                "idle": stats.idle_backends,
                "waiting": stats.waiting,
                "connects": stats.connects,
                "connect_failures": stats.connect_failures,
                "hits": stats.hits,
                "evicted_idle": stats.evicted_idle,
                "evicted_lru": stats.evicted_lru,
                "retired": stats.retired_total,
                "shards": len(self.extension.settings.owned_shards),
            }
        }

    def terminate(self, worker: Any) -> None:  # noqa: ARG002
        """Cold shutdown: what still runs is cancelled, and its message goes back to the queue."""
        self.extension.close(grace=0.0)
