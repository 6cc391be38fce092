"""Running checks: side by side, each with its own time limit, none able to stop the others."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import NamedTuple

from pool.doctor.finding import Finding, error, info

AT_ONCE = 16
"""Checks that run side by side; a login costs some 0.1 s of one core, and a time limit should not feel it."""


class Unreachable(Exception):
    """What a check needs to ask does not answer; another check says so as its finding."""


class Check(NamedTuple):
    """A function that yields findings, and what to call it in messages."""

    name: str
    run: Callable[[], Iterable[Finding]]


def examine(checks: Sequence[Check], timeout: float) -> list[Finding]:
    """Run them, each for *timeout* seconds at most; return the findings in the order of the checks.

    One that takes longer is left alone in its (daemon) thread: what it has found by then counts, and one error more.
    """
    runs = [_Run(check) for check in checks]
    waiting, running = deque(runs), dict[_Run, float]()
    ended: SimpleQueue[_Run] = SimpleQueue()
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            run = waiting.popleft()
            running[run] = time.monotonic() + timeout
            threading.Thread(target=run.go, args=(ended,), name=f"doctor-{run.check.name}", daemon=True).start()
        with suppress(Empty):
            running.pop(ended.get(timeout=max(0.0, min(running.values()) - time.monotonic())), None)
        for run in [run for run, deadline in running.items() if deadline <= time.monotonic()]:
            del running[run]
            run.give_up(timeout)
    return [finding for run in runs for finding in run.found]


class _Run:
    """One check in its thread."""

    def __init__(self, check: Check) -> None:
        self.check = check
        self.found: list[Finding] = []
        self._over = False
        self._lock = threading.Lock()

    def go(self, ended: "SimpleQueue[_Run]") -> None:
        try:
            for finding in self.check.run():
                self._note(finding)
        except Unreachable as problem:
            text = f"Not checked: {self.check.name}. {problem}."
            self._note(info("not-checked", text, "Nothing is known about it.", "See what else was found first."))
        except Exception as problem:
            self._note(
                error(
                    "check-failed",
                    f"{self.check.name}: the check failed: {type(problem).__name__}: {problem}",
                    "Nothing more is known about it.",
                    "Follow what the message says; if it says nothing, report it as a bug of the doctor.",
                )
            )
        ended.put(self)

    def give_up(self, timeout: float) -> None:
        late = error(
            "check-timeout",
            f"{self.check.name}: not done within {timeout:g} s.",
            "Something that it asks hangs, or this machine is overloaded.",
            f"Look there first; then try again with a longer timeout than {timeout:g} s.",
        )
        with self._lock:
            if not self._over:
                self.found.append(late)
            self._over = True

    def _note(self, finding: Finding) -> None:
        with self._lock:
            if not self._over:
                self.found.append(finding)
