"""Ctrl-C while a task is followed: the first one cancels the task, the second one leaves."""

import signal
import threading
from types import FrameType
from typing import Any, Self

from pool.cli.cancel import cancelled
from pool.cli.command import TIMEOUT
from pool.cli.nodes import Nodes, Problem
from pool.cli.screen import Screen

REASON = "cancelled by Ctrl-C"


class CancelOnInterrupt:
    """Entered, in the main thread: Ctrl-C cancels the task; raises `KeyboardInterrupt` when it comes again."""

    def __init__(self, app: Any, screen: Screen, task_id: str) -> None:
        self._app = app
        self._screen = screen
        self._task_id = task_id
        self._asked = False
        self._before: Any = None

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._interrupted)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _interrupted(self, _number: int, _frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        # The one that follows is in the middle of something: nothing is raised in it, and it waits for nothing.
        threading.Thread(target=self._cancel, name="pool-cancel", daemon=True).start()

    def _cancel(self) -> None:
        self._screen.note("cancelling; Ctrl-C again leaves the task alone", "yellow")
        try:
            found = cancelled(Nodes(self._app, TIMEOUT), self._task_id, REASON)
        except Problem as problem:
            self._screen.note(f"cannot cancel: {problem}", "bold red")
            return
        if not found.ok and found.found != "over":
            self._screen.note(f"cannot cancel: {found.message}", "bold red")
