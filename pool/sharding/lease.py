"""What one node may do now: its membership, the leases it holds, and how long it may trust them.

Pure: events and the monotonic time go in, instructions come out (`handoff.py`); the driver is `coordinator.py`. The
store (`redis_store.py`) keeps one table for all nodes. Nodes never talk to each other: each works out from the table
who should own which shard, takes what is free and its own, and hands over what should be somebody else's.

A lease is as good as its owner's membership, which each answered request renews. A node trusts what it was told until
``request sent + ttl - margin`` on its own clock; the store waits ``ttl`` from a later moment on its clock. So nobody
can own a shard that somebody else still trusts to own, unless a clock errs by more than ``margin`` within ``ttl``.

A node whose trust ends in a silence of the store starts nothing. For ``grace`` seconds it lets go on what a host would
end for a newer owner (`suspended` in `handoff.py`); what is its own then it takes over from itself, under a new epoch.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pool.sharding.handoff import (
    KEPT,
    MAY_RUN,
    NOBODY,
    Abandon,
    Beat,
    Close,
    Event,
    Instruction,
    Rejoin,
    Restore,
    Serve,
    Source,
    State,
    Stop,
    Suspend,
    Tenancy,
)
from pool.sharding.placement import assign, by_rank

NodeState = Literal["active", "draining", "bye"]
Verdict = Literal["ok", "dead", "name", "shards"]

NEVER = float("-inf")

_CALLS_FOR: Mapping[State, type[Serve | Close | Abandon]] = {"serving": Serve, "closing": Close, "losing": Abandon}


@dataclass(frozen=True)
class Terms:
    """The times of a node, in seconds."""

    ttl: float = 5.0
    heartbeat: float = 1.0
    handoff_timeout: float = 300.0
    grace: float = 0.0
    """For how long fenced work may go on after the trust has ended; 0: everything ends with it."""

    @property
    def margin(self) -> float:
        """By how much a node stops trusting before the store would let others take over."""
        return self.ttl / 5


class Member(NamedTuple):
    """A node that the store takes for alive."""

    node: str
    state: NodeState


class Lease(NamedTuple):
    """Who owns a shard: an incarnation, or nobody (``""``). The epoch grows with each new owner."""

    epoch: int
    owner: str


class Release(NamedTuple):
    """Gives a lease up, to *successor* (an incarnation) if that is alive, else to nobody."""

    shard: int
    epoch: int
    successor: str


class Request(NamedTuple):
    """What a node tells the store, in one call."""

    incarnation: str
    node: str
    state: NodeState
    born: str
    """Which table it knows (a table that was lost and made anew is another one) ..."""
    seen: int
    """... and up to which version."""
    floor: int
    """The highest epoch it knows of."""
    takes: tuple[int, ...]
    releases: tuple[Release, ...]
    asserts: tuple[tuple[int, int], ...]
    """``(shard, epoch)`` that it holds, for a table that has forgotten them."""
    buried: tuple[str, ...]
    """Dead incarnations whose messages were put back."""
    elapsed: float
    """Seconds since it sent the request before, by its own clock; 0: there was none."""
    sent: float
    """Monotonic seconds of the node; for itself only."""


class Answer(NamedTuple):
    """What the store answers."""

    verdict: Verdict
    detail: str = ""
    born: str = ""
    version: int = 0
    settles_in: float = 0.0
    """Seconds until a new table may be trusted: until then nothing is taken and no lease is begun."""
    members: Mapping[str, Member] | None = None
    """All of them by incarnation; None: unchanged since the version that was seen."""
    leases: Mapping[int, Lease] | None = None
    """Those that changed since."""
    dead: tuple[str, ...] = ()
    """Incarnations that ended without a farewell and are not buried yet."""


class LeaseMachine:
    """The node's side of the protocol. One request at a time may be under way."""

    def __init__(self, incarnation: str, node: str, shards: int, terms: Terms) -> None:
        self.node = node
        self.shards = shards
        self.terms = terms
        self.tenancies: dict[int, Tenancy] = {}
        self.draining = False
        self.leaving = False
        self.finished = False
        """It has left; nothing more to do."""
        self._forget_everything(incarnation)

    def _forget_everything(self, incarnation: str) -> None:
        self.incarnation = incarnation
        self.joined = False
        self.fenced = False
        self._rejoining = False
        self.claimants: frozenset[str] = frozenset()
        self.born = ""
        self.version = 0
        self.floor = 0
        self.members: dict[str, Member] = {}
        self.leases: dict[int, Lease] = {}
        self.dead: tuple[str, ...] = ()
        self.settled = False
        self.target: dict[int, str] = {}
        self.trusted_until = NEVER
        self.next_request = NEVER
        self._mine: dict[int, int] = {}  # shard -> epoch, as the table says
        self._sources: dict[int, Source] = {}  # of leases that were given to us and have no tenancy yet
        self._disowned: dict[int, int] = {}  # what a table that was set back says: there may have been later owners
        self._asserting = False
        self._last_sent = NEVER
        self._buried: set[str] = set()
        self._seen_to: set[str] = set()
        self._asked: frozenset[int] = frozenset()
        self._claimants_asked: frozenset[str] = frozenset()

    # -- talking to the store

    def request(self, now: float) -> Request:
        """What to send now."""
        self.next_request = now + self.terms.heartbeat
        releasing = [tenancy for tenancy in self.tenancies.values() if tenancy.state == "releasing"]
        resumable = self._resumable(now)
        takes = self._takes()
        self._asked = frozenset(takes) | {tenancy.shard for tenancy in (*releasing, *resumable)}
        self._claimants_asked = self.claimants
        held = [tenancy for tenancy in self.tenancies.values() if tenancy.state != "losing"]
        request = Request(
            incarnation=self.incarnation,
            node=self.node,
            state=self._state(),
            born=self.born,
            seen=self.version,
            floor=self.floor,
            takes=tuple(takes),
            releases=(
                *(Release(t.shard, t.epoch, self._successor(t.shard)) for t in releasing),
                *(Release(t.shard, t.epoch, self.incarnation) for t in resumable),
                *(Release(shard, epoch, "") for shard, epoch in self._disowned.items() if shard not in self.tenancies),
            ),
            asserts=tuple((t.shard, t.epoch) for t in held if self._may_speak_for(t, now)) if self._asserting else (),
            buried=tuple(sorted(self._buried)),
            elapsed=now - self._last_sent if self._last_sent > NEVER else 0.0,
            sent=now,
        )
        self._last_sent = now
        return request

    def _may_speak_for(self, tenancy: Tenancy, now: float) -> bool:
        """Whether to assert it to a table that has forgotten it: the higher epoch wins, and nobody serves yet."""
        return self.trusts(now) or tenancy.state == "suspended"

    def _resumable(self, now: float) -> list[Tenancy]:
        """Those that the table still calls ours. Their epoch may have had successors that it has forgotten."""
        if not (self.settled and self.trusts(now)) or self._asserting:
            return []
        return [t for t in self.tenancies.values() if t.state == "suspended" and self._holds(t)]

    def _state(self) -> NodeState:
        if self.leaving and not self.tenancies:
            return "bye"  # a shard that was handed to us meanwhile is free then
        return "draining" if self.leaving or self.draining else "active"

    def answered(self, request: Request, answer: Answer, now: float) -> list[Instruction]:
        """The store has answered; *now* may be much later than ``request.sent``."""
        if self.fenced or request.incarnation != self.incarnation:  # of its former life
            return []
        if request.state == "bye":
            self.finished = True
            return []
        if answer.verdict != "ok":
            return self._cast_out(answer, now)
        self.joined = True
        lapsed = self._lapse(now)  # before trust is renewed: work that ended with it must not be taken for running
        self._buried.difference_update(request.buried)
        forgotten = request.born not in ("", answer.born)
        if answer.born != self.born:
            self.leases.clear()
            self._mine.clear()
        self.born, self.version = answer.born, answer.version
        self.settled = answer.settles_in <= 0
        self._learn(answer)
        if forgotten:  # what we hold is not in this table: say so before anything is made of it
            self._asserting = True
            self._disowned = {shard: epoch for shard, epoch in self._mine.items() if not self._may_assert(shard, epoch)}
            return [*lapsed, Beat()]
        self._asserting = False
        self.trusted_until = request.sent + self.terms.ttl - self.terms.margin
        if not self.settled:
            self.next_request = min(self.next_request, now + answer.settles_in)
        return lapsed + self.tick(now)

    def _cast_out(self, answer: Answer, now: float) -> list[Instruction]:
        """The store does not know us, or not any more."""
        self.trusted_until = NEVER
        self.fenced = answer.verdict == "dead"
        if not self.fenced:  # it has nothing left to assert: the others need not wait for it
            self.born, self.version, self._asserting = "", 0, False
            self.leases.clear()
            self._mine.clear()
            self._disowned.clear()
        return self._lose(list(self.tenancies.values()), now) or self._rejoin()

    def _learn(self, answer: Answer) -> None:
        if answer.members is not None:
            self.members = dict(answer.members)
        for shard, lease in (answer.leases or {}).items():
            if lease.owner == self.incarnation and self._mine.get(shard) != lease.epoch:
                self._sources[shard] = self._source(self.leases.get(shard), answer.dead)
            self.leases[shard] = lease
            self._disowned.pop(shard, None)
            self.floor = max(self.floor, lease.epoch)
            if lease.owner == self.incarnation:
                self._mine[shard] = lease.epoch
            else:
                self._mine.pop(shard, None)
        self.dead = answer.dead
        if self.settled and self._claimants_asked:
            self.dead += tuple(sorted(self._claimants_asked - self.members.keys() - {self.incarnation, *answer.dead}))
        if answer.members is not None or answer.leases:
            self._place()

    def _source(self, before: Lease | None, dead: tuple[str, ...]) -> Source:
        """From whom a lease came, as the last one that we know of its shard says."""
        if before is None or not before.owner:
            return NOBODY
        if before.owner == self.incarnation:
            return KEPT
        node = before.owner.rpartition("/")[0]
        return Source("dead" if before.owner in dead else "handed", node)

    def _place(self) -> None:
        """Work out who should own what: the same on every node that has seen the same table."""
        active = sorted(member.node for member in self.members.values() if member.state == "active")
        current = {
            shard: self.members[lease.owner].node for shard, lease in self.leases.items() if lease.owner in self.members
        }
        self.target = assign(self.shards, active, current)

    # -- time

    @property
    def deadline(self) -> float:
        """When `tick` or `request` has something to do, at the latest (monotonic seconds)."""
        due = [] if self.fenced else [self.next_request]
        states = {tenancy.state for tenancy in self.tenancies.values()}
        if states - {"losing", "releasing", "suspended"}:
            due.append(self.trusted_until)
        if "suspended" in states:
            due.append(self.trusted_until + self.terms.grace)
        due.extend(t.since + self.terms.handoff_timeout for t in self.tenancies.values() if t.state == "draining")
        return min(due, default=-NEVER)

    def trusts(self, now: float) -> bool:
        """Whether this node may act as the owner of its leases."""
        return now < self.trusted_until

    def _lapse(self, now: float) -> list[Instruction]:
        """Lose everything if the trust has ended, also when nobody was awake to see it end."""
        if self.trusts(now):
            return []
        patient = now < self.trusted_until + self.terms.grace
        silenced = [t for t in self.tenancies.values() if patient and t.expects("silence")]
        for tenancy in silenced:
            tenancy.apply("silence", now)
        # What was released is not forgotten before the table says so: begun anew under its old epoch, it would
        # be handed over in full use by a release that was only slow.
        kept = {"releasing", "suspended"} if patient else {"releasing"}
        return [*map(Suspend, silenced), *self._lose([t for t in self.tenancies.values() if t.state not in kept], now)]

    def tick(self, now: float) -> list[Instruction]:
        """Do what time, or a changed table, asks for."""
        if not self.trusts(now):
            return self._lapse(now) or self._rejoin()
        if self._asserting:  # the table has yet to hear what we hold
            return self._close_overdue(now)
        done: list[Instruction] = self._lose([t for t in self.tenancies.values() if not self._holds(t)], now)
        if self.settled:
            done += self._begin(now)
            done += self._hand_over(now)
        done += self._close_overdue(now)
        if self._wants_to_talk(now):
            done.append(Beat())
        return done

    def _holds(self, tenancy: Tenancy) -> bool:
        return self._mine.get(tenancy.shard) == tenancy.epoch

    def _may_assert(self, shard: int, epoch: int) -> bool:
        tenancy = self.tenancies.get(shard)
        return tenancy is not None and tenancy.epoch == epoch and tenancy.state != "losing"

    def _begin(self, now: float) -> list[Instruction]:
        """Start a tenancy for each lease that the table says is ours; see to the dead, whose messages may be ours."""
        fresh = [
            Tenancy(shard, epoch, now, self._sources.pop(shard, NOBODY))
            for shard, epoch in self._mine.items()
            if shard not in self.tenancies
            and shard not in self._disowned
            and (not self.leaving or self._sources.get(shard) == KEPT)
        ]
        if not fresh and (self.leaving or self._seen_to.issuperset(self.dead)):
            return []
        self.tenancies.update((tenancy.shard, tenancy) for tenancy in fresh)
        self._seen_to = set(self.dead)
        return [Restore(tuple(fresh), self.dead)]

    def _hand_over(self, now: float) -> list[Instruction]:
        done: list[Instruction] = []
        for tenancy in self.tenancies.values():
            if tenancy.state == "serving" and self.target.get(tenancy.shard) != self.node:
                tenancy.apply("move", now)
                done.append(Stop(tenancy))
        return done

    def _close_overdue(self, now: float) -> list[Instruction]:
        done: list[Instruction] = []
        for tenancy in self.tenancies.values():
            if tenancy.state == "draining" and now >= tenancy.since + self.terms.handoff_timeout:
                tenancy.apply("overdue", now)
                done.append(Close(tenancy))
        return done

    def _lose(self, tenancies: Iterable[Tenancy], now: float) -> list[Instruction]:
        done: list[Instruction] = []
        for tenancy in tenancies:
            if tenancy.state == "releasing" or self._is_resumed(tenancy, now):
                tenancy.apply("released", now)
                del self.tenancies[tenancy.shard]
            elif tenancy.expects("lose"):
                tenancy.apply("lose", now)
                done.append(Abandon(tenancy))
        return done

    def _is_resumed(self, tenancy: Tenancy, now: float) -> bool:
        """Whether the next tenancy of the shard is ours, too."""
        return tenancy.state == "suspended" and self.trusts(now) and self._mine.get(tenancy.shard, 0) > tenancy.epoch

    def _rejoin(self) -> list[Instruction]:
        """A node that was taken for dead comes back under a new name once nothing of its old life is left.

        Once, though it may hear of its death twice: two new names would each find the other one alive.
        """
        if not self.fenced or self.tenancies or self._rejoining:
            return []
        self._rejoining = True
        return [Rejoin()]

    def rejoin(self, incarnation: str) -> None:
        """Begin again, as *incarnation*."""
        self._forget_everything(incarnation)

    def _takes(self) -> list[int]:
        """Shards that nobody owns and that should be ours."""
        if not self.settled or self._state() != "active":
            return []
        return [
            shard
            for shard, node in self.target.items()
            if node == self.node and shard not in self.tenancies and self._is_free(shard)
        ]

    def _is_free(self, shard: int) -> bool:
        lease = self.leases.get(shard)
        return lease is None or lease.owner not in self.members

    def _wants_to_talk(self, now: float) -> bool:
        """Once for each wish; what came to nothing is repeated at the heartbeat."""
        wishes = {tenancy.shard for tenancy in self.tenancies.values() if tenancy.state == "releasing"}
        wishes.update(self._takes(), (tenancy.shard for tenancy in self._resumable(now)))
        return bool(wishes - self._asked) or self._state() == "bye"

    def _successor(self, shard: int) -> str:
        node = self.target.get(shard)
        return next((i for i, m in self.members.items() if m.node == node and i != self.incarnation), "")

    # -- what the driver has done, and what the operator wants

    def happened(self, event: Event, tenancies: Iterable[Tenancy], now: float) -> list[Instruction]:
        """An instruction was carried out. What comes too late, because the lease was lost meanwhile, is ignored."""
        done = self._lapse(now)
        for tenancy in tenancies:
            if self.tenancies.get(tenancy.shard) is not tenancy or not tenancy.expects(event):
                continue
            tenancy.apply(event, now)
            if tenancy.state in _CALLS_FOR:
                done.append(_CALLS_FOR[tenancy.state](tenancy))
            elif tenancy.state == "gone":
                del self.tenancies[tenancy.shard]
        return done + (self.tick(now) if self.trusts(now) else self._rejoin())

    def bury(self, dead: Iterable[str]) -> None:
        """The messages of these incarnations are back in their queues."""
        self._buried.update(dead)

    def registered(self, claimants: Iterable[str]) -> None:
        """Who may have taken messages, as the broker says; a node registers there only once it has joined.

        Those of them who are no members at the next request are dead, also if the table has forgotten them.
        """
        self.claimants = frozenset(claimants)

    def outlawed(self, now: float) -> list[Instruction]:
        """The broker takes this incarnation for dead, also if the table, set back, has forgotten that."""
        return self._cast_out(Answer("dead"), now)

    def drain(self, now: float) -> list[Instruction]:
        """Hand everything over and take nothing, until `undrain`."""
        self.draining = True
        return [Beat()] if self.trusts(now) else []

    def undrain(self, now: float) -> list[Instruction]:
        """Take part again."""
        self.draining = False
        return [Beat()] if self.trusts(now) else []

    def leave(self, now: float) -> list[Instruction]:
        """Hand everything over, then say goodbye (``finished``)."""
        self.leaving = True
        if not self.joined:
            self.finished = True
            return []
        return [Beat()] if self.trusts(now) else []

    def why(self, shard: int) -> str:
        """Say for people where a shard should be, and why; from any thread."""
        target, members = self.target, self.members
        node = target.get(shard)
        if node is None:
            return "no node takes part"
        names = sorted(member.node for member in members.values() if member.state == "active")
        count = sum(1 for owner in target.values() if owner == node)
        place = 1 + by_rank(shard, names).index(node) if node in names else 0
        share = self.shards / max(1, len(names))
        return (
            f"it belongs to {node}: number {place} of {len(names)} nodes by rendezvous hash for this shard, with"
            f" {count} of {self.shards} shards; an even share is {share:.4g}, and what is even stays"
        )

    def check_invariants(self, now: float) -> None:
        """Raise AssertionError when the state contradicts itself; tests call it after every event."""
        for shard, tenancy in self.tenancies.items():
            assert tenancy.shard == shard
            assert tenancy.state != "gone", tenancy
            assert tenancy.state in ("losing", "releasing") or self.trusted_until > NEVER, tenancy
            assert tenancy.state != "suspended" or self.terms.grace, tenancy
        running = [tenancy for tenancy in self.tenancies.values() if tenancy.state in MAY_RUN]
        for tenancy in running:
            assert self.trusts(now) or now >= self.trusted_until, tenancy
            assert self._asserting or self._holds(tenancy) or not self.trusts(now), tenancy
        assert not self.finished or not self.tenancies
