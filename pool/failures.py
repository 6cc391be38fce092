"""What callers are told who get no backend; failed connects are remembered, to spare a host that is down. Pure."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pool.config import PoolConfig
from pool.entry import Identity, Waiter
from pool.errors import AcquireTimeout, BackendUnavailable, PoolError, PoolExhausted


@dataclass(frozen=True)
class Failure:
    """The last failed connect of one identity, with this config; remembered until ``retry_at``."""

    config: dict[str, Any]
    attempts: int
    retry_at: float
    error: BackendUnavailable


class FailureMemory:
    """Failures by identity. Each one in a row is remembered for about twice as long as the one before."""

    def __init__(self, jitter: Callable[[], float]) -> None:
        self._jitter = jitter  # -> [0, 1)
        self._failures: dict[Identity, Failure] = {}

    def fresh(self, identity: Identity, config: dict[str, Any], now: float) -> BackendUnavailable | None:
        """Return the error to raise instead of connecting now, if there is one for this very config."""
        failure = self._failures.get(identity)
        if failure is None or now >= failure.retry_at or failure.config != config:
            return None
        return with_retry_after(failure.error, failure.retry_at - now)

    def remember(
        self, identity: Identity, config: dict[str, Any], error: BackendUnavailable, now: float, settings: PoolConfig
    ) -> BackendUnavailable:
        """Note a failure; return its error with ``retry_after`` set.

        None there means that only a person can help, and stays; the host is spared repeated attempts all the same.
        """
        before = self._failures.get(identity)
        attempts = before.attempts + 1 if before is not None and before.config == config else 1
        wait = min(settings.backoff_max, settings.backoff_base * 2 ** min(attempts - 1, 30))
        wait *= 0.5 + self._jitter() / 2  # [0.5, 1): callers that failed together do not come back together
        error = with_retry_after(error, wait)
        self._failures[identity] = Failure(config, attempts, now + wait, error)
        return error

    def forget(self, identity: Identity) -> None:
        """It connected, or its key was closed."""
        self._failures.pop(identity, None)

    def prune(self, now: float, age: float) -> None:
        """Forget what was to be retried more than *age* seconds ago."""
        for identity in [i for i, failure in self._failures.items() if now - failure.retry_at > age]:
            del self._failures[identity]

    def __getitem__(self, identity: Identity) -> Failure:
        return self._failures[identity]

    def __len__(self) -> int:
        return len(self._failures)


def with_retry_after(error: BackendUnavailable, retry_after: float) -> BackendUnavailable:
    """Return a copy that says when to retry, unless only a person can help."""
    copy = BackendUnavailable(str(error), error.reason, None if error.retry_after is None else retry_after)
    copy.__cause__ = error.__cause__
    return copy


def came_too_late(waiter: Waiter, phase: str, timeout: float, limit: str, counts: Mapping[str, int]) -> AcquireTimeout:
    """Return the error of a waiter that was not served within *timeout* seconds. *limit*: what the room is short of."""
    told = ", ".join(f"{n} {what}" for what, n in counts.items())
    who = f"backend {waiter.identity[1]!r} of key {waiter.identity[0]!r}" if waiter.pooled else "a fresh backend"
    if phase == "room":
        return PoolExhausted(f"no room for {who} within {timeout:g} s: {limit} ({told})", phase, counts)
    what = "it is still connecting" if phase == "connect" else "all its turns are taken"
    return AcquireTimeout(f"no {who} within {timeout:g} s: {what} ({told})", phase, counts)


def for_each_waiter(error: PoolError) -> PoolError:
    """Return a copy: each waiter raises an exception object of its own, so that tracebacks do not mix."""
    copy = type(error)(*error.args)
    copy.__cause__ = error.__cause__
    return copy
