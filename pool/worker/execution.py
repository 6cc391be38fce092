"""Celery's execution pools: which of them keep a key in one process, and how their tasks are ended."""

from typing import Any

from celery.exceptions import WorkerTerminate
from celery.utils import log

from pool.errors import ConfigError


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
