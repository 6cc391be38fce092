"""Celery's route for a keyed task: argument or header -> key -> shard -> queue."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kombu import Exchange, Queue

from pool.config import Settings
from pool.errors import ConfigError, InvalidKey
from pool.keys import check_key
from pool.sharding.hashing import queue_name, shard_of
from pool.worker import masking, rabbitmq

KEY_HEADER = "pool_key"
"""Message header by which a producer that does not know the task's code names the key."""


class ShardRouter:
    """A router for ``task_routes``; returns None for tasks that have no key.

    *find_task* looks up a task that was sent by its name; without it only a header tells such a task's key.
    """

    def __init__(self, settings: Settings, find_task: Callable[[str], Any] = lambda _: None) -> None:
        self.settings = settings
        self._find_task = find_task
        self._amqp = amqp = rabbitmq.is_amqp(settings.broker_url)
        # Celery's delayed delivery on RabbitMQ needs a topic exchange; with Redis a direct one costs less.
        exchange = Exchange(f"{settings.namespace}.shard", type="topic" if amqp else "direct", durable=True)
        arguments = (
            {
                "queue_arguments": rabbitmq.queue_arguments(),
                "consumer_arguments": rabbitmq.consumer_arguments(settings),
            }
            if amqp
            else {}
        )
        self.queues = [
            Queue(name, exchange, routing_key=name, durable=True, **arguments)
            for name in (queue_name(shard, settings.namespace) for shard in range(settings.shards))
        ]
        self.agreed: Callable[[], None] = lambda: None
        """Raises `ConfigError` if the nodes count other shards."""
        self._shards = {queue.name: shard for shard, queue in enumerate(self.queues)}

    def __call__(
        self,
        name: str,
        args: Sequence[Any] | None,
        kwargs: Mapping[str, Any] | None,
        options: dict[str, Any],
        task: Any = None,
        **_: Any,
    ) -> dict[str, Any] | None:
        """Return ``{"queue": ...}`` and, for RabbitMQ, what to declare.

        Raises `InvalidKey` for a keyed task without a usable key, and `ConfigError` for a destination of the caller's
        own, or if the nodes count other shards.
        """
        headers = options.get("headers") or {}
        task = task or self._find_task(name)
        found = self._destination(name, args or (), kwargs or {}, headers.get(KEY_HEADER), task)
        if found is None:
            return None
        self.agreed()
        shard, key = found
        for option, text in masking.shown(task, args or (), kwargs or {}).items():
            options.setdefault(option, text)  # what Celery puts in events, and beside the arguments in the message
        if key is not None:
            options["headers"] = {**headers, KEY_HEADER: key}  # whoever receives it need not decode the arguments
        queue = self.queues[shard]
        self._check_explicit_queue(name, options, queue)
        # An option wins over a route, so the queue that a retry remembers goes: the key decides anew.
        for option in ("queue", "exchange", "routing_key"):
            options.pop(option, None)
        # On RabbitMQ a delayed message goes to another exchange first: its queue must be there when the delay ends.
        return {"queue": queue, "declare": [queue]} if self._amqp else {"queue": queue}

    def is_shard_queue(self, name: str) -> bool:
        return name.startswith(f"{self.settings.namespace}.shard.")

    def shard_in(self, delivery_info: Mapping[str, Any] | None) -> int | None:
        """The shard of the queue by which a message came; None: it came by none of ours."""
        routing_key = (delivery_info or {}).get("routing_key") or ""
        shard = self._shards.get(routing_key)
        return self._shards.get(rabbitmq.without_delay(routing_key)) if shard is None and self._amqp else shard

    def is_keyed(self, name: str, options: Mapping[str, Any], task: Any = None) -> bool:
        """Whether the task goes to a shard queue: it declares a key or a shard, or its message has the header."""
        task = task or self._find_task(name)
        declared = getattr(task, "key", None) is not None or getattr(task, "shard_argument", None) is not None
        return declared or (options.get("headers") or {}).get(KEY_HEADER) is not None

    def _destination(
        self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], header: Any, task: Any
    ) -> tuple[int, str | None] | None:
        shard_argument = getattr(task, "shard_argument", None)
        if shard_argument is not None:
            return self.check_shard(shard_argument(args, kwargs), name), None
        key_argument = getattr(task, "key_argument", None)
        if getattr(task, "key", None) is not None and key_argument is not None:
            key = check_key(key_argument(args, kwargs))
            if header not in (None, key):
                raise InvalidKey(
                    f"task {name}: its argument {task.key!r} is {key!r}, its header {KEY_HEADER!r} {header!r}"
                )
        elif header is not None:
            key = check_key(header)
        elif key_argument is not None:
            raise InvalidKey(f"task {name} has no key: give it key='argument', or the message a header {KEY_HEADER!r}")
        else:
            return None
        return shard_of(key, self.settings.shards), key

    def check_shard(self, shard: Any, name: str) -> int:
        """Return *shard*, or raise `InvalidKey` when there is none of this number."""
        if isinstance(shard, bool) or not isinstance(shard, int) or not 0 <= shard < self.settings.shards:
            raise InvalidKey(
                f"task {name}: shard {shard!r}: must be a whole number from 0 to {self.settings.shards - 1}"
            )
        return shard

    def _check_explicit_queue(self, name: str, options: Mapping[str, Any], queue: Queue) -> None:
        """Refuse a destination of the caller's own; the shard queue that a retry names may be an outdated one."""
        for option in ("queue", "routing_key"):
            given = options.get(option)
            given = getattr(given, "name", given)
            if given is not None and not self.is_shard_queue(rabbitmq.without_delay(str(given))):
                raise ConfigError(
                    f"task {name} goes to the queue of its key, {queue.name}: {option}={given!r} cannot be honoured"
                )
