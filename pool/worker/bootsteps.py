"""The worker's side of the backend pool: which queues to consume, when to open and close."""

import logging
from typing import Any

import click
from celery import bootsteps
from celery.worker import state

from pool.errors import ConfigError
from pool.worker.claims import OUT_OF_REACH, Claims, restore
from pool.worker.execution import check_execution_pool, interruptible
from pool.worker.transport import ShardTransport, check_options

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
            name_claimant(worker, self.extension.settings.namespace)
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


def name_claimant(worker: Any, namespace: str) -> None:
    """Have this worker's channels claim what they take, if its broker is a Redis. Raises `ConfigError`."""
    app = worker.app
    if app.connection_for_read().get_transport_cls() is ShardTransport:
        options = {"priority_steps": [0], **(app.conf.broker_transport_options or {})}
        check_options(options)
        app.conf.broker_transport_options = {**options, "claimant": worker.hostname, "namespace": namespace}


class ClaimsStep(bootsteps.StartStopStep):
    """Started first and shut down last of the consumer's steps: it leaves when every channel has given back."""

    label = "Claims"

    def __init__(self, consumer: Any, **kwargs: Any) -> None:
        super().__init__(consumer, **kwargs)
        options = consumer.app.conf.broker_transport_options or {}
        self.claims = Claims.of(options["namespace"], options["claimant"]) if "claimant" in options else None

    def include(self, consumer: Any) -> bool:
        if self.claims is not None:
            self.claims.running = lambda: _in_hand(consumer)
            consumer.steps.insert(0, self)
        return self.claims is not None

    def shutdown(self, consumer: Any) -> None:  # noqa: ARG002 - Celery's signature
        claims = self.claims
        if claims is None or claims.client is None:
            return
        try:
            if claims.leave(claims.client):
                restore(claims.client, claims.namespace, claims.claimant)
        except OUT_OF_REACH as error:
            logger.warning("what %s has not finished goes back when its node starts again: %s", claims.claimant, error)


def _in_hand(consumer: Any) -> set[str]:
    """Delivery tags of the messages whose tasks outlive the connection: none, if the worker is about to end."""
    if consumer.blueprint.state != bootsteps.RUN:
        return set()
    if not consumer.pool.__module__.endswith(".prefork"):
        found = _requests(state.active_requests) | _requests(state.reserved_requests)  # threads forget nothing
    elif consumer.app.conf.worker_cancel_long_running_tasks_on_connection_loss:
        found = set()
    else:
        found = _requests(state.active_requests)  # what no child has begun is discarded
    return {request.message.delivery_tag for request in found}


def _requests(known: Any) -> set[Any]:
    while True:
        try:
            return set(known)
        except RuntimeError:  # a thread has added one meanwhile
            continue
