"""Time limits of tasks under threads and solo, where Celery keeps none.

The limits are the message's, else the task's, else the worker's, as with prefork. A task that waits for its backend is
ended there; one that computes is ended when it next comes to a door of the pool.
"""

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Self

from celery.exceptions import SoftTimeLimitExceeded, TimeLimitExceeded

from pool.runtime import loop_thread

if TYPE_CHECKING:
    from pool.worker.running import Run

logger = logging.getLogger(__name__)

Limits = tuple[float | None, float | None]
"""The hard and the soft time limit, in seconds; None: there is none."""


class TimeLimits:
    """The timers of one run."""

    def __init__(self, run: "Run", limits: Limits) -> None:
        self._run = run
        self._limits = limits
        self._timers: list[asyncio.TimerHandle] = []
        self._loop = loop_thread().loop
        self._loop.call_soon_threadsafe(self._start)

    @classmethod
    def of(cls, run: "Run", default: Limits) -> Self | None:
        """Start the timers of a run that has any."""
        hard, soft = limits_of(run.task, run.request, default)
        return cls(run, (hard, soft)) if hard or soft else None

    def _start(self) -> None:
        hard, soft = self._limits
        if self._run.ended is not None:
            return
        if soft:
            self._timers.append(self._loop.call_later(soft, self._soft, soft))
        if hard:
            self._timers.append(self._loop.call_later(hard, self._hard, hard))

    def _soft(self, seconds: float) -> None:
        logger.warning("Soft time limit (%ss) exceeded for %s[%s]", seconds, self._run.task.name, self._run.task_id)
        self._run.interrupt.set(SoftTimeLimitExceeded(seconds), once=True)

    def _hard(self, seconds: float) -> None:
        logger.error("Hard time limit (%ss) exceeded for %s[%s]", seconds, self._run.task.name, self._run.task_id)
        self._run.interrupt.set(TimeLimitExceeded(seconds))

    def over(self) -> None:
        """The run has ended."""
        self._loop.call_soon_threadsafe(self._stop)

    def _stop(self) -> None:
        for timer in self._timers:
            timer.cancel()


def limits_of(task: Any, request: Any, default: Limits) -> Limits:
    """Return the hard and the soft limit that hold for a message."""
    hard, soft = request.timelimit or (None, None)
    return hard or task.time_limit or default[0], soft or task.soft_time_limit or default[1]
