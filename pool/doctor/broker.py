"""The broker: whether it answers, and the options and limits of time that bite there."""

import contextlib
from collections.abc import Iterator
from typing import Any

from pool.doctor.checks import Unreachable
from pool.doctor.deployment import Deployment
from pool.doctor.finding import Finding, error, info, many, ok, warning
from pool.errors import ConfigError
from pool.worker import rabbitmq
from pool.worker.transport import ShardTransport, check_options

DEFAULT_VISIBILITY = 3600.0
"""Seconds, of kombu's Redis transports."""
LOOKED_AT = 128
"""Shard queues whose declaration is compared, at most."""
_OBEYS_TIMEOUT = (3, 11, 15)
"""The first RabbitMQ that takes ``x-consumer-timeout`` from a consumer."""


def check_broker(deployment: Deployment) -> Iterator[Finding]:
    """Whether it can be reached, and what is set for it."""
    app, settings = deployment.app, deployment.settings
    amqp = rabbitmq.is_amqp(settings.broker_url)
    on_redis = app.connection_for_read().get_transport_cls() is ShardTransport
    try:
        with deployment.broker() as connection:
            kind = "RabbitMQ" if amqp else "Redis" if on_redis else f"transport {connection.transport.driver_type}"
            yield ok("broker", f"The broker answers: {connection.as_uri()} ({kind}).")
            if amqp:
                yield from _version(connection)
                yield from _declarations(deployment, connection)
    except Unreachable as problem:
        yield error(
            "broker-unreachable",
            f"{problem}.",
            "Nothing can be sent, and no node works.",
            "Start the broker, or set POOL_BROKER_URL (of an app of your own: broker_url) to where it is.",
        )
    if not amqp and not on_redis:
        yield warning(
            "broker-kind",
            "The broker is neither one Redis server nor RabbitMQ.",
            "What a killed node had taken comes back when the transport says so, not when its shards are taken over.",
            "Use a redis://, rediss:// or amqp:// URL.",
        )
    yield from _options(deployment, claiming=on_redis)
    if amqp:
        yield from _consumer_timeout(deployment)


def longest_limit(deployment: Deployment) -> tuple[float, str]:
    """Return the longest time limit of a task, in seconds, and whose it is; 0: no task has one."""
    conf = deployment.app.conf
    limits = [(float(conf[name]), name) for name in ("task_time_limit", "task_soft_time_limit") if conf[name]]
    for name, task in sorted(deployment.tasks.items()):
        found = ((getattr(task, kind, None), kind) for kind in ("time_limit", "soft_time_limit"))
        limits += [(float(limit), f"{kind} of task {name}") for limit, kind in found if limit]
    return max(limits, key=lambda limit: limit[0], default=(0.0, ""))


def _options(deployment: Deployment, *, claiming: bool) -> Iterator[Finding]:
    options = deployment.app.conf.broker_transport_options or {}
    if claiming:
        try:
            check_options(options)
        except ConfigError as problem:
            yield error(
                "broker-options",
                f"{problem}.",
                "Nodes refuse to start.",
                "Take it out of broker_transport_options, in producers too.",
            )
    visibility = options.get("visibility_timeout", DEFAULT_VISIBILITY)
    limit, whose = longest_limit(deployment)
    # Nodes of the pool on Redis claim what they take, and know no such time: it is for the other workers there.
    if not rabbitmq.is_amqp(deployment.settings.broker_url) and limit > visibility:
        if claiming and "visibility_timeout" not in options:
            return
        who = "a worker without the pool" if claiming else "a node"
        yield warning(
            "visibility-timeout",
            f"visibility_timeout={visibility:g} s is below {whose}={limit:g} s.",
            f"A task that runs for longer on {who} is delivered a second time, while it runs.",
            f"broker_transport_options['visibility_timeout'] above {limit:g}, or a lower time limit.",
        )


# -- RabbitMQ


def _version(connection: Any) -> Iterator[Finding]:
    told = str(connection.connection.server_properties.get("version", ""))
    parts = [int(part) for part in told.split(".")[:3] if part.isdigit()]
    if tuple(parts) < _OBEYS_TIMEOUT:
        yield info(
            "rabbitmq-version",
            f"RabbitMQ {told}: POOL_CONSUMER_TIMEOUT is not told to it.",
            "Versions before 3.11.15 have only the server's own consumer_timeout (30 minutes).",
            "Keep consumer_timeout in rabbitmq.conf and POOL_CONSUMER_TIMEOUT the same.",
        )


def _consumer_timeout(deployment: Deployment) -> Iterator[Finding]:
    settings = deployment.settings
    assert deployment.tasks is not None  # loaded: they have limits of their own
    try:
        rabbitmq.check_time_limits(deployment.app, settings.consumer_timeout)
    except ConfigError as problem:
        yield error(
            "consumer-timeout",
            f"{problem}.",
            "Nodes refuse to start.",
            "Lower task_time_limit, or raise consumer_timeout in rabbitmq.conf and POOL_CONSUMER_TIMEOUT.",
        )
        return
    limit, _ = longest_limit(deployment)
    if not limit:
        yield info(
            "no-time-limit",
            f"Tasks have no time limit, and POOL_CONSUMER_TIMEOUT is {settings.consumer_timeout:g} s.",
            "A task that runs for longer ends its node: RabbitMQ closes the channel.",
            f"task_time_limit below {settings.consumer_timeout:g}.",
        )


def _declarations(deployment: Deployment, connection: Any) -> Iterator[Finding]:
    """Queues that exist are declared as nodes do: RabbitMQ refuses what differs. None is made."""
    from amqp.exceptions import PreconditionFailed  # type: ignore[import-untyped]

    others = []
    for queue in deployment.app.warm_pool.router.queues[:LOOKED_AT]:
        with contextlib.suppress(*connection.channel_errors), connection.channel() as channel:
            queue(channel).queue_declare(passive=True)
            try:
                queue(channel).queue_declare()
            except PreconditionFailed as problem:
                others.append((queue.name, problem.reply_text))
    if others:
        name, why = others[0]
        yield error(
            "queue-arguments",
            f"{many(len(others), 'shard queue')} with other arguments than nodes declare, among them {name}: {why}",
            "Nodes cannot declare them, and do not start.",
            f"When they are empty, with all nodes stopped: rabbitmqctl delete_queue {name} (each of them).",
        )
