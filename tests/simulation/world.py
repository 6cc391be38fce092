"""Virtual time, the network, and the services that nodes talk to: the lease store, the broker, the build hosts.

Time is a float of true seconds. Whatever has a clock of its own derives it from this one.
"""

import heapq
import itertools
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from pool.sharding.lease import Answer, Request, Terms
from tests.support.lease_store import FakeServer, FakeStore

EPOCH = 1_700_000_000_000_000  # what the server's wall clock shows at the start, microseconds
KILL_GRACE = 0.5  # seconds that a command may go on after it is ended
MAX_DELAY = 0.15  # seconds on the way to a build host and in a quiet network; must fit into the margin with KILL_GRACE


class World:
    """The event queue, the random numbers and the trace of what an observer could see."""

    def __init__(self, seed: int) -> None:
        self.rng = Random(seed)
        self.now = 0.0
        self.trace: list[tuple] = []
        self.names = itertools.count(1)
        self._events: list[tuple] = []
        self._order = itertools.count()

    def fact(self, *fact) -> None:
        """Write down what an observer saw: ``(kind, time, ...)``."""
        self.trace.append((fact[0], self.now, *fact[1:]))

    def at(self, when: float, do: Callable, *arguments) -> None:
        heapq.heappush(self._events, (when, next(self._order), do, arguments))

    def after(self, delay: float, do: Callable, *arguments) -> None:
        heapq.heappush(self._events, (self.now + delay, next(self._order), do, arguments))

    def run(self, until: float, done: Callable[[], bool]) -> None:
        """Let events happen until *until*, or until *done* says so (asked twice a second)."""
        look = self.now
        while self._events and self._events[0][0] <= until:
            self.now, _, do, arguments = heapq.heappop(self._events)
            do(*arguments)
            if self.now >= look:
                look = self.now + 0.5
                if done():
                    return


@dataclass
class Weather:
    """How likely it is that one message is lost or very late."""

    lost: float = 0.0
    late: float = 0.0
    latest: float = 0.0
    """When the last of the late ones arrives."""


class Service:
    """Something at the other end of a network. Subclasses say what a call does."""

    def __init__(self, world: World, weather: Weather) -> None:
        self.world = world
        self.weather = weather
        self.cut: set[str] = set()
        """Nodes that do not reach it."""
        self.down = False
        self.frozen = False
        self._waiting: list[tuple] = []

    def call(self, node: str, reply: Callable, do: Callable, *arguments) -> None:
        """Run *do* over there and *reply* with the result, each unless the network or the service fails."""
        delay = self._delay(node)
        if delay is not None:
            self.world.after(delay, self._arrived, node, reply, do, arguments)

    def _arrived(self, node: str, reply: Callable, do: Callable, arguments: tuple) -> None:
        if self.down:
            return
        if self.frozen:
            self._waiting.append((node, reply, do, arguments))
            return
        answer = do(*arguments)
        delay = self._delay(node)
        if delay is not None:
            self.world.after(delay, reply, answer)

    def _delay(self, node: str) -> float | None:
        """How long a message is on its way; None: for ever."""
        rng, weather = self.world.rng, self.weather
        if node in self.cut or rng.random() < weather.lost:
            return None
        if rng.random() < weather.late:
            delay = rng.uniform(0.2, 9)
            weather.latest = max(weather.latest, self.world.now + delay)
            return delay
        return rng.uniform(0.0005, 0.02)

    def thaw(self) -> None:
        """What came while it was frozen is done now, in no order."""
        self.frozen = False
        waiting, self._waiting = self._waiting, []
        self.world.rng.shuffle(waiting)
        for call in waiting:
            self._arrived(*call)


class Store(Service):
    """The fake lease store as a service, on a wall clock that drifts and jumps."""

    def __init__(self, world: World, weather: Weather, rate: float) -> None:
        super().__init__(world, weather)
        self.rate = rate
        self.jump = 0.0
        self.server = FakeServer(lambda: EPOCH + int((world.now * rate + self.jump) * 1e6))

    def client(self, shards: int, terms: Terms) -> FakeStore:
        return FakeStore(self.server, shards, terms)

    def beat(self, client: FakeStore, request: Request) -> Answer:
        return client.execute(request)


class Message(NamedTuple):
    """A task in a shard's queue. *seq* is its place in the order of all."""

    seq: int
    shard: int
    key: str
    duration: float


class Exchange(NamedTuple):
    """What a node and the broker tell each other in one call."""

    claimant: str
    connection: int
    """A claimant counts its connections; what still comes over an older one is refused."""
    known: frozenset[int] | None
    """Claims that it knows of, on a new connection: the others go back. None: no news."""
    settles: tuple[int, ...]
    returns: tuple[int, ...]
    takes: tuple[int, ...]
    """Shards to take from ..."""
    room: int
    """... and how many messages at most."""


