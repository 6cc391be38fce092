"""The tasks that run in this process: how each is ended from outside, what it has written, what ran last for a key."""

import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic, time
from typing import TYPE_CHECKING, Any, NamedTuple

from celery.exceptions import Ignore, Reject, Retry

from pool.backends.output import TAP
from pool.errors import CommandFailed, TaskCancelled
from pool.interrupt import Interrupt
from pool.worker.progress import Progress
from pool.worker.time_limits import Limits, TimeLimits

if TYPE_CHECKING:
    from pool.live.output import LiveOutput
    from pool.live.task import LiveTask

logger = logging.getLogger(__name__)

REMEMBERED = 1000
"""Keys whose last runs are remembered."""
EARLY = 100
"""Cancels of tasks that do not run (yet) that are remembered."""
LAST = 5
"""Runs of each."""


class Run:
    """One task at work. ``seconds`` and ``state`` are set at its end."""

    def __init__(self, task: Any, key: str | None, live: "LiveOutput | None") -> None:
        request = task.request
        self.task = task
        self.request = request
        self.task_id = str(request.id)
        self.key = key
        self.node = str(request.hostname)
        self.agent: str | None = None
        self.reports = task.progress and not request.ignore_result
        self.ending = threading.Lock()
        self.started = time()
        self.interrupt = Interrupt()
        self.bytes = 0
        self.lines = 0
        self.state = "STARTED"
        self.ended: float | None = None
        self._began = monotonic()
        self._live: LiveTask | None = None
        if live is not None and key is not None:
            facts = {"task": task.name, "key": key, "node": self.node, "started": self.started}
            attempt = task.same_output(request.args or (), request.kwargs or {})
            self._live = live.open(self.task_id, facts, attempt)

    @property
    def seconds(self) -> float:
        """Since it was started."""
        return (monotonic() if self.ended is None else self.ended) - self._began

    def feed(self, stream: str, data: bytes, missing: int) -> None:
        """Take a piece of what it writes, and how many bytes are missing before it; on the event loop."""
        self.bytes += missing + len(data)
        self.lines += data.count(b"\n")
        live = self._live
        if live is not None:
            live.feed(stream, data, missing)

    def end(self, state: str, exit_code: int | None) -> None:
        """It has ended; those who follow its output are told."""
        with self.ending:
            self.state, self.ended = state, monotonic()
        # What it has begun on the event loop (a connection) may keep this run for as long as it lives.
        live, self._live, self.request = self._live, None, None
        if live is not None:
            live.close(state, exit_code)

    def told(self) -> dict[str, Any]:
        """Describe it, for people."""
        told = self.past().told()
        if self.ended is None:
            del told["state"], told["ended"]
        return told

    def past(self) -> "Past":
        """Return what is remembered of it if it has just ended."""
        return Past(
            self.task_id, self.task.name, self.key, self.started, self.seconds,
            self.agent, self.bytes, self.lines, self.state, time(),
        )  # fmt: skip


class Past(NamedTuple):
    """What is remembered of a run; not the run itself, which has hold of the task's arguments."""

    task_id: str
    name: str
    key: str | None
    started: float
    seconds: float
    agent: str | None
    bytes: int
    lines: int
    state: str
    ended: float

    def told(self) -> dict[str, Any]:
        """Describe it, for people; made when they ask, not by each task."""
        rounded = {name: round(getattr(self, name), 3) for name in ("started", "seconds", "ended")}
        return {**self._asdict(), **rounded}


class Running:
    """Made once in each process that hosts backends.

    *limits*: the worker's own time limits, hard and soft; None: Celery sees to all time limits itself.
    """

    def __init__(self, live: "LiveOutput | None" = None, limits: Limits | None = None) -> None:
        self._live = live
        self._limits = limits
        self._lock = threading.Lock()
        self._runs: dict[Run, None] = {}  # of one id there may be two: RabbitMQ delivers again what it lost sight of
        self._last: OrderedDict[str, deque[Past]] = OrderedDict()
        self._early: OrderedDict[str, str] = OrderedDict()  # cancelled between Celery's start of a task and ours
        self._progress = Progress(self.runs)

    @contextmanager
    def task(self, task: Any, key: str | None) -> Iterator[Run]:
        """Run the code of *task* inside of this block; its end is told by what it raises."""
        run = Run(task, key, self._live)
        with self._lock:
            self._runs[run] = None
            early = self._early.pop(run.task_id, None)
        if early is not None:
            run.interrupt.set(TaskCancelled(early))
        if run.reports:
            self._progress.wanted()
        limits = None if self._limits is None else TimeLimits.of(run, self._limits)
        token = TAP.set(run.feed)
        state, exit_code = "SUCCESS", None
        try:
            with run.interrupt:
                yield run
        except BaseException as error:
            state = _state_after(error)
            exit_code = error.exit_code if isinstance(error, CommandFailed) else None
            raise
        finally:
            TAP.reset(token)
            if limits is not None:
                limits.over()
            self._end(run, state, exit_code)

    def _end(self, run: Run, state: str, exit_code: int | None) -> None:
        run.end(state, exit_code)
        past = run.past()
        with self._lock:
            del self._runs[run]
            if run.key is not None:
                self._last.setdefault(run.key, deque(maxlen=LAST)).appendleft(past)
                self._last.move_to_end(run.key)
                if len(self._last) > REMEMBERED:
                    self._last.popitem(last=False)

    def uses(self, task_id: str, agent: str) -> None:
        """Note which of its key's backends a task has asked for."""
        for run in self._of(task_id):
            run.agent = agent

    def cancel(self, task_id: str, reason: str) -> bool:
        """End a task where it waits for its backend, or will next; False: it does not run here, or not yet."""
        with self._lock:
            runs = self._of(task_id)
            if not runs:
                self._early[task_id] = reason
                if len(self._early) > EARLY:
                    self._early.popitem(last=False)
        for run in runs:
            logger.info("cancelling task %s of key %s after %.1f s: %s", task_id, run.key, run.seconds, reason)
            run.interrupt.set(TaskCancelled(reason))
        return bool(runs)

    def _of(self, task_id: str) -> list[Run]:
        return [run for run in list(self._runs) if run.task_id == task_id]

    def runs(self, key: str | None = None) -> list[Run]:
        """Those under way, of one key or of all, oldest first."""
        with self._lock:
            return [run for run in self._runs if key is None or run.key == key]

    def last(self, key: str | None = None) -> dict[str, list[dict[str, Any]]]:
        """Describe the last runs that have ended, newest first, of one key or of all."""
        with self._lock:
            last = {each: list(runs) for each, runs in self._last.items() if key is None or each == key}
        return {each: [past.told() for past in runs] for each, runs in last.items()}


def _state_after(error: BaseException) -> str:
    if isinstance(error, Ignore | TaskCancelled):
        return "REVOKED"
    if isinstance(error, Retry):
        return "RETRY"
    return "REJECTED" if isinstance(error, Reject) else "FAILURE"
