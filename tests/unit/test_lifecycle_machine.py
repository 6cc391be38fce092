"""Random events against the lifecycle, with a small model of its own that counts backends and waiters."""

from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pool.backends.base import Capabilities
from pool.config import GroupLimit, PoolConfig
from pool.entry import Close, Connect, Entry, Tell, Waiter, Wake
from pool.errors import AcquireTimeout, BackendClosed, BackendUnavailable, ConfigError, PoolError
from pool.groups import Group
from pool.lifecycle import Lifecycle

KEYS = st.sampled_from(["a", "b", "c", "d", None])
CONFIGS = st.sampled_from([None, None, None, {"n": 1}])
AGENTS = st.sampled_from(["x", "x", "g", "h"])  # "x" belongs to no group, the others to the one of their name
LIMITS = st.builds(
    GroupLimit,
    count=st.integers(1, 3),
    weight=st.sampled_from([None, 100]),
    starting=st.sampled_from([None, 1, 2]),
)
NUMBER = st.integers(0, 1000)  # picks one of a list, whatever its length


class Thing:
    """A backend that the model has made; it knows whom for."""

    def __init__(self, identity: Any, config: Any, max_users: int | None) -> None:
        self.identity = identity
        self.config = config
        self.capabilities = Capabilities(max_users=max_users)
        self.usable = True
        self.working = False
        self.weight = 0

    def is_busy(self) -> bool:
        return self.working


def weigh(entry: Entry) -> int:
    return 0 if entry.backend is None else entry.backend.weight


