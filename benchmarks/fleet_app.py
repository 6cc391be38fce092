"""The project's own app, plus a task that keeps a ledger: what started and ended where, and when.

BENCH_LEDGER: the file. A line is written in one piece by whoever runs the task, so that it outlives a killed worker.
BENCH_HURRY: a file; while it is there, no task pauses.
"""

import os
import time
from typing import Any

from celery import signals

from pool import PooledTask
from worker_config import app

__all__ = ["app", "step"]

_file = os.open(os.environ["BENCH_LEDGER"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)


def _note(what: str, task: Any, number: int, key: str) -> None:
    os.write(_file, f"{what} {time.time():.6f} {task.request.hostname} {number} {key}\n".encode())


@app.task(base=PooledTask, bind=True, key="key", name="bench.step", ignore_result=True)
def step(self: PooledTask, key: str, number: int, command: str = "", pause: float = 0.0) -> None:
    """Borrow the key's backend, run *command* on it if there is one, hold it for *pause* seconds more."""
    with self.backend() as backend:
        _note("start", self, number, key)
        if command:
            backend.exec(command)
        if pause and not os.path.exists(os.environ["BENCH_HURRY"]):
            time.sleep(pause)
        _note("end", self, number, key)


@signals.task_failure.connect
def _failed(sender: Any = None, args: Any = (), **_kwargs: Any) -> None:
    if sender is not None and sender.name == step.name:
        _note("fail", sender, args[1], args[0])
