import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

PATIENCE = (1.0, 8.0, 30.0)
"""Seconds after which a test cuts something off: the next ones, if the machine was too slow to come to the point."""


def wait_until(
    condition: Callable[[], T], what: str | Callable[[], str], timeout: float = 10.0, *, every: float = 0.01
) -> T:
    """Call *condition* until it returns something true, and return that; fail, naming *what*, after *timeout* seconds."""
    deadline = time.monotonic() + timeout
    while True:
        if result := condition():
            return result
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout} s: {what if isinstance(what, str) else what()}")
        time.sleep(every)
