"""Turns: how many tasks of one key run at once. The others wait here, without a thread, and in order.

A shard whose tasks pile up here is left out of consumption until they have drained, so that one busy key neither fills
the node's prefetch nor its threads.
"""

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Container
from typing import Any, Generic, NamedTuple, TypeVar

J = TypeVar("J")


class Job(NamedTuple, Generic[J]):
    """A task that wants to run. Tasks without a key (None) are held back by nothing but the number of threads."""

    key: str | None
    queue: str
    work: J
    limit: int | None = None
    """How many jobs of this key run at once; None: as many as of any key."""


class Turns(Generic[J]):
    """At most *per_key* jobs of a key and *places* jobs in all run at once.

    ``start(job)`` is called for each one whose turn it is, ``pressed(queue, full)`` when too many of a queue's jobs
    wait, and when they do no longer. Any thread may call any method; callbacks come without a lock held.
    """

    def __init__(
        self, per_key: int, places: int, start: Callable[[Job[J]], Any], pressed: Callable[[str, bool], Any]
    ) -> None:
        self.per_key = per_key
        self.places = places
        self._start = start
        self._pressed = pressed
        self._lock = threading.Lock()
        self._running: dict[str | None, int] = {}
        self._total = 0
        self._waiting: OrderedDict[str | None, deque[Job[J]]] = OrderedDict()  # in the order of the keys' next turns
        self._backlog: dict[str, int] = {}
        self._full: set[str] = set()
        self._closed = False

    def ask(self, job: Job[J]) -> None:
        """Run the job now, or when its turn comes."""
        with self._lock:
            now = not self._closed and job.key not in self._waiting and self._free(job)
            if now:
                self._count(job)
            else:
                self._waiting.setdefault(job.key, deque()).append(job)
                self._backlog[job.queue] = self._backlog.get(job.queue, 0) + 1
            news = self._pressure(job.queue)
        if now:
            self._start(job)
        self._tell(news)

    def done(self, job: Job[J]) -> None:
        """A job has ended; start the one whose turn it is now."""
        with self._lock:
            self._total -= 1
            self._running[job.key] -= 1
            if not self._running[job.key]:
                del self._running[job.key]
            following = None if self._closed else self._next()
            news = self._pressure(following.queue) if following else None
        if following:
            self._start(following)
        self._tell(news)

    def withdraw(self, queues: Container[str] | None = None) -> list[Job[J]]:
        """Take out the jobs of these queues (None: all) that have not started; in order per key."""
        with self._lock:
            taken = []
            for key, jobs in list(self._waiting.items()):
                taken += [job for job in jobs if queues is None or job.queue in queues]
                staying = deque(job for job in jobs if queues is not None and job.queue not in queues)
                if staying:
                    self._waiting[key] = staying
                else:
                    del self._waiting[key]
            for job in taken:
                self._unlist(job)
            news = [self._pressure(queue) for queue in {job.queue for job in taken}]
        for each in news:
            self._tell(each)
        return taken

    def close(self) -> None:
        """Start nothing any more: what waits is there for `withdraw`."""
        with self._lock:
            self._closed = True

    @property
    def full(self) -> frozenset[str]:
        """Queues of which too many jobs wait."""
        with self._lock:
            return frozenset(self._full)

    @property
    def waiting(self) -> int:
        """Jobs that have not started."""
        return sum(self._backlog.values())

    def waiting_of(self, key: str) -> int:
        """Jobs of a key that have not started, in whatever lane."""
        with self._lock:
            return sum(len(jobs) for each, jobs in self._waiting.items() if each and each.partition("\0")[0] == key)

    def _free(self, job: Job[J]) -> bool:
        limit = job.limit or self.per_key
        return self._total < self.places and (job.key is None or self._running.get(job.key, 0) < limit)

    def _count(self, job: Job[J]) -> None:
        self._total += 1
        self._running[job.key] = self._running.get(job.key, 0) + 1

    def _next(self) -> Job[J] | None:
        for key, jobs in self._waiting.items():
            if self._free(jobs[0]):
                job = jobs.popleft()
                if jobs:
                    self._waiting.move_to_end(key)  # other keys first
                else:
                    del self._waiting[key]
                self._unlist(job)
                self._count(job)
                return job
        return None

    def _unlist(self, job: Job[J]) -> None:
        self._backlog[job.queue] -= 1
        if not self._backlog[job.queue]:
            del self._backlog[job.queue]

    def _pressure(self, queue: str) -> tuple[str, bool] | None:
        """Full when as many jobs wait as could run; open again when half of them have started."""
        waiting = self._backlog.get(queue, 0)
        if queue not in self._full and waiting >= self.per_key:
            self._full.add(queue)
            return queue, True
        if queue in self._full and waiting <= self.per_key // 2:
            self._full.discard(queue)
            return queue, False
        return None

    def _tell(self, news: tuple[str, bool] | None) -> None:
        if news:
            self._pressed(*news)
