"""What became of a task, as its result backend knows it."""

import threading
import time
from typing import Any, NamedTuple

from celery import states

from pool.cli.command import INTERRUPTED
from pool.cli.nodes import Problem, within
from pool.errors import CommandFailed, CommandTimeout

LOOK = 0.05
LOOK_AT_MOST = 0.5
"""Seconds between two looks: at first, and in the end."""
PATIENCE = 5.0
"""Seconds for a result backend to answer one look."""
TIMED_OUT = 124
"""As of ``timeout`` from coreutils."""


class Outcome(NamedTuple):
    """The state of a task, and its result or error."""

    state: str
    result: Any

    @property
    def ended(self) -> bool:
        """Whether nothing more comes."""
        return self.state in states.READY_STATES

    @property
    def exit_code(self) -> int:
        """What a shell would say of the task's command."""
        if self.state == states.SUCCESS:
            code = self.result.get("exit_code", 0) if isinstance(self.result, dict) else 0
        elif self.state == states.REVOKED:
            return INTERRUPTED
        elif isinstance(self.result, CommandTimeout):
            return TIMED_OUT
        else:
            code = self.result.exit_code if isinstance(self.result, CommandFailed) else 1
            code = code or 1
        return code if 0 <= code < 256 else 128 + (-code & 127) if code < 0 else 255

    @property
    def error(self) -> str:
        """Why it failed; "": it did not."""
        if self.state not in states.PROPAGATE_STATES:
            return ""
        kind = type(self.result).__name__
        return str(self.result) if isinstance(self.result, CommandFailed) else f"{kind}: {self.result}"


def outcome_of(app: Any, task_id: str, timeout: float = PATIENCE) -> Outcome:
    """Look at the result backend once. Raises `Problem` if it does not answer."""

    def look() -> Outcome:
        meta = app.backend.get_task_meta(task_id, cache=False)
        return Outcome(meta["status"], meta.get("result"))

    return within(timeout, look, "the result backend")


def wait_for(app: Any, task_id: str, seconds: float | None = None) -> Outcome:
    """Wait for the end of a task; after *seconds* return what there is. Raises `Problem` as `outcome_of`.

    It looks, instead of waiting to be told, for a result backend that is away for a moment may forget to tell.
    """
    deadline = None if seconds is None else time.monotonic() + seconds
    pause = LOOK
    stop = threading.Event()
    while True:
        try:
            found = outcome_of(app, task_id)
        except Problem:
            if deadline is None or time.monotonic() > deadline:
                raise
        else:
            if found.ended or (deadline is not None and time.monotonic() > deadline):
                return found
        stop.wait(pause)
        pause = min(LOOK_AT_MOST, 1.5 * pause)
