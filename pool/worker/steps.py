"""What a worker makes of the steps that its pool and its coordinator tell of: a line in the log, an event for Celery.

Both name the node, the key and its shard, the epoch under which the node holds it, and the reason.
"""

import logging
import queue
import threading
from typing import Any

from pool.observer import Observer, Step
from pool.runtime import fork_count
from pool.sharding.coordinator import ShardStep
from pool.sharding.hashing import shard_of

logger = logging.getLogger("pool.steps")

WAITING = 1000
"""Events that may wait for the broker at most; what comes then is counted and left out."""


class Steps(Observer):
    """Hears the pool of this process, and in the main process the coordinator; *extension* is the `WarmPool`."""

    def __init__(self, extension: Any, events: "Events") -> None:
        self._extension = extension
        self._events = events

    def step(self, step: Step) -> None:
        ownership, shard = self._extension.ownership, None
        if not step.key.startswith("("):  # it has a key, and not many
            shard = shard_of(step.key, ownership.shards)
        self._tell(
            f"backend {step.what}",
            step.what,
            key=step.key,
            agent=step.agent,
            kind=step.kind,
            shard=shard,
            epoch=None if shard is None else ownership.epoch(shard) or None,
            reason=step.reason,
            seconds=round(step.seconds, 6),
        )

    def shards(self, step: ShardStep) -> None:
        """Some shards came or went."""
        self._extension.gauges.hear(step)
        self._tell(
            f"shards {step.what}",
            step.what,
            shards=list(step.shards),
            epoch=step.epoch,
            source=step.source,
            seconds=round(step.seconds, 6),
        )

    def _tell(self, title: str, what: str, **fields: Any) -> None:
        fields["node"] = self._extension.node
        if logger.isEnabledFor(logging.INFO):
            words = " ".join(f"{name}={_short(value)}" for name, value in fields.items() if value not in (None, ""))
            extra = {f"pool_{name}": value for name, value in fields.items()}
            logger.info("%s: %s", title, words, extra={"pool_step": what, **extra})
        self._events.send(f"backend-pool-{what}", fields)


def _short(value: Any) -> Any:
    """Numbers in ascending order as ranges: ``0-31,40``."""
    if not isinstance(value, list):
        return value
    ranges: list[list[int]] = []
    for number in value:
        if ranges and ranges[-1][-1] == number - 1:
            ranges[-1][1:] = [number]
        else:
            ranges.append([number])
    return ",".join("-".join(map(str, each)) for each in ranges)


class Events:
    """Celery events, sent by a thread of their own: nobody who tells of a step waits for the broker."""

    def __init__(self, app: Any, node: str, *, enabled: bool) -> None:
        self._app = app
        self._node = node
        self._enabled = enabled  # whether this worker sends events at all (``-E``, ``worker_send_task_events``)
        self._queue: queue.Queue[tuple[str, dict[str, Any]]] = queue.Queue(WAITING)
        self._lock = threading.Lock()
        self._sender = -1  # number of the process (see `fork_count`) whose thread sends
        self.left_out = 0

    def send(self, kind: str, fields: dict[str, Any]) -> None:
        """Have it sent; from any thread."""
        if not self._enabled:
            return
        if self._sender != fork_count():
            self._start()
        try:
            self._queue.put_nowait((kind, fields))
        except queue.Full:
            self.left_out += 1
            if self.left_out == 1:
                logger.warning("events of the pool are left out: the broker does not take them as fast as they come")

    def _start(self) -> None:
        with self._lock:
            if self._sender == fork_count():
                return
            self._sender = fork_count()
            self._queue = queue.Queue(WAITING)
            threading.Thread(target=self._send, args=(self._queue,), name="pool-events", daemon=True).start()

    def _send(self, waiting: "queue.Queue[tuple[str, dict[str, Any]]]") -> None:
        while True:
            kind, fields = waiting.get()
            try:
                with self._app.events.default_dispatcher(hostname=self._node) as dispatcher:
                    dispatcher.send(kind, **fields)
            except Exception as error:  # events are for who watches: nothing depends on them
                logger.debug("an event was not sent: %s", error)
