"""A simulated node: the real lease machine, and a driver that does with virtual services what the coordinator does.

What the driver promises to the machine: one request under way; ``restored`` after the dead were put back;
``stopped`` when nothing more can be taken and what has not started is back; ``idle`` when nothing runs and everything
is settled (of suspended shards only while the node leaves); ``closed`` and ``abandoned`` when nothing runs any more, at the build host neither, and nothing is claimed.
"""

from collections.abc import Callable, Iterable
from math import inf

from pool.sharding.handoff import (
    Abandon,
    Beat,
    Close,
    Event,
    Instruction,
    Rejoin,
    Restore,
    Serve,
    Stop,
    Suspend,
    Tenancy,
)
from pool.sharding.lease import LeaseMachine, Request, Terms
from tests.simulation.world import Broker, Exchange, Hosts, Line, Message, Run, Store, World

CAPACITY = 6  # tasks that a process runs at once
POLL = 0.5  # seconds between two looks into the queues
CALL_TIMEOUT = 0.5  # seconds until a connection to the broker is given up
PULSE = 1.0


class Node:
    """A name, a clock, and at most one process at a time. Stopped, nothing in it happens, and everything happens late."""

    def __init__(
        self, world: World, name: str, services: tuple[Store, Broker, Hosts], shards: int, terms: Terms
    ) -> None:
        self.world = world
        self.name = name
        self.services = services
        self.shards = shards
        self.terms = terms
        self.rate = 1.0
        """How fast its clock is."""
        self.hub = 0.01
        """Seconds until its hub thread gets to what it is asked to do, at most."""
        self.offset = world.rng.uniform(0, 1000)
        self.process: Process | None = None
        self.paused = False
        self._backlog: list[tuple] = []

    def clock(self) -> float:
        return self.offset + self.world.now * self.rate

    def true(self, local: float) -> float:
        return (local - self.offset) / self.rate

    def boot(self) -> None:
        if self.process is None:
            self.process = Process(self)

    def crash(self) -> None:
        if self.process:
            self.world.fact("crash", self.name)
            self.end()

    def end(self) -> None:
        self.process = None
        self.paused = False
        self._backlog.clear()

    def pause(self) -> None:
        if self.process and not self.paused:
            self.paused = True
            self.world.fact("pause", self.name)

    def resume(self) -> None:
        """Everything that was due is done now, in no order."""
        if not self.paused:
            return
        self.paused = False
        backlog, self._backlog = self._backlog, []
        self.world.rng.shuffle(backlog)
        for process, do, arguments in backlog:
            if process is self.process:
                do(*arguments)
        if self.process:
            self.world.fact("resume", self.name)

    def deliver(self, process: "Process", do: Callable, *arguments) -> None:
        if process is not self.process:
            return
        if self.paused:
            self._backlog.append((process, do, arguments))
        else:
            do(*arguments)


