"""What is RabbitMQ's own: how shard queues are declared and consumed there, delays, and limits of time.

Redelivery is the broker's: it gives the unacknowledged messages of a lost connection to the next consumer, in order and
before all others. `docs/routing.md` says what that took; `tests/acceptance/test_rabbitmq.py` runs it on a server.
"""

import logging
import math
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from celery import Celery
from celery.events.dispatcher import EventDispatcher
from celery.utils.time import maybe_make_aware
from kombu import Consumer, Queue

from pool.config import Settings
from pool.errors import ConfigError

logger = logging.getLogger(__name__)

NO_DELIVERY_LIMIT = 2**31 - 1

_DELAY_PREFIX = re.compile(r"^(?:[01]\.){28}")


def is_amqp(url: object) -> bool:
    """Whether the URL names a RabbitMQ."""
    return str(url or "").startswith(("amqp://", "amqps://", "pyamqp://"))


# -- declarations


def queue_arguments() -> dict[str, Any]:
    """Arguments of a shard queue. They are part of its identity: changing one means a new queue.

    The delivery limit is there for order: RabbitMQ puts what a consumer gives back at the *head* of a quorum queue if
    there is a limit, at its tail if there is none; and RabbitMQ 4 sets one of 20, after which it drops the message.
    """
    return {
        "x-queue-type": "quorum",
        "x-single-active-consumer": True,
        "x-delivery-limit": NO_DELIVERY_LIMIT,
    }


def consumer_arguments(settings: Settings) -> dict[str, Any]:
    """Arguments of a shard queue's consumer: RabbitMQ obeys them from 3.11.15 on; before, the server's own count."""
    return {"x-consumer-timeout": int(settings.consumer_timeout * 1000)}


def shard_prefetch(settings: Settings) -> int:
    """Messages that the consumer of one shard queue may hold unacknowledged.

    Quorum queues know no limit for a channel, so all shards together may hold this times their number. Time that a
    message waits in the node counts for the consumer timeout, and a handoff has to give it back: keep it small.
    """
    return min(2 * settings.key_concurrency, settings.tasks_at_once)


def heartbeat(lease_ttl: float, silence: float = 0.0) -> int:
    """Seconds between AMQP heartbeats, a whole number: a node that is silent for 2 to 3 of them is dropped.

    *silence*: seconds for which a healthy node may be silent, as in a soft shutdown, which sleeps.

    Half of the lease's time: a frozen node loses its connection about when its leases end. 1 s is the least that the
    protocol has; a worker that does not get to its event loop for a second would then be dropped while it works.
    """
    return max(1, int(lease_ttl / 2), math.ceil(silence / 2) + 1 if silence else 0)


def configure(app: Celery, settings: Settings) -> None:
    """Set what the app needs on RabbitMQ; what it has set itself, and its own queues, stay."""
    conf = app.conf
    if settings.execution != "solo":  # there the event loop stands still as long as a task runs
        beat = heartbeat(settings.lease_ttl, conf.worker_soft_shutdown_timeout or 0.0)
        conf.broker_heartbeat = min(conf.broker_heartbeat or math.inf, beat)
    # A publish returns when a majority of the servers has it on disk, or raises.
    conf.broker_transport_options = {"confirm_publish": True, **conf.broker_transport_options}
    app.events.dispatcher_cls = _UnconfirmedEvents
    app.amqp.Consumer = _consumer_class(app, settings)
    if not isinstance(app.__dict__.get("send_task"), _WholeSeconds):
        app.send_task = _WholeSeconds(app, app.send_task)


def _consumer_class(app: Celery, settings: Settings) -> type[Consumer]:
    """Return the class of the worker's consumer: a prefetch for each queue, and all shard queues declared."""

    class ShardConsumer(Consumer):
        _prefetch: int | None = None

        def declare(self) -> None:
            """Declare the shard queues of other nodes, too.

            Celery's step for delayed messages comes after this and binds every queue it knows: a missing one ends it.
            A message whose delay ends must find its queue, whether that has a consumer or not.
            """
            for queue in app.warm_pool.router.queues:
                queue(self.channel).declare()
            super().declare()

        def qos(self, prefetch_size: int = 0, prefetch_count: int = 0, apply_global: bool = False) -> Any:
            self._prefetch = None
            return super().qos(prefetch_size, prefetch_count, apply_global)

        def _basic_consume(self, queue: Queue, *args: Any, **kwargs: Any) -> Any:
            """A prefetch holds for the consumers that start after it; one for each queue needs no other place."""
            shard = app.warm_pool.router.is_shard_queue(queue.name)
            prefetch = shard_prefetch(settings) if shard else settings.tasks_at_once
            if prefetch != self._prefetch:
                self.channel.basic_qos(0, prefetch, False)
                self._prefetch = prefetch
            return super()._basic_consume(queue, *args, **kwargs)

    return ShardConsumer


