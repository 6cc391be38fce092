"""Bugs that are put in on purpose: each breaks one rule of the machine, the store, the broker or the driver."""

from contextlib import ExitStack, contextmanager
from typing import NamedTuple
from unittest.mock import patch

from pool.sharding.lease import NEVER, LeaseMachine
from tests.simulation.node import Process
from tests.simulation.world import Broker, Hosts
from tests.support import lease_store


class Mutation(NamedTuple):
    """A bug, and where to look for it."""

    replacements: list[tuple[type, str, object]]
    caught_by: str
    """The checker that has to find it ..."""
    seeds: int
    """... within so many seeds ..."""
    kinds: tuple[str, ...]
    """... under these faults. Empty: each seed's own choice."""
    grace: float = 0.0
    """Seconds; more than 0: with a fence at the build hosts."""


@contextmanager
def mutated(name: str):
    """Run with the bug *name*."""
    with ExitStack() as stack:
        for owner, attribute, replacement in MUTATIONS[name].replacements:
            stack.enter_context(patch.object(owner, attribute, replacement))
        yield


_answered, _request, _tick, _takes = (
    LeaseMachine.answered,
    LeaseMachine.request,
    LeaseMachine.tick,
    LeaseMachine._takes,
)
_tell_the_time = lease_store._Run._tell_the_time
_restore = Process._restore


def _trusts_the_whole_ttl(self, request, answer, now):
    before = self.trusted_until
    instructions = _answered(self, request, answer, now)
    if before != self.trusted_until > NEVER:
        self.trusted_until += self.terms.margin
    return instructions


def _hurries(method):
    def hurried(self, *arguments):
        settled, self.settled = self.settled, True
        try:
            return method(self, *arguments)
        finally:
            self.settled = settled

    return hurried


def _never_quarantined(self):
    _tell_the_time(self)
    self.table.quarantine = 0


def _asserts_nothing(self, now):
    return _request(self, now)._replace(asserts=())


def _serves_before_restoring(self, instruction):
    self._after(0.0, self._happened, "restored", instruction.tenancies)
    self._after(0.5, _restore, self, instruction._replace(tenancies=()))


def _buries_alive(self, instruction):
    self.machine.bury(instruction.dead)
    self._after(0.0, self._happened, "restored", instruction.tenancies)


def _closes_at_once(self, instruction):
    self.pending.pop(instruction.tenancy, None)
    self._kill(instruction.tenancy)
    self._unserve(instruction.tenancy)
    self._after(0.0, self._happened, "closed", [instruction.tenancy])


def _gives_up_releases(self, now):
    return [] if self.trusts(now) else self._lose(list(self.tenancies.values()), now)


def _asserts_what_it_trusts(self, tenancy, now):
    return self.trusts(now)


def _lets_everybody_in(self, line, run, until):
    return True


def _counts(self):
    self.table.epoch += 1
    return self.table.epoch


def _nothing(self, *arguments):
    """Whatever this was to do."""


def _always(self, *arguments):
    return True


MUTATIONS = {
    "the margin is 0": Mutation(
        [(LeaseMachine, "answered", _trusts_the_whole_ttl)], "one_process", 20, ("pause", "drift", "cut_store")
    ),
    "trust never ends": Mutation(
        [(LeaseMachine, "trusts", lambda self, now: self.trusted_until > NEVER)], "one_owner", 40, ()
    ),
    "dead claimants may take, and only the dead of the table are restored": Mutation(
        [(Broker, "may_take", _always), (LeaseMachine, "registered", _nothing)],
        "nothing_lost",
        100,
        ("crash", "late", "lose"),
    ),
    "only the dead of the table are restored": Mutation(
        [(LeaseMachine, "registered", _nothing)], "nothing_lost", 20, ("flush", "crash")
    ),
    "the dead are restored half a second after serving": Mutation(
        [(Process, "_restore", _serves_before_restoring)], "order", 20, ("crash",)
    ),
    "the dead are buried without being restored": Mutation(
        [(Process, "_restore", _buries_alive)], "nothing_lost", 30, ()
    ),
    "a reborn table is used at once": Mutation(
        [
            (lease_store._Run, "_tell_the_time", _never_quarantined),
            (LeaseMachine, "tick", _hurries(_tick)),
            (LeaseMachine, "_takes", _hurries(_takes)),
        ],
        "one_owner",
        40,
        ("fail_over", "leave", "drain"),
    ),
    "asserts are not sent": Mutation([(LeaseMachine, "request", _asserts_nothing)], "undisturbed", 10, ("flush",)),
    "a table that was set back is believed": Mutation(
        [(LeaseMachine, "_may_assert", _always)], "epochs_grow", 40, ("fail_over", "leave", "drain", "cut_store")
    ),
    "a lease is released before its work has ended": Mutation(
        [(Process, "_close", _closes_at_once)], "one_process", 10, ()
    ),
    "a release without an answer is forgotten": Mutation(
        [(LeaseMachine, "_lapse", _gives_up_releases)], "one_owner", 200, ("freeze_store", "leave", "drain")
    ),
    "the build hosts keep no fence": Mutation(
        [(Hosts, "_let_in", _lets_everybody_in)], "one_process", 20, ("cut_store",), 60.0
    ),
    "suspended leases are not asserted": Mutation(
        [(LeaseMachine, "_may_speak_for", _asserts_what_it_trusts)], "undisturbed", 20, ("flush", "stop_store"), 60.0
    ),
    "epochs are counted by the table alone": Mutation(
        [(lease_store._Run, "_next_epoch", _counts)], "epochs_grow", 60, ("flush", "crash")
    ),
}
