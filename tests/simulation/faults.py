"""What goes wrong, and when: each seed enables some kinds of faults, and lets them strike often."""

from collections.abc import Callable
from random import Random

from tests.simulation.node import Node
from tests.simulation.world import Broker, Hosts, Store, Weather, World

ORDINARY = (
    "pause", "crash", "cut_store", "cut_broker", "cut_hosts", "freeze_store", "stop_store", "restart_store", "fail_over",
    "freeze_broker", "drain", "leave", "busy_hub", "lose", "late", "drift",
    "jump",
)  # fmt: skip
"""Faults under which everything is promised."""

BEYOND = ("flush", "jump_back", "wild_drift")
"""Faults under which a key may be executed twice for a bounded time; see `checkers`."""


class Faults:
    """The plan of one seed. It stops at *until*; what a fault has broken is mended then at the latest."""

    def __init__(
        self,
        world: World,
        services: tuple[Store, Broker, Hosts],
        nodes: list[Node],
        weather: Weather,
        kinds: set[str],
        until: float,
    ) -> None:
        self.world = world
        self.store, self.broker, self.hosts = services
        self.nodes = nodes
        self.weather = weather
        self.kinds = kinds
        self.until = until
        self.drained: set[Node] = set()

    def plan(self) -> None:
        """Put everything on the calendar."""
        rng = self.world.rng
        for kind in sorted(self.kinds):
            strike = getattr(self, kind, None)
            if strike is None:
                continue
            when = rng.uniform(1, self.until * 0.6)
            often = rng.choice((2.5, 6.0, 12.0))
            while when < self.until:
                self.world.at(when, self._strike, strike)
                when += rng.expovariate(1 / often)
        self._set_the_conditions(rng)
        self.world.at(self.until, self.mend)

    def _set_the_conditions(self, rng: Random) -> None:
        if "lose" in self.kinds:
            self.weather.lost = rng.choice((0.01, 0.05, 0.2))
        if "late" in self.kinds:
            self.weather.late = rng.choice((0.01, 0.05, 0.15, 0.4))
        if "busy_hub" in self.kinds:
            for node in self.nodes:
                node.hub = rng.choice((0.01, 0.3, 1.0))
        most = 0.2 if "wild_drift" in self.kinds else 0.02 if "drift" in self.kinds else 0.0
        for node in self.nodes:
            node.rate = 1 + rng.choice((-most, most, rng.uniform(-most, most)))
        self.store.rate = 1 + rng.choice((-most, most, rng.uniform(-most, most)))

    def _strike(self, strike: Callable) -> None:
        strike(self.world.rng)

    def _for(self, seconds: float, begin: Callable, end: Callable) -> None:
        begin()
        self.world.at(min(self.world.now + seconds, self.until), end)

    # -- one kind each

    def pause(self, rng: Random) -> None:
        node = rng.choice(self.nodes)
        self._for(rng.choice((0.3, 3.9, 4.3, 4.7, 5.2, 6.0, rng.uniform(0.1, 15))), node.pause, node.resume)

    def crash(self, rng: Random) -> None:
        node = rng.choice(self.nodes)
        self._for(rng.choice((0.05, 1.0, rng.uniform(0, 10))), node.crash, node.boot)

    def _cut(self, service, rng: Random) -> None:
        name = rng.choice(self.nodes).name
        self._for(
            rng.choice((0.8, 4.5, rng.uniform(0.1, 12))),
            lambda: service.cut.add(name),
            lambda: service.cut.discard(name),
        )

    def cut_store(self, rng: Random) -> None:
        self._cut(self.store, rng)

    def cut_broker(self, rng: Random) -> None:
        self._cut(self.broker, rng)

    def cut_hosts(self, rng: Random) -> None:
        self._cut(self.hosts, rng)

    def freeze_store(self, rng: Random) -> None:
        self._for(rng.uniform(0.2, 10), lambda: setattr(self.store, "frozen", True), self.store.thaw)

    def freeze_broker(self, rng: Random) -> None:
        self._for(rng.uniform(0.2, 6), lambda: setattr(self.broker, "frozen", True), self.broker.thaw)

    def stop_store(self, rng: Random) -> None:
        self._for(rng.uniform(0.2, 10), lambda: setattr(self.store, "down", True), self._start_store)

    def _start_store(self) -> None:
        self.store.down = False
        self._reborn()
        self.store.server.restart()

    def restart_store(self, rng: Random) -> None:
        self._reborn()
        self.store.server.restart()

    def fail_over(self, rng: Random) -> None:
        replica = self.store.server.snapshot()
        lag = rng.choice((0.05, 0.5, 1.5, 4.0))
        self.world.at(min(self.world.now + lag, self.until), self._fail_over, replica)

    def _fail_over(self, replica) -> None:
        self._reborn()
        self.store.server.fail_over(replica)

    def flush(self, rng: Random) -> None:
        self._reborn()
        self.store.server.flush()

    def jump(self, rng: Random) -> None:
        self.store.jump += rng.choice((0.5, 2.0, 3600.0))

    def jump_back(self, rng: Random) -> None:
        self.store.jump -= rng.choice((0.5, 2.0, 3600.0))

    def _reborn(self) -> None:
        self.world.fact("reborn")

    def drain(self, rng: Random) -> None:
        node = rng.choice(self.nodes)
        self.drained.add(node)
        self._order(node, "drain")
        self.world.at(min(self.world.now + rng.uniform(0.1, 12), self.until), self.undrain, node)

    def undrain(self, node: Node) -> None:
        self.drained.discard(node)
        self._order(node, "undrain")

    def leave(self, rng: Random) -> None:
        node = rng.choice(self.nodes)
        self._order(node, "leave")
        self.world.at(min(self.world.now + rng.uniform(0.5, 8), self.until), node.boot)

    def _order(self, node: Node, what: str) -> None:
        """The operator's command reaches a node that is awake."""
        if process := node.process:
            self.world.fact(what, node.name)
            node.deliver(process, lambda: process.told(getattr(process.machine, what)(node.clock())))

    # -- the end of it

    def mend(self) -> None:
        """Everything works again from now on; what was lost stays lost."""
        self.weather.lost = self.weather.late = 0.0
        for service in (self.store, self.broker):
            service.down = False
            service.cut.clear()
            if service.frozen:
                service.thaw()
        self.hosts.cut.clear()
        for node in self.nodes:
            node.resume()
        self.world.at(max(self.until, self.weather.latest), self._calm)

    def _calm(self) -> None:
        self.world.fact("calm")
        for node in self.nodes:
            if node.process is None or not node.process.machine.leaving:
                node.boot()
            else:
                self._boot_when_gone(node)
            self._order(node, "undrain")  # orders that reached a stopped node were carried out in no order
        staying = [node for node in self.nodes if node.process and not node.process.machine.leaving]
        if len(staying) > 1 and self.world.rng.random() < 0.4:
            self._order(self.world.rng.choice(staying), "drain")

    def _boot_when_gone(self, node: Node) -> None:
        if node.process is None:
            node.boot()
        else:
            self.world.after(0.5, self._boot_when_gone, node)
