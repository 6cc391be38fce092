"""What an observer may demand of a trace. Nothing here knows how the nodes work: only what was seen from outside.

A trace is a list of facts ``(kind, time, ...)``, times in true seconds::

    faults kinds...                          what is going to go wrong
    submit seq key shard, settled seq        a task came into the broker, or left it as done
    serve stay shard epoch incarnation node, unserve stay
    begin run key seq stay, end run, done seq    an execution at the build host; a *stay* is one process for a key
    pause node, resume node, crash node, gone node (it left)
    drain node, undrain node, leave node     what an operator told it
    reborn                                   the store was restarted, failed over or flushed
    calm                                     from here on nothing fails

**Promised under every ordinary fault** (nodes that pause, crash, restart, leave, drain; partitions from the store, the broker
and the build hosts; messages lost, or executed with the answer lost, or up to 9 s late; a store or broker that is
frozen; a store that is restarted, or fails over and loses its last writes; clocks that drift by 2 % each way; a
store whose clock jumps ahead):

- `one_owner`: no shard is served under two epochs, or by two nodes, at once. A node that is stopped serves nothing.
- `one_process`: no key is executed by two processes at once. What is being killed still counts as executing.
- `order`: no task of a key begins before those that were submitted before it with that key have begun.
- `epochs_grow`: a shard is never served under a lower epoch than before.
- `undisturbed`: restarts, failovers and flushes of the store alone, with busy hubs and drift, cost no running task: none
  is killed before a handoff may have been overdue. With a fence and a long grace, a store that is down or frozen for longer
  than the leases costs none, either.

**Promised under those and the faults beyond** (a flushed store, a store's clock that jumps back, clocks that drift by 20 %), too:

- `nothing_lost`: every task is done at least once, and is settled only then.
- `owned_again`: once faults stop, no shard goes unserved for longer than TTL + 2 heartbeats + `DETECTION`; where the
  table was reborn within `RECENT`, for the time of that quarantine more.
- `drain_ends`: a drained node serves nothing after the handoff timeout, what its last steps take, and - where it has
  just come back - the time it takes to become an owner.

**Not promised beyond the ordinary faults**: `one_owner`, `one_process`, `order`, `epochs_grow`.
*Flush*: a node that comes first may take a shard after 1.2 heartbeats, while a survivor that could not speak up meanwhile
still trusts its lease: at most TTL - margin - 1.2 heartbeats, and what a kill takes.
*Jump back*: if the table is set back as well, and no node remembers what it has forgotten, epochs begin at a lower one.
Exclusivity is not touched: the lease clock never goes back, and never faster than the clock of the node that asks.
*Drift*: with TTL 5 s and margin 1 s, a node that is slow by d and a store that is fast by d need
``(ttl - margin) / (1 - d) + 0.5 s to kill + 0.15 s on the way < ttl / (1 + d)``: the promise ends at about d = 3.8 %.
Each overlap is bounded, and `overlaps` measures it.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable

from pool.sharding.lease import Terms

Trace = list[tuple]
Problems = list[str]

DETECTION = 1.0  # seconds: network, restoring, a busy hub, timers; and a lease clock that lags behind late heartbeats
LONG = 30.0  # seconds of grace that outlast whatever happens to the store
RECENT = 12.0  # seconds for which a rebirth before the calm is felt


class Watch:
    """Which shards are served, by whom, at each fact."""

    def __init__(self) -> None:
        self.stays: dict[int, tuple[int, int, str]] = {}  # stay -> shard, epoch, node
        self.stopped: set[str] = set()
        self.served: dict[int, dict[int, int]] = defaultdict(dict)  # shard -> stay -> epoch, of nodes that are awake

    def see(self, fact: tuple) -> list[int]:
        """Follow *fact*; return the shards that it may have concerned."""
        kind = fact[0]
        if kind == "serve":
            _, _, stay, shard, epoch, _, node = fact
            self.stays[stay] = shard, epoch, node
            self.served[shard][stay] = epoch
            return [shard]
        if kind == "unserve":
            shard = self.stays.pop(fact[2])[0]
            self.served[shard].pop(fact[2], None)
            return [shard]
        if kind in ("pause", "resume", "crash", "gone"):
            return self._node(kind, fact[2])
        return []

    def _node(self, kind: str, name: str) -> list[int]:
        its = [(stay, shard, epoch) for stay, (shard, epoch, node) in self.stays.items() if node == name]
        for stay, shard, epoch in its:
            if kind == "resume":
                self.served[shard][stay] = epoch
            else:
                self.served[shard].pop(stay, None)
            if kind in ("crash", "gone"):
                del self.stays[stay]
        return [shard for _, shard, _ in its]


def one_owner(trace: Trace, terms: Terms) -> Problems:
    watch, problems = Watch(), []
    for fact in trace:
        for shard in watch.see(fact):
            if len(watch.served[shard]) > 1:
                problems.append(f"{fact[1]:.3f}: shard {shard} is served by {watch.served[shard]}")
    return problems


def epochs_grow(trace: Trace, terms: Terms) -> Problems:
    highest: dict[int, int] = {}
    problems = []
    for fact in trace:
        if fact[0] == "serve":
            _, when, _, shard, epoch, *_ = fact
            if epoch < highest.get(shard, 0):
                problems.append(f"{when:.3f}: shard {shard} is served under {epoch} after {highest[shard]}")
            highest[shard] = max(epoch, highest.get(shard, 0))
    return problems


def one_process(trace: Trace, terms: Terms) -> Problems:
    return [f"{begin:.3f}: key {key} by two processes for {end - begin:.3f} s" for key, begin, end in overlaps(trace)]


def overlaps(trace: Trace) -> list[tuple[str, float, float]]:
    """When two processes executed one key: the key, and from when to when."""
    running: dict[str, dict[int, int]] = defaultdict(dict)  # key -> run -> stay
    keys: dict[int, str] = {}
    since: dict[str, float] = {}
    found = []
    for fact in trace:
        if fact[0] == "begin":
            _, _, run, key, _, stay = fact
            keys[run] = key
            running[key][run] = stay
        elif fact[0] == "end":
            key = keys[fact[2]]
            del running[key][fact[2]]
        else:
            continue
        twice = len(set(running[key].values())) > 1
        if twice:
            since.setdefault(key, fact[1])
        elif key in since and (begin := since.pop(key)) < fact[1]:
            found.append((key, begin, fact[1]))
    return found


def order(trace: Trace, terms: Terms) -> Problems:
    waiting: dict[str, list[int]] = defaultdict(list)
    begun: set[int] = set()
    problems = []
    for fact in trace:
        if fact[0] == "submit":
            waiting[fact[3]].append(fact[2])
        elif fact[0] == "begin" and fact[4] not in begun:
            _, when, _, key, seq, _ = fact
            begun.add(seq)
            if waiting[key][0] != seq:
                problems.append(f"{when:.3f}: task {seq} of {key} overtakes {waiting[key][0]}")
            waiting[key].remove(seq)
    return problems


def undisturbed(trace: Trace, terms: Terms) -> Problems:
    faults = next(fact[2:] for fact in trace if fact[0] == "faults")
    harmless = {"restart_store", "fail_over", "flush", "busy_hub", "drift"}
    if terms.grace > LONG:
        harmless |= {"stop_store", "freeze_store"}
    if not harmless.issuperset(faults):
        return []
    begun: dict[int, tuple[float, int]] = {}
    done = {(fact[1], fact[2]) for fact in trace if fact[0] == "done"}
    problems = []
    for fact in trace:
        if fact[0] == "begin":
            begun[fact[2]] = fact[1], fact[4]
        elif fact[0] == "end":
            since, seq = begun[fact[2]]
            if (fact[1], seq) not in done and fact[1] < since + terms.handoff_timeout:
                problems.append(f"{fact[1]:.3f}: task {seq} is killed after {fact[1] - since:.3f} s")
    return problems


def nothing_lost(trace: Trace, terms: Terms) -> Problems:
    seen: dict[str, dict[int, float]] = defaultdict(dict)
    problems = []
    for kind, when, *rest in trace:
        if kind in ("submit", "done", "settled"):
            seen[kind].setdefault(rest[0], when)
            if kind == "settled" and rest[0] not in seen["done"]:
                problems.append(f"{when:.3f}: task {rest[0]} is settled and was not done")
    for fate in ("done", "settled"):
        if missing := seen["submit"].keys() - seen[fate].keys():
            problems.append(f"tasks never {fate}: {sorted(missing)}")
    return problems


def owned_again(trace: Trace, terms: Terms) -> Problems:
    calm = _time_of(trace, "calm")
    reborn = max((fact[1] for fact in trace if fact[0] == "reborn"), default=-1e9)
    patience = terms.ttl + 2 * terms.heartbeat + DETECTION
    if reborn > calm - RECENT:
        patience += terms.ttl + 2 * terms.heartbeat
    watch, problems = Watch(), []
    shards = {fact[3] for fact in trace if fact[0] == "serve"} | {fact[4] for fact in trace if fact[0] == "submit"}
    unserved = dict.fromkeys(shards, 0.0)
    for fact in trace:
        for shard in watch.see(fact):
            if not watch.served[shard]:
                unserved.setdefault(shard, fact[1])
            elif shard in unserved:
                problems += _gap(shard, max(calm, unserved.pop(shard)), fact[1], patience)
    for shard, since in unserved.items():
        problems += _gap(shard, max(calm, since), trace[-1][1], patience)
    return problems


def _gap(shard: int, since: float, until: float, patience: float) -> Problems:
    if until - since <= patience:
        return []
    return [f"{since:.3f}: shard {shard} is unserved for {until - since:.3f} s, more than {patience:.3f}"]


def drain_ends(trace: Trace, terms: Terms) -> Problems:
    """The drain that is ordered in the calm."""
    calm = _time_of(trace, "calm")
    drained = [(fact[2], fact[1]) for fact in trace if fact[0] == "drain" and fact[1] >= calm]
    limit = 1.2 * terms.handoff_timeout + 2 * terms.ttl + 6 * terms.heartbeat
    watch, problems = Watch(), []
    for fact in trace:
        watch.see(fact)
        for node, since in drained:
            if fact[1] > since + limit and any(its == node for _, _, its in watch.stays.values()):
                return [f"{fact[1]:.3f}: {node} was drained at {since:.3f} and still serves"]
    return problems


def _time_of(trace: Iterable[tuple], kind: str) -> float:
    return next(fact[1] for fact in trace if fact[0] == kind)


Checker = Callable[[Trace, Terms], Problems]

ALWAYS: tuple[Checker, ...] = (nothing_lost, owned_again, drain_ends)
EXCLUSIVE: tuple[Checker, ...] = (one_owner, one_process, order, epochs_grow, undisturbed)


def check(trace: Trace, terms: Terms, *, beyond: bool) -> dict[str, Problems]:
    """What each checker found, if anything; *beyond*: only what is promised under the faults beyond."""
    found = {checker.__name__: checker(trace, terms) for checker in (ALWAYS if beyond else (*EXCLUSIVE, *ALWAYS))}
    return {name: problems for name, problems in found.items() if problems}
