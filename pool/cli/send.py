"""Enqueueing a task."""

from collections.abc import Mapping, Sequence
from typing import Any

from celery import uuid

from pool.cli.nodes import Problem, reachable, within

PATIENCE = 5.0
"""Seconds for the broker to take a connection, and then a message."""


def send(app: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> str:
    """Enqueue a task of the app; return its id. Raises `Problem`, and `PoolError` for arguments that break a rule."""
    app.loader.import_default_modules()
    task = app.tasks.get(name)
    if task is None:
        raise Problem(f"the app {app.main!r} has no task {name!r}: include the module that defines it")
    reachable(app, PATIENCE)
    task_id = str(uuid())
    within(PATIENCE, lambda: task.apply_async(args, dict(kwargs or {}), task_id=task_id), "the broker")
    return task_id