class Broker(Service):
    """Shard queues with claims: a message that was taken is its claimant's until it is settled or put back.

    Only claimants in the registry may take. Restoring a dead one fences it for ever and puts all it had taken back into
    its place, in one step.
    """

    def __init__(self, world: World, weather: Weather) -> None:
        super().__init__(world, weather)
        self.queues: dict[int, list[Message]] = {}
        self.claims: dict[str, dict[int, Message]] = {}
        self.connections: dict[str, int] = {}
        self.fenced: set[str] = set()
        self.left = 0
        """Messages that are not settled."""

    def submit(self, message: Message) -> None:
        self.left += 1
        self._put(message)
        self.world.fact("submit", message.seq, message.key, message.shard)

    def _put(self, message: Message) -> None:
        insort(self.queues.setdefault(message.shard, []), message)

    def may_take(self, claimant: str) -> bool:
        return claimant not in self.fenced

    def exchange(self, wish: Exchange) -> tuple[list[Message], tuple[str, ...]] | None:
        """Settle, put back and take: what was taken, and who is registered. None: the claimant is fenced."""
        me = wish.claimant
        if not self.may_take(me):
            return None
        if wish.connection < self.connections.get(me, 0):
            return [], ()
        self.connections[me] = wish.connection
        claims = self.claims.setdefault(me, {})
        for seq in wish.settles:
            if claims.pop(seq, None):
                self.left -= 1
                self.world.fact("settled", seq)
        lost = claims.keys() - wish.known if wish.known is not None else ()
        for seq in (*wish.returns, *lost):
            if message := claims.pop(seq, None):
                self._put(message)
        taken = []
        for shard in wish.takes:
            queue = self.queues.get(shard)
            while queue and len(taken) < wish.room:
                message = queue.pop(0)
                claims[message.seq] = message
                taken.append(message)
        return taken, tuple(self.claims)

    def fence(self, claimant: str) -> None:
        self.fenced.add(claimant)

    def restore(self, dead: tuple[str, ...]) -> bool:
        for claimant in dead:
            self.fence(claimant)
            for message in self.claims.pop(claimant, {}).values():
                self._put(message)
        return True


class Run:
    """One execution of a task."""

    __slots__ = ("deadline", "ended", "epoch", "killed", "line", "message", "natural_end", "number", "stay")

    def __init__(self, number: int, message: Message, stay: int, epoch: int) -> None:
        self.number = number
        self.message = message
        self.stay = stay
        self.epoch = epoch
        self.line: Line | None = None  # once it has begun
        self.natural_end = 0.0
        self.deadline = 0.0  # when it ends, unless a pulse comes
        self.killed = False
        self.ended = False


class Line:
    """A process's connection to the build hosts: messages keep their order, and take up to `MAX_DELAY`."""

    def __init__(self, host: "Hosts", node: str, tell: Callable) -> None:
        self.host = host
        self.node = node
        self.tell = tell
        """Called with a run and whether it came to its end."""
        self._last = 0.0

    def send(self, do: Callable, *arguments) -> None:
        if self.node not in self.host.cut:
            world = self.host.world
            self._last = max(self._last, world.now + world.rng.uniform(0.0005, MAX_DELAY))
            world.at(self._last, do, self, *arguments)


class Hosts:
    """Where commands run: until their end, until they are told to end, or until the pulses of their node run out.

    *fenced*: an owner that is older than the newest known one of the key is refused, and what it runs is ended before
    the first command of the newer one.
    """

    def __init__(self, world: World, *, fenced: bool = False) -> None:
        self.world = world
        self.fenced = fenced
        self.cut: set[str] = set()
        self.claimed: dict[str, int] = {}
        self.running: dict[str, dict[Run, None]] = {}

    def start(self, line: Line, run: Run, remaining: float) -> None:
        """A command, and for how many seconds its node may be trusted."""
        if self.fenced and not self._let_in(line, run, self.world.now + remaining):
            return
        run.line = line
        self.running.setdefault(run.message.key, {})[run] = None
        self.world.fact("begin", run.number, run.message.key, run.message.seq, run.stay)
        run.natural_end = self.world.now + run.message.duration
        run.deadline = self.world.now + remaining
        self._look_again(line, run)

    def _let_in(self, line: Line, run: Run, until: float) -> bool:
        key = run.message.key
        if run.killed or run.epoch < self.claimed.get(key, 0):
            run.ended = True
            self._tell(line, run, False)
            return False
        self.claimed[key] = run.epoch
        older = [other for other in self.running.get(key, ()) if other.stay != run.stay]
        for other in older:
            self.kill(other.line, other)
        if older:
            self.world.after(0.05, lambda: self.start(line, run, until - self.world.now))
        return not older

    def pulse(self, line: Line, runs: tuple[Run, ...], remaining: float) -> None:
        for run in runs:
            run.deadline = self.world.now + remaining

    def kill(self, line: Line, run: Run) -> None:
        if not run.natural_end:  # it waits at the fence, or its start was lost on the way
            run.killed = True
        elif not run.killed:
            run.killed = True
            self.world.after(KILL_GRACE, self._end, line, run, False)

    def _look_again(self, line: Line, run: Run) -> None:
        self.world.at(min(run.natural_end, run.deadline), self._look, line, run)

    def _look(self, line: Line, run: Run) -> None:
        if run.ended or run.killed:
            return
        if self.world.now >= run.natural_end:
            self._end(line, run, True)
        elif self.world.now >= run.deadline:
            self.kill(line, run)
        else:
            self._look_again(line, run)

    def _end(self, line: Line, run: Run, whole: bool) -> None:
        if run.ended:
            return
        run.ended = True
        self.running[run.message.key].pop(run, None)
        self.world.fact("end", run.number)
        if whole:
            self.world.fact("done", run.message.seq)
        self._tell(line, run, whole)

    def _tell(self, line: Line, run: Run, whole: bool) -> None:
        """The node hears of it, if need be when it is connected again."""
        if line.node in self.cut:
            self.world.after(0.3, self._tell, line, run, whole)
        else:
            self.world.after(self.world.rng.uniform(0.0005, MAX_DELAY), line.tell, run, whole)