class LifecycleMachine(RuleBasedStateMachine):
    """Drives a `Lifecycle` as the manager does, in any order of events."""

    @initialize(cap=st.integers(1, 4), limit=LIMITS, other=LIMITS)
    def start(self, cap: int, limit: GroupLimit, other: GroupLimit) -> None:
        self.life = Lifecycle(
            PoolConfig(
                max_backends=cap,
                idle_timeout=50,
                check_after=20,
                max_lifetime=120,
                backoff_base=2,
                groups={"g": limit, "h": other},
            ),
            jitter=lambda: 0.5,
        )
        self.now = 0.0
        self.alive: set[Thing] = set()
        self.told: set[Thing] = set()
        self.connecting: list[Connect] = []
        self.closing: list[Close] = []
        self.waiting: list[Waiter] = []
        self.held: list[Entry] = []
        self.forced = False  # close_rest may close under users

    # -- what the driver does

    def hear(self, tell: Tell) -> None:
        """A backend is created once and ends once; after it was evicted, nothing else is told of it."""
        if tell.what == "created":
            assert tell.backend not in self.told
            self.told.add(tell.backend)
        elif tell.what in ("evicted", "closed") and tell.backend is not None:
            self.told.remove(tell.backend)

    def decide(self, call: Any, *args: Any, grows: int = 0) -> Any:
        """Let the lifecycle decide, check what it asks for, and keep it for later."""
        before = self.life.total
        groups = {name: self.life.groups.get(name, Group()) for name in "gh"}
        totals = {name: (group.total, group.starting) for name, group in groups.items()}
        effects: list[Any] = []
        try:
            return call(*args, effects)
        finally:
            for effect in effects:
                if isinstance(effect, Connect):
                    assert not self.life.shut, "a connect after shutdown"
                    for victim in effect.first_close:
                        self.check_unused(victim)
                    self.connecting.append(effect)
                elif isinstance(effect, Close):
                    assert effect.backend in self.alive, "closed twice, or never connected"
                    assert effect.backend not in [close.backend for close in self.closing], "closed twice"
                    self.check_unused(effect.backend)
                    self.closing.append(effect)
                elif isinstance(effect, Tell):
                    self.hear(effect)
                else:
                    self.served(effect)
            assert self.life.total <= max(before + grows, self.life.config.max_backends), "beyond the cap"
            for name, (total, starting) in totals.items():
                group, limit = self.life.groups.get(name, Group()), self.life.config.groups[name]
                assert group.total <= max(total + grows, limit.count), f"group {name} beyond its count"
                assert limit.starting is None or group.starting <= max(starting, limit.starting), "too many starts"

    def served(self, wake: Wake) -> None:
        waiter = wake.waiter
        assert waiter in self.waiting, "served twice, or after it had gone"
        self.waiting.remove(waiter)
        assert (waiter.entry is None) != (waiter.error is None)
        if waiter.entry is not None:
            thing = waiter.entry.backend
            assert thing in self.alive, "handed out after its end"
            assert thing not in [close.backend for close in self.closing], "handed out while it is closed"
            assert (thing.identity, thing.config) == (waiter.identity, waiter.config), "somebody else's backend"
            self.held.append(waiter.entry)

    def check_unused(self, thing: Thing) -> None:
        assert self.forced or thing not in [entry.backend for entry in self.held], "closed under its user"

    # -- events

    @rule(key=KEYS, config=CONFIGS, agent=AGENTS)
    def acquire(self, key: str | None, config: dict[str, Any] | None, agent: str) -> None:
        identity = (key or "", agent)
        if key is not None:
            entry = self.life.acquire_warm(identity, config, self.now)
            if entry is not None:
                assert not self.life.shut
                assert entry.backend.usable
                self.held.append(entry)
                return
        group = None if agent == "x" else agent
        waiter = Waiter(identity, config or {}, config, lambda: None, pooled=key is not None, group=group)
        self.waiting.append(waiter)
        try:
            self.decide(self.life.acquire, waiter, self.now)
        except BackendClosed:
            assert self.life.shut
            self.waiting.remove(waiter)
        except BackendUnavailable as error:
            assert 0 < error.retry_after <= self.life.config.backoff_max
            self.waiting.remove(waiter)
        else:
            assert waiter.entry is None or waiter.entry.backend.usable

    @precondition(lambda self: any(connect.first_close for connect in self.connecting))
    @rule(which=NUMBER)
    def way_is_made(self, which: int) -> None:
        """What a connect has to close first is gone."""
        places = [n for n, connect in enumerate(self.connecting) if connect.first_close]
        place = places[which % len(places)]
        connect = self.connecting[place]
        self.connecting[place] = connect._replace(first_close=())
        self.alive.difference_update(connect.first_close)
        self.decide(self.life.made_way, connect.entry, self.now)

    @precondition(lambda self: self.connecting)
    @rule(
        which=NUMBER,
        outcome=st.sampled_from(["good", "good", "good", "renewed", "refused", "wrong"]),
        max_users=st.sampled_from([None, 1, 2]),
    )
    def connect_ends(self, which: int, outcome: str, max_users: int | None) -> None:
        connect = self.connecting.pop(which % len(self.connecting))
        entry = connect.entry
        for victim in connect.first_close:
            self.alive.remove(victim)
        if outcome == "good" and entry.backend is not None:
            entry.backend.usable = True
            self.decide(self.life.connected, entry, entry.backend, self.now)
            return
        if entry.backend is not None and entry.group is not None and outcome != "wrong":
            self.alive.remove(entry.backend)
            self.decide(self.life.check_failed, entry, self.now)
            return
        closed = entry.state == "closed"  # then its old backend is the lifecycle's to close, if that has to be
        if entry.backend is not None and not (closed and outcome in ("refused", "wrong")):
            self.alive.discard(entry.backend)
        if outcome in ("good", "renewed"):
            thing = Thing(entry.identity, entry.config, max_users)
            self.alive.add(thing)
            self.decide(self.life.connected, entry, thing, self.now)
        else:
            error: PoolError = ConfigError("wrong")
            if outcome == "refused":
                error = BackendUnavailable("refused", "refused", 0.0)
            self.decide(self.life.connect_failed, entry, error, self.now)

    @precondition(lambda self: self.closing)
    @rule(which=NUMBER)
    def close_ends(self, which: int) -> None:
        close = self.closing.pop(which % len(self.closing))
        self.alive.remove(close.backend)
        self.decide(self.life.gone, close.entry, self.now)

    @precondition(lambda self: self.held)
    @rule(which=NUMBER)
    def release(self, which: int) -> None:
        self.decide(self.life.release, self.held.pop(which % len(self.held)), self.now)

    @precondition(lambda self: self.waiting)
    @rule(which=NUMBER, cancelled=st.booleans())
    def give_up(self, which: int, cancelled: bool) -> None:
        waiter = self.waiting.pop(which % len(self.waiting))
        try:
            self.decide(self.life.give_up, waiter, None if cancelled else 1.0, self.now)
        except AcquireTimeout:
            assert not cancelled
        else:
            assert cancelled
        assert waiter.entry is None

    @precondition(lambda self: self.held)
    @rule(which=NUMBER)
    def cancelled_after_the_grant(self, which: int) -> None:
        """The caller goes away between its grant and its return: the driver gives up for it."""
        entry = self.held.pop(which % len(self.held))
        waiter = Waiter(entry.identity, entry.config, None, lambda: None, pooled=entry.pooled)
        waiter.entry = entry
        self.decide(self.life.give_up, waiter, None, self.now)

    @rule(seconds=st.sampled_from([0.5, 5.0, 25.0, 60.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def sweep(self) -> None:
        over = self.life.total - self.life.config.max_backends
        expected = [
            entry.identity
            for number, entry in enumerate(list(self.life.idle))
            if (self.now - entry.idle_since >= 50 or number < over) and not entry.backend.working
        ]
        for name in list(self.life.groups):
            limit = self.life.config.groups[name]
            staying = [e for e in self.life.live if e.group == name and e.identity not in expected]
            spare = [e for e in self.life.idle if e in staying and not e.backend.working]
            for entry in spare:
                heavy = limit.weight is not None and sum(map(weigh, staying)) > limit.weight
                if len(staying) > limit.count or (heavy and weigh(entry)):
                    staying.remove(entry)
                    expected.append(entry.identity)
        evicted = self.decide(self.life.sweep, self.now)
        assert sorted(evicted) == sorted(expected)

    @rule(key=st.sampled_from("abcd"))
    def close_key(self, key: str) -> None:
        self.decide(self.life.close_key, key, self.now)
        assert not [identity for identity in self.life.entries if identity[0] == key and not self.life.room]

    @rule(keys=st.sets(st.sampled_from("abcd")))
    def expel(self, keys: set[str]) -> None:
        """Keys that this process must not work for any more."""
        self.forced = True
        self.decide(self.life.expel, lambda key, _: key in keys, self.now)
        self.forced = False
        assert not [waiter for waiter in self.waiting if waiter.pooled and waiter.identity[0] in keys]
        assert not [entry for entry in self.life.live if entry.pooled and entry.identity[0] in keys]

    @rule(key=st.sampled_from("abcd"), max_users=st.sampled_from([None, 1]), agent=AGENTS)
    def register(self, key: str, max_users: int | None, agent: str) -> None:
        thing = Thing((key, agent), {}, max_users)
        group = None if agent == "x" else agent
        self.alive.add(thing)
        try:
            self.decide(
                lambda effects: self.life.register(thing.identity, {}, thing, self.now, effects, group), grows=1
            )
        except BackendClosed:
            self.alive.remove(thing)

    @precondition(lambda self: self.alive)
    @rule(which=NUMBER, what=st.sampled_from(["lost", "working", "resting", 0, 40, 70, 120]))
    def backend_changes(self, which: int, what: str | int) -> None:
        thing = self.pick(which)
        if what == "lost":
            thing.usable = False
        else:
            if isinstance(what, int):
                thing.weight = what
            else:
                thing.working = what == "working"
            # Nobody tells the lifecycle; what waits is looked at with the next event, at the latest a sweep.
            self.decide(lambda effects: self.life.configure(self.life.config, self.now, effects))

    def pick(self, which: int) -> Thing:
        """Return one of the live backends, the same one in each run."""
        known = [entry.backend for entry in self.life.live if entry.backend is not None]
        known.extend(close.backend for close in self.closing)
        known.extend(victim for connect in self.connecting for victim in connect.first_close)
        known.extend(c.entry.backend for c in self.connecting if c.entry.backend in self.alive)  # closed in its check
        return known[which % len(known)]

    @rule(key=st.sampled_from("abcd"), agent=AGENTS)
    def touch(self, key: str, agent: str) -> None:
        entry = self.life.entries.get((key, agent))
        if entry is not None:
            self.life.touch(entry, self.now)

    @rule(cap=st.integers(1, 5))
    def configure(self, cap: int) -> None:
        self.decide(self.life.configure, self.life.config.changed(max_backends=cap), self.now)

    @rule(limit=LIMITS)
    def configure_group(self, limit: GroupLimit) -> None:
        groups = {**self.life.config.groups, "g": limit}
        self.decide(self.life.configure, self.life.config.changed(groups=groups), self.now)

    @precondition(lambda self: self.now > 100)
    @rule()
    def shutdown(self) -> None:
        self.decide(self.life.shutdown, self.now)
        assert not self.waiting

    @precondition(lambda self: self.life.shut)
    @rule()
    def close_rest(self) -> None:
        self.forced = True
        self.decide(self.life.close_rest, self.now)
        self.forced = False

    # -- what holds after every event

    @invariant()
    def state_is_sound(self) -> None:
        if hasattr(self, "life"):
            self.life.check_invariants()

    @invariant()
    def every_live_backend_is_counted(self) -> None:
        """Backends in the world, and connects that will become one, are what the cap counts."""
        if hasattr(self, "life"):
            becoming = [c for c in self.connecting if not c.first_close and c.entry.backend is None]
            assert len(self.alive) + len(becoming) == self.life.total

    @invariant()
    def every_live_backend_of_a_group_is_counted(self) -> None:
        """A group may reckon with one that is yet to start, never with fewer than there are."""
        if hasattr(self, "life"):
            opening = [c.entry for c in self.connecting if not c.first_close and c.entry.backend is None]
            for name in "gh":
                there = [x for x in (*self.alive, *opening) if x.identity[1] == name]
                assert len(there) <= self.life.groups.get(name, Group()).total, f"group {name} has more"

    @invariant()
    def one_entry_takes_newcomers(self) -> None:
        if hasattr(self, "life"):
            open_ones = [e.identity for e in self.life.live if e.pooled and e.state != "retired"]
            assert len(open_ones) == len(set(open_ones))

    @invariant()
    def users_are_those_who_hold(self) -> None:
        if hasattr(self, "life"):
            for entry in self.life.live:
                assert entry.users == self.held.count(entry)

    @invariant()
    def nobody_waits_without_a_reason(self) -> None:
        """A connect is under way, or all turns are taken, or the pool is full of what may not be closed."""
        if not hasattr(self, "life"):
            return
        under_way = [connect.entry for connect in self.connecting]
        waiting = list(self.life.room)
        for waiter in waiting:
            if not self.group_is_full(waiter.group):
                assert self.life.total >= self.life.config.max_backends, "there is room"
                assert all(e.backend.working for e in self.life.idle), "an idle backend could make room"
        for entry in self.life.live:
            waiting.extend(entry.waiters)
            if entry.waiters and entry not in under_way:
                assert entry.max_users is not None, "free, and yet somebody waits"
                assert entry.users == entry.max_users, "a turn is free, and yet somebody waits"
        assert {id(waiter) for waiter in waiting} == {id(waiter) for waiter in self.waiting}
        assert len(waiting) == len(self.waiting)

    def group_is_full(self, name: str | None) -> bool:
        """Whether the group has no room even without those of its members that may be evicted."""
        if name is None:
            return False
        limit = self.life.config.groups[name]
        members = [e for e in self.life.live if e.group == name]
        spare = [e for e in members if e.state == "idle" and not e.backend.working]
        weight = sum(weigh(e) for e in members if e not in spare)
        return (
            (limit.starting is not None and sum(e.backend is None for e in members) >= limit.starting)
            or (limit.weight is not None and weight >= limit.weight)
            or (self.life.groups.get(name, Group()).total >= limit.count and not spare)
        )

    def teardown(self) -> None:
        """Everybody goes home, the pool is shut: nothing is left over."""
        if not hasattr(self, "life"):
            return
        while self.held:
            self.release(0)
        self.decide(self.life.shutdown, self.now)
        self.decide(self.life.close_rest, self.now)
        while self.connecting:
            self.connect_ends(0, "good", None)
        while self.closing:
            self.close_ends(0)
        assert not self.waiting
        assert not self.alive, "leaked"
        assert not self.told, "nobody was told of its end"
        assert self.life.total == 0
        assert self.life.groups == {}
        assert not self.life.live


class TestLifecycleUnderRandomEvents(LifecycleMachine.TestCase):
    """No order of events leaks a backend, breaks the cap, loses a wake-up or closes under a user."""

    settings = settings(
        max_examples=300,
        stateful_step_count=60,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
