"""One shard on one node, from getting its lease to letting go of it: a table, and what the driver is told to do.

Handoff, the way out of a node that lives: stop consuming and give back what has not started, let running work finish
(draining), close the shard's backends, release the lease to its next owner. `lease.py` decides when each step is taken.
"""

from collections import deque
from collections.abc import Mapping
from typing import Literal, NamedTuple

State = Literal["restoring", "serving", "stopping", "draining", "closing", "releasing", "suspended", "losing", "gone"]
Event = Literal["restored", "move", "stopped", "idle", "overdue", "closed", "released", "silence", "lose", "abandoned"]

TRANSITIONS: Mapping[State, Mapping[Event, State]] = {
    # We have the lease. What dead nodes had taken from the shard's queue goes back into it before we consume.
    "restoring": {"restored": "serving", "silence": "suspended", "lose": "losing"},
    "serving": {"move": "stopping", "silence": "suspended", "lose": "losing"},
    "stopping": {"stopped": "draining", "silence": "suspended", "lose": "losing"},
    "draining": {"idle": "closing", "overdue": "closing", "silence": "suspended", "lose": "losing"},
    "closing": {"closed": "releasing", "lose": "losing"},
    "releasing": {"released": "gone"},
    # The store is silent, so the lease may be somebody else's: nothing starts, and only what a host would end for a
    # newer owner goes on. If it is ours after all we hand it over to ourselves: the next tenancy goes on with that.
    "suspended": {"released": "gone", "idle": "losing", "lose": "losing"},
    # The lease is, or may be, somebody else's: everything under it ends at once.
    "losing": {"abandoned": "gone"},
    "gone": {},
}

MAY_RUN: frozenset[State] = frozenset({"serving", "stopping", "draining"})
"""States in which tasks of the shard may run, and begin."""


class Source(NamedTuple):
    """From whom a shard came: ``handed`` over by a node that lives, or that of a ``dead`` one; "": nobody had it.

    ``kept``: from ourselves, after a time in which the store was silent.
    """

    how: Literal["", "handed", "dead", "kept"]
    node: str


NOBODY = Source("", "")
KEPT = Source("kept", "")


class IllegalTransition(RuntimeError):
    """A bug in this package: an event that the state does not know, with the shard's recent history."""


class Tenancy:
    """One stay of a shard at this node, under one epoch. A shard that comes back begins a new one."""

    __slots__ = ("born", "epoch", "history", "moved", "shard", "since", "source", "state")

    def __init__(self, shard: int, epoch: int, now: float, source: Source = NOBODY) -> None:
        self.shard = shard
        self.epoch = epoch
        self.source = source
        self.born = now  # monotonic seconds, like the next two
        self.moved = now  # when its way out began
        self.since = now  # when the present state began
        self.state: State = "restoring"
        self.history: deque[str] = deque(maxlen=12)

    def apply(self, event: Event, now: float) -> None:
        """Follow the table; raise `IllegalTransition` with the history when it has no such step."""
        try:
            self.state = TRANSITIONS[self.state][event]
        except KeyError:
            raise IllegalTransition(
                f"{event!r} in state {self.state!r} of {self!r}; before: {' '.join(self.history) or 'nothing'}"
            ) from None
        self.since = now
        if event == "move":
            self.moved = now
        self.history.append(event)

    def expects(self, event: Event) -> bool:
        """Whether the table knows the event here."""
        return event in TRANSITIONS[self.state]

    def __repr__(self) -> str:
        return f"<Tenancy of shard {self.shard} epoch {self.epoch} {self.state}>"


class Restore(NamedTuple):
    """Put back what *dead* nodes had taken and not settled; then ``restored``."""

    tenancies: tuple[Tenancy, ...]
    dead: tuple[str, ...]


class Serve(NamedTuple):
    """Consume the shard's queue; tasks may run under this epoch."""

    tenancy: Tenancy


class Stop(NamedTuple):
    """Stop consuming, give back what has not started; then ``stopped``. Then watch for ``idle``."""

    tenancy: Tenancy


class Close(NamedTuple):
    """No task may run any more: close the shard's backends, also those in use; then ``closed``."""

    tenancy: Tenancy


class Suspend(NamedTuple):
    """Stop consuming, give back what has not started, start nothing; close the backends whose commands nobody fences.

    After it comes `Serve` of the next tenancy, or `Abandon`. While the node leaves, watch for ``idle``.
    """

    tenancy: Tenancy


class Abandon(NamedTuple):
    """`Stop` and `Close` at once, because the lease is lost; then ``abandoned``."""

    tenancy: Tenancy


class Beat(NamedTuple):
    """Talk to the store now, not at the next heartbeat."""


class Rejoin(NamedTuple):
    """The others took this node for dead: it needs a new incarnation. Then ``LeaseMachine.rejoin``."""


Instruction = Restore | Serve | Stop | Close | Suspend | Abandon | Beat | Rejoin
