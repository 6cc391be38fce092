"""What a pool tells of while it works: steps in the lives of its backends, and how long things took."""

import logging
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

logger = logging.getLogger("pool.steps")

FAILED = "an observer of the pool failed: %s"

StepName = Literal["created", "failed", "evicted", "retired", "closed"]


class Step(NamedTuple):
    """One step in the life of a backend. A documented interface: names stay."""

    what: StepName
    """``created``: it is connected; ``failed``: it could not be; ``evicted``: idle for too long, or the least recently
    used of a full pool; ``retired``: takes nobody new, is closed when its users are done; ``closed``: gone."""
    key: str
    """``(none)`` for a backend without a key, ``(shared)`` for one that many keys share."""
    agent: str
    kind: str
    """Of backend (``ssh``, ``local``, ...); "" as long as there is none."""
    reason: str = ""
    """failed: as `BackendUnavailable.reason`; evicted: ``idle`` or ``lru``; retired: ``config``, ``lost``,
    ``lifetime``, ``key_closed`` or ``replaced``; closed: why it left the pool, which besides these may be ``released``
    (it had no key), ``expelled`` (its shard was lost) or ``shutdown``."""
    seconds: float = 0.0
    """created, failed: what the connect took; evicted: for how long it was idle; else since it was connected."""


class Observer:
    """Hears of everything that a pool does; this one writes the steps to the log ``pool.steps``.

    Methods are called on any thread, with no lock held, and must not block. What they raise is logged and forgotten.
    """

    def step(self, step: Step) -> None:
        """A backend took a step."""
        logger.info("backend %s: %s", step.what, " ".join(f"{k}={v}" for k, v in step._asdict().items() if k != "what"))

    def acquired(self, key: str, agent: str, seconds: float, *, warm: bool, error: str = "") -> None:
        """An acquire ended after *seconds*; *error*: the name of the class of what it raised."""

    def connected(self, key: str, agent: str, kind: str, seconds: float, error: str = "") -> None:
        """A connect ended; *error*: as `Step.reason`. Called in the acquiring context, for traces."""

    def executed(self, kind: str, seconds: float, outcome: str) -> None:
        """A command (or a turn of an agent) ended in the calling context.

        *kind*: of backend. *outcome*: ``ok``, ``failed`` (exit code), or the name of the class of what was raised.
        """


class Observers(Observer):
    """Tells each of several observers, in order. What one raises is logged and keeps nothing from the others."""

    def __init__(self, *observers: Observer) -> None:
        # Who does not listen is not called: an acquire of a warm backend costs no more than this loop.
        self._step = [o.step for o in observers]
        self._acquired = [o.acquired for o in observers if type(o).acquired is not Observer.acquired]
        self._connected = [o.connected for o in observers if type(o).connected is not Observer.connected]
        self._executed = [o.executed for o in observers if type(o).executed is not Observer.executed]

    def step(self, step: Step) -> None:
        self._tell(self._step, step)

    def acquired(self, key: str, agent: str, seconds: float, *, warm: bool, error: str = "") -> None:
        for acquired in self._acquired:  # as `_tell`, which costs as much as a listener does: the hot path
            try:
                acquired(key, agent, seconds, warm=warm, error=error)
            except Exception:
                logger.exception(FAILED, getattr(acquired, "__qualname__", acquired))

    def connected(self, key: str, agent: str, kind: str, seconds: float, error: str = "") -> None:
        self._tell(self._connected, key, agent, kind, seconds, error)

    def executed(self, kind: str, seconds: float, outcome: str) -> None:
        self._tell(self._executed, kind, seconds, outcome)

    @staticmethod
    def _tell(methods: Iterable[Callable[..., None]], *what: Any, **more: Any) -> None:
        for method in methods:
            try:
                method(*what, **more)
            except Exception:
                logger.exception(FAILED, getattr(method, "__qualname__", method))
