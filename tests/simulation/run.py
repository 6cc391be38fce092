"""One seed: a world with its nodes, its work and its faults, run to the end and checked."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from random import Random

from pool.sharding.lease import Terms
from tests.simulation.checkers import Problems, check, overlaps
from tests.simulation.faults import BEYOND, ORDINARY, Faults
from tests.simulation.node import Node
from tests.simulation.world import Broker, Hosts, Message, Store, Weather, World

TERMS = Terms(ttl=5.0, heartbeat=1.0, handoff_timeout=6.0)
GRACES = (0.0, 0.0, 3.0, 60.0)  # of one seed after the other
FAULTS_STOP = 22.0  # seconds
SETTLE = 16.0  # seconds of calm that are watched at least
END = 240.0  # seconds after which whatever is not done is lost


@dataclass
class Result:
    """What came of a seed. *problems*: by checker."""

    seed: int
    kinds: tuple[str, ...]
    trace: list[tuple]
    problems: dict[str, Problems]

    @property
    def overlap(self) -> float:
        """The longest time for which a key was executed by two processes, seconds."""
        return max((end - begin for _, begin, end in overlaps(self.trace)), default=0.0)


def simulate(seed: int, *, beyond: bool = False, kinds: Collection[str] = (), grace: float | None = None) -> Result:
    """Run *seed*, under a choice of faults and a grace that are its own, or under *kinds* and *grace* (0 with *kinds*).

    *beyond*: one of them is a fault under which exclusivity is not promised, and is not checked.
    """
    if grace is None:
        grace = 0.0 if kinds else GRACES[seed % len(GRACES)]
    terms = replace(TERMS, grace=grace)
    world = World(seed)
    rng, weather = world.rng, Weather()
    services = Store(world, weather, 1.0), Broker(world, weather), Hosts(world, fenced=grace > 0)
    store, broker, _ = services
    shards = rng.choice((4, 8, 8, 16))
    nodes = [Node(world, f"n{i}", services, shards, terms) for i in range(rng.randint(2, 5))]
    kinds = set(kinds) or _kinds(rng, beyond=beyond)
    world.fact("faults", *sorted(kinds))
    store.server.publish = lambda incarnation: _call(world, store, nodes, incarnation)
    faults = Faults(world, services, nodes, weather, kinds, FAULTS_STOP)
    for node in nodes:
        world.at(rng.choice((0.0, rng.uniform(0, 6))), node.boot)
    _work(world, broker, rng, shards)
    faults.plan()

    def over() -> bool:
        return world.now > FAULTS_STOP + SETTLE + max(0.0, weather.latest - FAULTS_STOP) and not broker.left

    world.run(END, over)
    world.fact("over")
    return Result(seed, tuple(sorted(kinds)), world.trace, check(world.trace, terms, beyond=beyond))


def _kinds(rng: Random, *, beyond: bool) -> set[str]:
    kinds = set(rng.sample(ORDINARY, rng.randint(1, 7)))
    return kinds | {rng.choice(BEYOND)} if beyond else kinds


def _work(world: World, broker: Broker, rng: Random, shards: int) -> None:
    """Tasks of a few keys, most of them short, some as long as all leases."""
    keys = [(f"k{number}", rng.randrange(shards)) for number in range(rng.randint(4, 12))]
    when = 0.0
    for seq in range(rng.randint(15, 40)):
        when += rng.expovariate(rng.choice((1.0, 3.0)))
        if when > FAULTS_STOP:
            break
        key, shard = rng.choice(keys)
        dice = rng.random()
        duration = rng.uniform(0.01, 0.3) if dice < 0.5 else rng.uniform(0.3, 5) if dice < 0.85 else rng.uniform(5, 20)
        world.at(when, broker.submit, Message(seq, shard, key, duration))


def _call(world: World, store: Store, nodes: list[Node], incarnation: str) -> None:
    """Carry the store's call to the node that it is for."""
    for node in nodes:
        process = node.process
        if process and process.machine.incarnation == incarnation:
            store.call(node.name, process.local(process.handed), lambda: None)
