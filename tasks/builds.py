"""Builds: one command on the user's warm backend."""

import os
from typing import Any

from celery import shared_task

from pool import CommandFailed, CommandLost, CommandTimeout, PooledTask


@shared_task(
    base=PooledTask,
    bind=True,
    key="user_id",
    secrets=("env", "stdin"),
    durable="durable",
    progress=True,
    throws=(CommandFailed, CommandLost, CommandTimeout),
)
def run_build(
    self: PooledTask,
    user_id: str,
    cmd: str,
    *,
    project: str | None = None,
    cwd: str | None = None,
    env: dict[str, str] | None = None,
    timeout: float | None = None,
    check: bool = True,
    durable: bool = False,
    stdin: str | None = None,
) -> dict[str, Any]:
    """Run *cmd* by ``/bin/sh`` on the backend of *user_id*, below ``projects/<project>`` if a project is given.

    *stdin*: what the command reads; without, it is empty. It and *env* may hold secrets: logs, events and Flower show
    ``***`` for them. *timeout*: seconds, then the command
    and all that it started is killed. *durable*: the command outlives its worker and the connection; when the task is
    delivered again, or retried, it goes on with the same command and does not start another (SSH with a helper only).
    Returns ``exit_code``, ``output`` (both streams as they came), ``truncated``, ``duration_s``, ``warm`` (the backend
    was connected before), ``key``, ``node`` and ``pid`` of the worker process.

    Fails with `CommandFailed` (exit code and the end of stderr in its message; not with ``check=False``),
    `CommandTimeout`, `CommandLost` (a durable command whose host was restarted), `PathEscapeError`, `FileMissing` (no
    such *cwd*), `ConfigError`. While the host is unavailable it is retried.
    """
    with self.acquire_backend() as borrowed:
        workspace = borrowed.backend
        if project is not None:
            workspace = workspace.scope(f"projects/{project}")
            workspace.mkdir(".")
        name = self.request.id if durable else None
        result = workspace.exec(cmd, cwd=cwd, env=env, timeout=timeout, check=check, durable=name, stdin=stdin)
        return {
            "exit_code": result.exit_code,
            "output": result.output,
            "truncated": result.truncated,
            "duration_s": round(result.duration, 6),
            "warm": borrowed.warm,
            "key": user_id,
            "node": self.request.hostname,
            "pid": os.getpid(),
        }
