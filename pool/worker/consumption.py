"""Which shard queues this node consumes: added and cancelled on the hub thread, and emptied of what has not started."""

import contextlib
import logging
from collections.abc import Collection, Iterable
from typing import Any

from celery.worker import state

from pool.worker.router import ShardRouter
from pool.worker.takeover import requests
from pool.worker.turns import Turns

logger = logging.getLogger(__name__)


class Consumption:
    """The queues of one worker. Everything but `working` and `busy` belongs to the hub thread."""

    def __init__(self, router: ShardRouter) -> None:
        self._router = router
        self.turns: Turns[Any] | None = None
        self._wanted: set[int] = set()
        self._consumer: Any = None

    # -- the connection comes and goes

    def attach(self, consumer: Any) -> None:
        """Celery has (re)connected: consume what is wanted.

        RabbitMQ delivers while it is still being asked, and Celery can receive nothing before its loop starts; which
        consumes, first of all, every queue that is known by then.
        """
        self._consumer = consumer
        self._add_queues(self._wanted)
        if hasattr(self._channel(), "pause"):
            consumer.task_consumer.consume()
        for queue in self.turns.full if self.turns is not None else ():
            self.press(queue)

    def detach(self) -> None:
        """The connection is gone; RabbitMQ delivers again what has not started, on Redis it stays ours."""
        if self._consumer is None:  # lost again before it was attached: nothing has come by it
            return
        if self.turns is not None and not hasattr(self._channel(), "give_back"):
            self.turns.withdraw()
        self._consumer = None

    def reconnect(self) -> None:
        """Have Celery make a new connection: the messages of this one belong to a former incarnation."""
        channel = self._channel()
        if hasattr(channel, "renounce"):
            channel.renounce()

    # -- shards come and go

    def add(self, shards: Iterable[int]) -> None:
        """Consume the queues of these shards, from now on."""
        fresh = set(shards) - self._wanted
        self._wanted |= fresh
        self._consume(fresh)

    def _consume(self, shards: Iterable[int]) -> None:
        if self._consumer is not None and shards:
            self._add_queues(shards)
            self._consumer.task_consumer.consume()

    def _add_queues(self, shards: Iterable[int]) -> None:
        tasks = self._consumer.task_consumer
        for shard in sorted(shards):
            queue = self._router.queues[shard]
            tasks._queues[queue.name] = queue(tasks.channel)  # declared by now, or (Redis) by whoever sends to it

    def cancel(self, shards: Iterable[int]) -> int:
        """Consume them no more, and give back what has not started; returns how many messages that were."""
        gone = set(shards)
        self._wanted -= gone
        if self._consumer is None:
            return 0
        for shard in sorted(gone):
            with self._maybe_lost():
                self._consumer.task_consumer.cancel_by_queue(self._router.queues[shard].name)
        return self._give_back(gone)

    def _maybe_lost(self) -> Any:
        """The broker may have dropped a node that was frozen, and has its messages back then; Celery reconnects."""
        return contextlib.suppress(*self._consumer.connection_errors)

    def cancel_all(self) -> int:
        """`cancel` for every shard: the worker shuts down."""
        return self.cancel(set(self._wanted))

    def _give_back(self, shards: Collection[int]) -> int:
        found = [*self._waiting(shards), *self._scheduled(shards), *self._limited(shards), *self._queued(shards)]
        if not found:
            return 0
        channel = self._channel()
        if hasattr(channel, "give_back"):
            channel.give_back([request.message.delivery_tag for request in found])
        else:  # RabbitMQ puts each in front of what has not been delivered yet, so the oldest goes first
            for request in sorted(found, key=lambda request: int(request.message.delivery_tag)):
                with self._maybe_lost():
                    request.message.requeue()
        for request in found:
            request.acknowledged = True
            state.requests.pop(request.id, None)
            state.reserved_requests.discard(request)
        return len(found)

    def _waiting(self, shards: Collection[int]) -> list[Any]:
        """Those that wait for their key's turn, or for a thread."""
        if self.turns is None:
            return []
        names = {self._router.queues[shard].name for shard in shards}
        return [job.work.request for job in self.turns.withdraw(names)]

    def _scheduled(self, shards: Collection[int]) -> list[Any]:
        """Those that wait for their ETA in this worker."""
        found = [request for request in tuple(state.scheduled_requests) if self._shard(request) in shards]
        for request in found:
            if request._eta_timer_entry is not None:
                self._consumer.timer.cancel(request._eta_timer_entry)
            self._consumer.qos.decrement_eventually()
            state.scheduled_requests.discard(request)
        return found

    def _limited(self, shards: Collection[int]) -> list[Any]:
        """Those that wait for their task's rate limit."""
        found = []
        for bucket in self._consumer.task_buckets.values():
            for item in list(bucket.contents if bucket else ()):
                if self._shard(item[0]) in shards:
                    bucket.contents.remove(item)
                    found.append(item[0])
        return found

    def _queued(self, shards: Collection[int]) -> list[Any]:
        """Those that wait for a prefork child."""
        semaphore = getattr(self._consumer.controller, "semaphore", None)
        waiting = getattr(semaphore, "_waiting", None)
        if not waiting:
            return []
        found = [entry for entry in waiting if entry[1] and self._shard(entry[1][0]) in shards]
        for entry in found:
            waiting.remove(entry)
        return [entry[1][0] for entry in found]

    # -- back-pressure

    def press(self, queue: str) -> None:
        """Leave out a queue of which too many tasks wait, take it in again when they do no longer.

        On RabbitMQ its consumer's prefetch does that.
        """
        channel = self._channel()
        if self.turns is not None and hasattr(channel, "pause"):
            (channel.pause if queue in self.turns.full else channel.resume)(queue)

    def _channel(self) -> Any:
        return getattr(getattr(self._consumer, "task_consumer", None), "channel", None)

    def _shard(self, request: Any) -> int | None:
        return self._router.shard_in(request.delivery_info)

    # -- from any thread

    @property
    def working(self) -> bool:
        """Whether any task is running, of a shard or not."""
        return bool(requests(state.active_requests))

    def busy(self) -> set[int | None]:
        """The shards of which a task is still running; None among them: one without a shard."""
        known = requests(state.reserved_requests) | requests(state.active_requests)
        return {self._shard(request) for request in known}
