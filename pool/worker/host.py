"""The process of a worker that has the backends: who listens there, what it tells, and the tasks it runs."""

import threading
from collections import Counter
from typing import Any

from pool.live.output import LiveOutput
from pool.manager import BackendPoolManager
from pool.observer import Observer, Observers
from pool.runtime import loop_thread
from pool.tracing import tracing_observer
from pool.worker.guard import Guard
from pool.worker.report import Report
from pool.worker.running import Running


class Host:
    """Made once in each such process, before its pool, by *extension* (the `WarmPool` of a worker)."""

    def __init__(self, extension: Any) -> None:
        self._extension = extension
        settings = extension.settings
        self.live: LiveOutput | None = None
        if settings.redis_url is not None and settings.live_output_mb:
            keep = int(1e6 * settings.live_output_mb)
            self.live = LiveOutput(settings.redis_url, settings.namespace, keep_bytes=keep, ttl=settings.live_ttl)
        self.running = Running(self.live, extension.limits)
        self.metrics: Any = None
        if settings.metrics_port:
            from pool.metrics import PoolMetrics

            self.metrics = PoolMetrics(self._counts)
            self.metrics.watch_loop(loop_thread().loop)
        others = [observer for observer in (self.metrics, tracing_observer()) if observer is not None]
        self.observer: Observer = Observers(extension.steps, *others) if others else extension.steps

    def begin(self, pool: BackendPoolManager[Any]) -> None:
        """Look after *pool*."""
        extension = self._extension
        guard = Guard(extension.ownership, pool)
        if extension.settings.leased:
            guard.watch()
        extension.line.listen(
            {"look": guard.look, "cancel": self.running.cancel, "sweep": lambda: loop_thread().spawn(pool.asweep())}
        )
        if not extension.in_process:
            loop_thread().spawn(Report(extension).post())

    def _counts(self) -> dict[str, Any]:
        """What a scrape of the metrics reads."""
        pool: BackendPoolManager[Any] = self._extension.pool
        stats = pool.get_stats()
        backends = Counter((info.state, info.kind) for info in pool.get_backends())
        return {"backends": backends, "waiting": stats.waiting, "oldest_busy_s": stats.oldest_busy}

    def close(self) -> None:
        """The pool is closed: let out what followers have not seen yet (bounded)."""
        if self.live is not None and threading.current_thread() is not loop_thread().thread:
            self.live.close()
