"""Celery's state PROGRESS for tasks that take long: how much they have written, and for how long they run."""

import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pool.worker.running import Run

logger = logging.getLogger(__name__)

INTERVAL = 1.0
"""Seconds between two reports of a task; one that ends before reports nothing."""


class Progress:
    """A thread, started by the first task that wants it, which writes to the result backend.

    That may block for as long as it is away: never in the task's own thread, and never on the event loop.
    """

    def __init__(self, runs: Callable[[], list["Run"]]) -> None:
        self._runs = runs
        self._lock = threading.Lock()
        self._started = False

    def wanted(self) -> None:
        """There is a task that reports progress."""
        if self._started:
            return
        with self._lock:
            start, self._started = not self._started, True
        if start:
            threading.Thread(target=self._report, name="pool-progress", daemon=True).start()

    def _report(self) -> None:
        while True:
            time.sleep(INTERVAL)
            for run in self._runs():
                if run.reports and run.seconds >= INTERVAL:
                    try:
                        _store(run)
                    except Exception as error:
                        logger.info("the progress of task %s was not stored: %s", run.task_id, error)


def _store(run: "Run") -> None:
    """Write one report; the run's end waits for it, so that it never comes after the task's own state."""
    with run.ending:
        if run.ended is None:
            meta = {
                "bytes": run.bytes,
                "lines": run.lines,
                "elapsed": round(run.seconds, 3),
                "key": run.key,
                "node": run.node,
            }
            run.task.backend.store_result(run.task_id, meta, "PROGRESS", request=run.request)
