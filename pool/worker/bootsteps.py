"""The worker's side of the backend pool: steps of Celery's start and stop.

`BackendPoolStep` is the first to start and the last to stop; `OwnershipStep` starts before the worker consumes, and
hands the shards over when it stops; `ConsumptionStep` follows each connection to the broker, and `ClaimsStep` says
goodbye to it.
"""

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import click
from celery import bootsteps
from celery.exceptions import WorkerShutdown
from celery.worker import state

from pool.errors import ConfigError
from pool.worker import rabbitmq
from pool.worker.execution import check_execution_pool, interruptible, with_turns
from pool.worker.masking import without_arguments
from pool.worker.report import flat, stats_of
from pool.worker.takeover import in_hand

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
        with refusals():
            self.in_process = in_process = check_execution_pool(worker)
            if rabbitmq.is_amqp(self.extension.settings.broker_url):
                limits = {"time_limit": worker.time_limit, "soft_time_limit": worker.soft_time_limit}
                rabbitmq.check_time_limits(worker.app, self.extension.settings.consumer_timeout, limits)
            self.extension.prepare_worker(worker, in_process=in_process)
        logging.getLogger("celery.pool").addFilter(without_arguments)
        if worker.pool_cls.__module__.endswith(".thread"):
            worker.pool_cls = with_turns(worker.pool_cls, self.extension)
        if self.in_process:
            worker.pool_cls = interruptible(worker.pool_cls, self.extension)

    def include(self, worker: Any) -> bool:
        """Take the first place: Celery's own steps know no way to say so."""
        worker.steps.insert(0, self)
        return True

    def start(self, worker: Any) -> None:  # noqa: ARG002 - Celery's signature
        settings = self.extension.settings
        shards = "leased" if settings.leased else len(settings.node_shards)
        logger.info(
            "backend pool: %s of %d shards, backends from %s", shards, settings.shards, self.extension.backends_from
        )
        if self.in_process:
            self.extension.closing = False
            _ = self.extension.pool
        with refusals():
            self.extension.gauges.start()

    def stop(self, worker: Any) -> None:  # noqa: ARG002
        """Warm shutdown: the running tasks have finished."""
        self.extension.close(grace=STOP_GRACE)
        self.extension.gauges.stop()

    def info(self, worker: Any) -> dict[str, Any]:  # noqa: ARG002
        """What ``celery inspect stats`` and Flower show."""
        return {"backend_pool": flat(stats_of(self.extension))}

    def terminate(self, worker: Any) -> None:  # noqa: ARG002
        """Cold shutdown: what still runs is cancelled, and its message goes back to the queue."""
        self.extension.close(grace=0.0)


class OwnershipStep(bootsteps.StartStopStep):
    """Between the execution pool and the consumer: joins before a task can come, leaves while tasks can still end."""

    label = "Shard ownership"
    requires = ("celery.worker.components:Pool",)

    def start(self, worker: Any) -> None:
        extension = worker.app.warm_pool
        extension.calls.attach(worker.hub)
        extension.consumption.turns = extension.turns
        if extension.tenant is not None:
            try:
                extension.tenant.start()
            except ConfigError as error:
                logger.critical("this node must not take part: %s", error)
                raise WorkerShutdown(os.EX_CONFIG) from None

    def close(self, worker: Any) -> None:
        """Give back what has not started, before Celery's consumer forgets what waits in it for an ETA."""
        if not state.should_terminate:
            try:
                worker.app.warm_pool.consumption.cancel_all()
            except Exception:  # here it would end the whole shutdown
                logger.exception("what has not started goes back at the end")

    def stop(self, worker: Any) -> None:
        """Give back what has not started and wait for what runs, with the hub turning: the broker hears heartbeats."""
        extension = worker.app.warm_pool
        if extension.tenant is not None:
            extension.tenant.stop()
            return
        extension.consumption.cancel_all()
        while extension.consumption.working:
            extension.calls.turn()

    def terminate(self, worker: Any) -> None:
        if worker.app.warm_pool.tenant is not None:
            worker.app.warm_pool.tenant.terminate()


class ClaimsStep(bootsteps.StartStopStep):
    """Started first and shut down last of the consumer's steps: it leaves when every channel has given back."""

    label = "Claims"

    def include(self, consumer: Any) -> bool:
        """Take the first place."""
        consumer.app.warm_pool.takeover.running = lambda: in_hand(consumer)
        consumer.steps.insert(0, self)
        return True

    def shutdown(self, consumer: Any) -> None:
        consumer.app.warm_pool.takeover.leave()


class ConsumptionStep(bootsteps.StartStopStep):
    """A step of Celery's consumer, which starts anew with each connection."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, consumer: Any) -> None:
        extension = consumer.app.warm_pool
        extension.consumption.attach(consumer)
        extension.calls.remind()

    def stop(self, consumer: Any) -> None:
        if consumer.connection is None:  # lost; in a shutdown the open one is still needed to give messages back
            consumer.app.warm_pool.consumption.detach()


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Celery's command line prints a `click.UsageError` without a traceback."""
    try:
        yield
    except ConfigError as error:
        if click.get_current_context(silent=True) is None:
            raise
        raise click.UsageError(str(error)) from None
