"""Nodes that share out the shards by leases, steady work for every shard, and the ledger of what became of it."""

import itertools
import os
import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import redis

from benchmarks.harness import Worker, broker, scratch
from pool.sharding.hashing import shard_of

SHARDS = 64
SETTLE_TIMEOUT = 60.0  # seconds for the nodes to share out the shards evenly
DRAIN_TIMEOUT = 120.0  # seconds for what was sent to be done


class Entry(NamedTuple):
    """A line of the ledger. ``at``: seconds, wall clock of this machine."""

    what: str
    at: float
    node: str
    number: int
    key: str

    @property
    def shard(self) -> int:
        return shard_of(self.key, SHARDS)


class Ledger:
    """What the workers wrote, read as it grows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()
        self.entries: list[Entry] = []
        self._offset = 0

    def read(self) -> list[Entry]:
        """Return all entries so far."""
        with self.path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.decode().splitlines():
            what, at, node, number, key = line.split(" ", 4)
            self.entries.append(Entry(what, float(at), node.partition("@")[0], int(number), key))
        return self.entries

    def since(self, at: float, *what: str) -> list[Entry]:
        """Return the entries of these kinds from *at* on, in the order of their times."""
        return sorted((e for e in self.read() if e.at >= at and e.what in what), key=lambda entry: entry.at)

    def counts(self, what: str) -> Counter[int]:
        """How many entries of a kind each task has."""
        return Counter(entry.number for entry in self.read() if entry.what == what)


class Fleet:
    """A broker, and nodes by name that come and go."""

    def __init__(self, folder: Path, url: str, stack: ExitStack, **env: str) -> None:
        self.folder = folder
        self.env = {
            "POOL_BROKER_URL": url,
            "POOL_REDIS_URL": url,
            "POOL_RESULT_URL": url,
            "POOL_DATA_DIR": str(folder / "data"),
            "BENCH_LEDGER": str(folder / "ledger"),
            "BENCH_HURRY": str(folder / "hurry"),
            **env,
        }
        os.environ.update(self.env)  # every table has a process of its own
        from benchmarks.fleet_app import step

        self.step = step
        self.ledger = Ledger(folder / "ledger")
        self.nodes: dict[str, Worker] = {}
        self.sent: dict[int, str] = {}
        """The key of each task that was sent, by its number."""
        self._stack = stack
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._redis = redis.Redis.from_url(self.env["POOL_REDIS_URL"], decode_responses=True)

    # -- nodes

    def start(self, *names: str, **env: str) -> None:
        """Start nodes and wait until all nodes have shared out the shards."""
        for name in names:
            self.nodes[name] = self._stack.enter_context(
                Worker("benchmarks.fleet_app", name, {**self.env, **env}, log=self.folder / f"{name}.log")
            )
        self.until_shared_out()

    def kill(self, name: str) -> float:
        """Kill -9; return when (wall clock)."""
        at = time.time()
        self.nodes.pop(name).kill()
        return at

    def leave(self, name: str) -> float:
        """TERM, and wait for its end; return when it ended (wall clock). Raises if its exit code is not 0."""
        code = self.nodes[name].stop()
        if code != 0:
            raise RuntimeError(f"{name} ended with {code}")
        del self.nodes[name]
        return time.time()

    def owners(self) -> dict[int, str]:
        """Return who has the lease of each shard, as the table says."""
        leases: Any = self._redis.hgetall("{pool}:leases")
        members: Any = self._redis.hgetall("{pool}:members")
        found = {int(shard): lease.split(" ", 1)[1] for shard, lease in leases.items()}
        return {shard: owner.partition("@")[0] for shard, owner in found.items() if owner in members}

    def until_shared_out(self) -> None:
        """Wait until the live nodes, and nobody else, own all shards, evenly."""

        def even() -> bool:
            counts = Counter(self.owners().values())
            shares = [counts[name] for name in self.nodes]
            return set(counts) == set(self.nodes) and sum(shares) == SHARDS and max(shares) - min(shares) <= 1

        for worker in self.nodes.values():
            worker.until(even, "has its share of the shards", SETTLE_TIMEOUT)

    # -- work

    def send(self, key: str, command: str = "", pause: float = 0.0) -> int:
        """Enqueue a task; return its number."""
        with self._lock:
            number = next(self._numbers)
            self.sent[number] = key
        self.step.apply_async((key, number, command, pause))
        return number

    @contextmanager
    def load(self, keys: Collection[str], every: float, commands: Mapping[str, str] | None = None) -> Iterator[None]:
        """Send a task for each key *every* so many seconds, spread out evenly; *commands*: of those that run one."""
        ended = threading.Event()

        def send() -> None:
            due = time.monotonic()
            order = list(keys)
            random.Random(7).shuffle(order)
            while not ended.is_set():
                for key in order:
                    self.send(key, (commands or {}).get(key, ""))
                    due += every / len(order)
                    if ended.wait(max(0.0, due - time.monotonic())):
                        return

        thread = threading.Thread(target=send, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def until(self, done: Callable[[], Any], what: str, timeout: float = DRAIN_TIMEOUT) -> Any:
        """Wait for something that any of the nodes must do."""
        return next(iter(self.nodes.values())).until(done, what, timeout)

    def drain(self) -> None:
        """Wait until every task that was sent has ended, without pauses, for DRAIN_TIMEOUT at most."""
        hurry = Path(self.env["BENCH_HURRY"])
        hurry.touch()
        with suppress(RuntimeError):
            self.until(lambda: not self.lost(), "all is done")
        hurry.unlink()

    def forget(self) -> None:
        """Throw away what is queued; no node runs."""
        self._redis.flushall()
        self.sent = {number: key for number, key in self.sent.items() if number not in self.lost()}

    def lost(self) -> set[int]:
        """Tasks that were sent and have neither ended nor failed (yet)."""
        return self.sent.keys() - self.ledger.counts("end").keys() - self.ledger.counts("fail").keys()

    def twice(self, what: str) -> int:
        """How many tasks have more than one entry of a kind."""
        return sum(count > 1 for count in self.ledger.counts(what).values())


def keys_by_shard() -> dict[int, str]:
    """Return one key for each shard."""
    found: dict[int, str] = {}
    number = 0
    while len(found) < SHARDS:
        key = f"user-{number}"
        found.setdefault(shard_of(key, SHARDS), key)
        number += 1
    return found


def by_shard(entries: Collection[Entry]) -> dict[int, list[Entry]]:
    """Sort entries into their shards, keeping their order."""
    found: dict[int, list[Entry]] = defaultdict(list)
    for entry in entries:
        found[entry.shard].append(entry)
    return found


@contextmanager
def fleet(**env: str) -> Iterator[Fleet]:
    """A fleet without nodes, on a Valkey of its own."""
    with scratch() as folder, broker(folder) as url, ExitStack() as stack:
        yield Fleet(folder, url, stack, **env)


def percentile(values: Collection[float], share: float) -> float:
    """The smallest value that at least this share of *values* does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))]