class Process:
    """One life of a node, under one incarnation after the other."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.world = node.world
        self.store, self.broker, self.hosts = node.services
        self.client = self.store.client(node.shards, node.terms)
        self.machine = LeaseMachine(self._incarnation(), node.name, node.shards, node.terms)
        self.line = Line(self.hosts, node.name, self.local(self._ended))
        self.stays: dict[Tenancy, int] = {}
        self.kept: dict[int, int] = {}
        """Stays of shards that are suspended, or were: what still runs there belongs to the next tenancy."""
        self.consuming: set[int] = set()
        self.pending: dict[Tenancy, Event] = {}
        """What the machine waits for."""
        self.runs: dict[Run, Tenancy] = {}
        self.killed: set[Run] = set()
        """Those that get no pulse any more, whether or not the host has heard why."""
        self._armed = inf
        self._asked: Request | None = None
        self._again = False
        self._new_session()
        self._after(PULSE, self._pulse)
        self._after(0, self._poll)
        self._beat()

    def _incarnation(self) -> str:
        return f"{self.node.name}#{next(self.world.names)}"

    def local(self, do: Callable) -> Callable:
        """*do*, whenever this process gets to run."""
        return lambda *arguments: self.node.deliver(self, do, *arguments)

    def _after(self, seconds: float, do: Callable, *arguments) -> None:
        self.world.after(seconds / self.node.rate, self.node.deliver, self, do, *arguments)

    # -- the machine

    def told(self, instructions: Iterable[Instruction]) -> None:
        """Do as the machine says; called after every event."""
        for instruction in instructions:
            getattr(self, self._DO[type(instruction)])(instruction)
        machine = self.machine
        machine.check_invariants(self.node.clock())
        if machine.finished:
            self.world.fact("gone", self.node.name)
            self.node.end()
            return
        self._advance()
        self._arm()

    def _happened(self, event: Event, tenancies: Iterable[Tenancy]) -> None:
        self.told(self.machine.happened(event, tenancies, self.node.clock()))

    def _arm(self) -> None:
        due = self.node.true(self.machine.deadline)
        if due < self._armed - 1e-9 and due < inf:
            self._armed = due
            self.world.at(max(due, self.world.now) + self.world.rng.uniform(1e-6, 0.01), self._wake, due)

    def _wake(self, due: float) -> None:
        self.node.deliver(self, self._due, due)

    def _due(self, due: float) -> None:
        if due != self._armed:
            return
        self._armed = inf
        now = self.node.clock()
        if now >= self.machine.next_request and not self.machine.fenced:
            self._asked = None  # what is not answered within a heartbeat is given up
            self._beat()
        self.told(self.machine.tick(now))

    def _beat(self) -> None:
        if self._asked:
            self._again = True
            return
        self._again = False
        self._asked = request = self.machine.request(self.node.clock())
        self.store.call(
            self.node.name,
            self.local(lambda answer: self._answered(request, answer)),
            self.store.beat,
            self.client,
            request,
        )
        self._arm()

    def _answered(self, request: Request, answer) -> None:
        if self._asked is not request:
            return
        self._asked = None
        self.told(self.machine.answered(request, answer, self.node.clock()))
        if self._again and self.node.process is self and not self._asked:
            self._beat()

    def handed(self, _: None) -> None:
        """The store has called."""
        self._beat()

    # -- instructions

    def _restore(self, instruction: Restore) -> None:
        if not instruction.dead:
            self._after(self.world.rng.uniform(0.0, 0.02), self._happened, "restored", instruction.tenancies)
            return
        finished: list[bool] = []

        def restored(_: bool) -> None:
            if not finished:
                finished.append(True)
                self.machine.bury(instruction.dead)
                self._happened("restored", instruction.tenancies)

        def ask() -> None:
            if not finished:
                self.broker.call(self.node.name, self.local(restored), self.broker.restore, instruction.dead)
                self._after(CALL_TIMEOUT, ask)

        ask()

    def _serve(self, instruction: Serve) -> None:
        tenancy = instruction.tenancy
        self.stays[tenancy] = stay = self.kept.pop(tenancy.shard, None) or next(self.world.names)
        self.world.fact("serve", stay, tenancy.shard, tenancy.epoch, self.machine.incarnation, self.node.name)
        self._on_hub(self._consume, tenancy)

    def _on_hub(self, do: Callable, *arguments) -> None:
        self._after(self.world.rng.uniform(0, self.node.hub), do, *arguments)

    def _consume(self, tenancy: Tenancy) -> None:
        if tenancy.state == "serving":
            self.consuming.add(tenancy.shard)
            self._exchange()

    def _unconsume(self, tenancy: Tenancy, event: Event) -> None:
        current = self.machine.tenancies.get(tenancy.shard)
        if current is None or current is tenancy:
            self.consuming.discard(tenancy.shard)
        self._expect(tenancy, event)

    def _expect(self, tenancy: Tenancy, event: Event) -> None:
        if tenancy.expects(event):
            self.pending[tenancy] = event
            self._return_waiting(tenancy.shard)
            self._exchange()
            self._advance()

    def _stop(self, instruction: Stop) -> None:
        self._on_hub(self._unconsume, instruction.tenancy, "stopped")

    def _close(self, instruction: Close) -> None:
        self.pending.pop(instruction.tenancy, None)
        self._kill(instruction.tenancy)
        self._expect(instruction.tenancy, "closed")

    def _suspend(self, instruction: Suspend) -> None:
        tenancy = instruction.tenancy
        self.pending.pop(tenancy, None)
        if tenancy in self.stays:
            self.kept[tenancy.shard] = self.stays[tenancy]
            self._unserve(tenancy)
        self._on_hub(self._unconsume, tenancy, "idle")

    def _abandon(self, instruction: Abandon) -> None:
        tenancy = instruction.tenancy
        self.kept.pop(tenancy.shard, None)
        self.pending.pop(tenancy, None)
        self._unserve(tenancy)
        self._kill(tenancy)
        self._on_hub(self._unconsume, tenancy, "abandoned")

    def _unserve(self, tenancy: Tenancy) -> None:
        stay = self.stays.pop(tenancy, None)
        if stay is not None:
            self.world.fact("unserve", stay)

    def _kill(self, tenancy: Tenancy) -> None:
        for run, its in self.runs.items():
            if its.shard == tenancy.shard:
                self.killed.add(run)
                self.line.send(self.hosts.kill, run)

    def _rejoin(self, instruction: Rejoin) -> None:
        self.machine.rejoin(self._incarnation())
        self._new_session()
        self._asked = None
        self._armed = inf
        self._beat()

    def _beat_now(self, instruction: Beat) -> None:
        self._beat()

    _DO = {
        Restore: "_restore",
        Serve: "_serve",
        Stop: "_stop",
        Close: "_close",
        Suspend: "_suspend",
        Abandon: "_abandon",
        Beat: "_beat_now",
        Rejoin: "_rejoin",
    }

    def _advance(self) -> None:
        """Tell the machine what has come true."""
        for tenancy, event in list(self.pending.items()):
            if self.pending.get(tenancy) is not event or not self._is_true(tenancy, event):
                continue
            del self.pending[tenancy]
            if event == "stopped":
                self.pending[tenancy] = "idle"
            elif event == "closed":
                self._unserve(tenancy)
            self._happened(event, [tenancy])
            return  # which has looked again

    def _is_true(self, tenancy: Tenancy, event: Event) -> bool:
        shard = tenancy.shard
        if not self.machine.fenced and (self._news or (self._flying and shard in self._flying.takes)):
            return False  # something may still be taken by a call that was given up
        if event == "stopped":
            return all(m.shard != shard or seq in self.running or seq in self.settling for seq, m in self.held.items())
        if any(its.shard == shard for its in self.runs.values()):
            return False
        if tenancy.state == "suspended" and not self.machine.leaving:
            return False
        return self.machine.fenced or not any(m.shard == shard for m in self.held.values())

    # -- messages

    def _new_session(self) -> None:
        self.held: dict[int, Message] = {}
        """Claims, by seq: waiting, or ..."""
        self.running: set[int] = set()
        self.settling: set[int] = set()
        self.returning: set[int] = set()
        self.connection = 0
        self._news = True  # the connection is new
        self._flying: Exchange | None = None

    def _poll(self) -> None:
        self._exchange()
        self._after(POLL, self._poll)

    def _exchange(self) -> None:
        if self._flying or not self.machine.joined:
            return
        room = CAPACITY - len(self.held)
        takes = tuple(self.consuming) if room > 0 and self.machine.trusts(self.node.clock()) else ()
        if not (takes or self.settling or self.returning or self._news):
            return
        self._flying = wish = Exchange(
            self.machine.incarnation,
            self.connection,
            frozenset(self.held) if self._news else None,
            tuple(self.settling),
            tuple(self.returning),
            takes,
            room,
        )
        reply = self.local(lambda answer: self._exchanged(wish, answer))
        self.broker.call(self.node.name, reply, self.broker.exchange, wish)
        self._after(CALL_TIMEOUT, self._gave_up, wish)

    def _gave_up(self, wish: Exchange) -> None:
        if self._flying is wish:
            self._flying = None
            self.connection += 1
            self._news = True
            self._exchange()
            self._advance()

    def _exchanged(self, wish: Exchange, answer) -> None:
        if self._flying is not wish:
            return
        self._flying = None
        if answer is None:
            self.held.clear()
            self._forget(*self.settling, *self.returning)
            self.told(self.machine.outlawed(self.node.clock()))
            return
        self._news = False
        taken, claimants = answer
        self._forget(*wish.settles, *wish.returns)
        self.machine.registered(claimants)
        self.held.update((message.seq, message) for message in taken)
        self._start_what_may()
        self._advance()
        if self.settling or self.returning:
            self._exchange()

    def _forget(self, *seqs: int) -> None:
        for seq in seqs:
            self.held.pop(seq, None)
            self.settling.discard(seq)
            self.returning.discard(seq)

    def _return_waiting(self, shard: int) -> None:
        busy = self.running | self.settling
        self.returning.update(seq for seq, m in self.held.items() if m.shard == shard and seq not in busy)

    def _start_what_may(self) -> None:
        """Start what is the first of its key; what may not run here goes back."""
        now = self.node.clock()
        keys = {self.held[seq].key for seq in self.running if seq in self.held}  # not if it is fenced
        leaving = {self.held[seq].key for seq in self.returning}
        for seq in sorted(self.held.keys() - self.running - self.settling - self.returning):
            message = self.held[seq]
            tenancy = self.machine.tenancies.get(message.shard)
            if tenancy is None or tenancy.state != "serving" or not self.machine.trusts(now):
                self._return_waiting(message.shard)
            elif message.key in leaving:  # it was taken while the one before it was on its way back
                self.returning.add(seq)
            elif message.key not in keys:
                keys.add(message.key)
                self._start(message, tenancy)

    def _start(self, message: Message, tenancy: Tenancy) -> None:
        run = Run(next(self.world.names), message, self.stays[tenancy], tenancy.epoch)
        self.running.add(message.seq)
        self.runs[run] = tenancy
        if self.node.name in self.hosts.cut:
            self._after(0.2, self._ended, run, False)
        self.line.send(self.hosts.start, run, self._remaining())

    def _remaining(self) -> float:
        return max(0.0, self.machine.trusted_until + self.node.terms.grace - self.node.clock())

    def _pulse(self) -> None:
        if wanted := tuple(run for run in self.runs if run not in self.killed):
            self.line.send(self.hosts.pulse, wanted, self._remaining())
        self._after(PULSE, self._pulse)

    def _ended(self, run: Run, whole: bool) -> None:
        """The build host has told that *run* is over."""
        if self.runs.pop(run, None) is None:
            return
        self.killed.discard(run)
        seq = run.message.seq
        self.running.discard(seq)
        if seq in self.held:
            if whole:
                self.settling.add(seq)
            else:  # and what came after it with its key, or it would be overtaken
                key = run.message.key
                self.returning.update(s for s, m in self.held.items() if m.key == key and s not in self.settling)
        self._start_what_may()
        self._exchange()
        self._advance()
