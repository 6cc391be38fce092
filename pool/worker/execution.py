"""Celery's execution pools: which of them keep a key in one process, whose turn it is, and how tasks are ended."""

import logging
import time
from typing import Any

from celery.concurrency.base import apply_target
from celery.exceptions import WorkerTerminate
from celery.utils import log
from celery.worker import state

from pool.errors import ConfigError
from pool.worker.router import KEY_HEADER
from pool.worker.turns import Job, Turns

logger = logging.getLogger(__name__)

RETRY_PAUSE = 5.0
"""Seconds until a message goes back whose task's end could not be told."""


def check_execution_pool(worker: Any) -> bool:
    """Return whether tasks run in the worker's own process. Raises `ConfigError` where a key would not stay in one."""
    module = worker.pool_cls.__module__
    kind = module.rpartition(".")[2]
    if kind in ("thread", "solo"):
        return True
    if kind != "prefork":
        raise ConfigError(
            f"execution pool {kind!r}: backends do their IO on an event loop in a thread of their own, which green"
            " threads would patch away. Use POOL_EXECUTION=threads (the default), prefork or solo"
        )
    children = max(int(worker.concurrency or 1), *(int(n) for n in (getattr(worker, "autoscale", None) or (1,))))
    if children > 1:
        raise ConfigError(
            f"execution pool 'prefork' with {children} children: Celery gives a task to any free child, so that one key"
            " would have a backend in each. Use POOL_EXECUTION=threads, or start several nodes with prefork and -c 1"
        )
    return False


def with_turns(pool_cls: Any, extension: Any) -> Any:
    """Return a threads pool in which the tasks of one key take turns; see `Turns`.

    Celery submits each task to the executor at once, where those of a busy key would stand before everybody else's.
    ``extension.turns`` is how others see who waits.
    """

    class TaskPool(pool_cls):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.turns = extension.turns = Turns(
                extension.settings.key_concurrency, self.limit, self._start_job, extension.pressed
            )

        def on_apply(self, target: Any, args: Any = None, kwargs: Any = None, **options: Any) -> "Call":
            call = Call(target, args, kwargs, options.get("callback"), options.get("accept_callback"))
            self.turns.ask(call.job(extension))
            return call

        def _start_job(self, job: Job["Call"]) -> None:
            self.executor.submit(self._run_job, job)

        def _run_job(self, job: Job["Call"]) -> None:
            try:
                job.work.run()
            finally:
                self.turns.done(job)

        def on_close(self) -> None:
            self.turns.close()
            super().on_close()

    TaskPool.__module__ = pool_cls.__module__  # by which Celery names the pool
    return TaskPool


class Call:
    """One task for a thread: what Celery's pool is told to call."""

    def __init__(self, target: Any, args: Any, kwargs: Any, callback: Any, accept_callback: Any) -> None:
        self._call = (target, args, kwargs, callback, accept_callback)
        self.request = getattr(accept_callback, "__self__", None)

    def job(self, extension: Any) -> Job["Call"]:
        """With its key, and the lane of its task. A foreign producer without a key header: one key per queue."""
        headers = self._call[1][2]  # of trace_task(name, id, headers, ...)
        shard = extension.router.shard_in(headers.get("delivery_info"))
        if shard is None:
            return Job(None, (headers.get("delivery_info") or {}).get("routing_key") or "", self)
        queue = extension.router.queues[shard].name
        key = headers.get(KEY_HEADER, queue)
        lane = extension.lane_of(self._call[1][0])
        if lane is None:
            return Job(key, queue, self)
        return Job(f"{key}\0{lane}", queue, self, 1)  # no key holds a control character

    def run(self) -> None:
        """Call it in this thread, unless it was revoked or has expired while it waited.

        What Celery cannot handle (a result backend that refuses to store how the task ended, out of memory) would be
        lost with the thread's future, and with it the message. It goes back, and is tried again a moment later.
        """
        try:
            if self.request is None or not self.request.revoked():
                apply_target(*self._call)
        except Exception as error:
            logger.exception("how a task ended could not be told: its message goes back")
            if self.request is not None:
                time.sleep(RETRY_PAUSE)  # with its key's turn: the order is kept
                state.task_ready(self.request)
                if isinstance(error, MemoryError):  # Celery has stored that as the task's failure
                    self.request.acknowledge()
                else:
                    self.request.reject(requeue=True)

    def terminate(self, signal: int) -> None:
        """Celery's last word to a task that it terminates: nothing is left to do.

        One that waits is revoked by now and will not run; one that runs was ended by `interruptible`.
        """


def interruptible(pool_cls: Any, extension: Any) -> Any:
    """Return an execution pool whose tasks a cold shutdown can end.

    Celery's threads and solo pools do not know how, so its handler of QUIT fails in them: the worker waits for the
    running build after all, or the build is recorded as failed. Closing the backends ends what runs in threads, and
    each message goes back (`PooledTask.__call__`); in solo the handler runs on top of the task, and unwinds it.
    Revoking a running task stays unsupported, as Celery documents it.
    """
    solo = pool_cls.__module__.endswith(".solo")

    class TaskPool(pool_cls):
        def terminate_job(self, pid: int, signal: int | None = None) -> None:
            if not log._in_sighandler:
                super().terminate_job(pid, signal)
            elif solo:
                raise WorkerTerminate(1)
            else:
                extension.close(grace=0.0)

    TaskPool.__module__ = pool_cls.__module__  # by which Celery names the pool
    return TaskPool