class _UnconfirmedEvents(EventDispatcher):
    """A worker's events go out without confirms.

    Tasks send them from their threads, and the worker's event loop reads from the same connection: it would take the
    confirm that a thread waits for, which keeps the dispatcher locked, and then wait for the lock itself until the
    server drops the node.
    """

    def enable(self) -> None:
        super().enable()
        if self.channel is None:  # else it is somebody else's
            channel = self.producer.channel
            channel.basic_publish = channel._basic_publish


# -- delays


def without_delay(routing_key: str) -> str:
    """Return the routing key that a message had before it waited in Celery's delay queues."""
    return _DELAY_PREFIX.sub("", routing_key, count=1)


def whole_seconds(
    countdown: float | None, eta: datetime | str | None, now: datetime
) -> tuple[int | None, datetime | str | None]:
    """Return (countdown, eta) with a delay of whole seconds, rounded up, or as they were when there is none to come.

    RabbitMQ's delay queues count seconds; Celery rounds down, so that the rest would be waited for in a node, and
    raises ValueError where nothing is left of a delay below one second.
    """
    if eta is not None and countdown is None:
        at = datetime.fromisoformat(eta) if isinstance(eta, str) else eta
        countdown = (maybe_make_aware(at, now.tzinfo) - now).total_seconds()
    return (math.ceil(countdown), None) if countdown and countdown > 0 else (None, None)


class _WholeSeconds:
    """``app.send_task`` that gives tasks with a key a delay of whole seconds."""

    def __init__(self, app: Celery, send_task: Callable[..., Any]) -> None:
        self._app = app
        self._send_task = send_task

    def __call__(
        self,
        name: str,
        args: Any = None,
        kwargs: Any = None,
        countdown: float | None = None,
        eta: datetime | str | None = None,
        **options: Any,
    ) -> Any:
        if (countdown or eta) and self._app.warm_pool.router.is_keyed(name, options, options.get("task_type")):
            countdown, eta = whole_seconds(countdown, eta, self._app.now())
        return self._send_task(name, args, kwargs, countdown=countdown, eta=eta, **options)


# -- the consumer timeout


def check_time_limits(app: Celery, consumer_timeout: float, limits: Mapping[str, float | None] | None = None) -> None:
    """Raise `ConfigError` for a task whose time limit is above *consumer_timeout* seconds.

    RabbitMQ closes the channel of a consumer that holds a message for longer. Celery ends the node then, and the
    message is delivered again, with everything else that the node had taken. *limits* are the worker's own
    (``time_limit``, ``soft_time_limit``); None: those of ``app.conf``.
    """
    ttl = app.warm_pool.settings.lease_ttl
    if ttl >= consumer_timeout:
        raise ConfigError(
            f"POOL_LEASE_TTL={ttl:g} s: must be below RabbitMQ's consumer timeout of {consumer_timeout:g} s"
        )
    if limits is None:
        limits = {"time_limit": app.conf.task_time_limit, "soft_time_limit": app.conf.task_soft_time_limit}
    for name, task in sorted(app.tasks.items()):
        if not task.acks_late:
            continue  # acknowledged before it runs
        for kind in ("time_limit", "soft_time_limit"):
            limit = getattr(task, kind, None) or limits.get(kind)
            if limit and limit > consumer_timeout:
                raise ConfigError(
                    f"task {name}: {kind}={limit:g} s is above RabbitMQ's consumer timeout of {consumer_timeout:g} s:"
                    " the broker would close the node's channel and deliver the message of the running task again."
                    " Lower the limit, or raise consumer_timeout in rabbitmq.conf and POOL_CONSUMER_TIMEOUT with it"
                )
