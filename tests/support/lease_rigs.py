"""The servers that the conformance suite of the lease store runs over, and a node that tells and asks by hand."""

import asyncio
import contextlib
import shutil
import signal
import socket
import subprocess
import time
import uuid
from pathlib import Path

from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.asyncio import RedisCluster
from redis.exceptions import RedisError

from pool import embedded
from pool.sharding.lease import Lease, Release, Request, Terms
from pool.sharding.redis_store import RedisStore
from tests.support.lease_store import FakeServer, FakeStore
from tests.support.waiting import wait_until

TERMS = Terms(ttl=0.4, heartbeat=0.1)
SLOTS = 16384
POLL = 0.01
"""Seconds between two looks of somebody who waits."""


class EmbeddedServer:
    """The embedded Valkey in a folder of its own."""

    cluster = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = embedded.embedded_url(folder)

    def restart(self) -> None:
        embedded.stop(self.folder)
        assert embedded.embedded_url(self.folder) == self.url

    def stop(self) -> None:
        embedded.stop(self.folder)


class DebianServer:
    """Debian's redis-server on a port and in a folder of its own; with *cluster*, one node that has all slots."""

    binary = shutil.which("redis-server")

    def __init__(self, folder: Path, *, cluster: bool) -> None:
        self.folder = folder
        self.cluster = cluster
        folder.mkdir()
        self.port = _free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        try:
            self.start()
        except BaseException:
            self.stop()
            raise

    def start(self) -> None:
        options = [
            "--port",
            self.port,
            "--dir",
            self.folder,
            "--appendonly",
            "yes",
            "--save",
            "",
            "--bind",
            "127.0.0.1",
        ]
        if self.cluster:
            options += ["--cluster-enabled", "yes"]
        command = [self.binary, *map(str, options)]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        wait_until(self._ready, f"redis-server on port {self.port} is ready")

    def _ready(self) -> bool:
        with Redis.from_url(self.url) as client, contextlib.suppress(RedisError):
            if not self.cluster:
                return client.ping()
            if b"cluster_slots_assigned:0" in client.execute_command("CLUSTER", "INFO"):
                client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, SLOTS - 1)
            return b"cluster_state:ok" in client.execute_command("CLUSTER", "INFO")
        return False

    def restart(self) -> None:
        self.stop()
        self.start()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(20)


def _free_port() -> int:
    while True:
        with socket.socket() as probe, socket.socket() as above:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
            try:
                above.bind(("127.0.0.1", port + 10000))  # which a cluster node takes too
            except (OSError, OverflowError):
                continue
            return port


class RealRig:
    """One namespace of a real server.

    The nodes' clock moves while somebody waits, and no faster than the server's: leases do not lapse because this
    machine, or the restart of a server, is slow.
    """

    fake = False

    def __init__(self, server: EmbeddedServer | DebianServer) -> None:
        self.server = server
        self.terms = TERMS
        self._now = 0.0
        self.namespace = f"test-{uuid.uuid4().hex}"
        self.admin = Redis.from_url(server.url)
        self.runner = asyncio.Runner()
        make = RedisCluster if server.cluster else AsyncRedis
        self.client = make.from_url(server.url, decode_responses=True)

    def store(self, shards: int) -> RedisStore:
        return RedisStore(self.client, self.namespace, shards, self.terms)

    def run(self, coroutine):
        return self.runner.run(coroutine)

    def now(self) -> float:
        """Seconds on the clock of every node."""
        return self._now

    def close(self) -> None:
        self.runner.run(self.client.aclose())
        self.runner.close()
        self.admin.close()

    def until(self, condition, what: str):
        def look():
            result = condition()
            self._now += POLL
            return result

        return wait_until(look, what, every=POLL)

    def _keys(self) -> list[bytes]:
        return sorted(self.admin.keys(f"{{{self.namespace}}}:*"))

    def flush(self) -> None:
        self.admin.delete(*self._keys())

    def forget_meta(self) -> None:
        assert self.admin.delete(f"{{{self.namespace}}}:meta")

    def restart(self) -> None:
        self.server.restart()
        self.run(self.client.aclose())  # its connections are gone; it makes new ones

    def snapshot(self):
        return {key: self.admin.dump(key) for key in self._keys()}

    def fail_over(self, replica) -> None:
        self.restart()
        self.flush()
        for key, value in replica.items():
            self.admin.restore(key, 0, value)

    def calls(self) -> int:
        """Commands that clients sent for a heartbeat: the scripts that ran."""
        stats = self.admin.info("commandstats")
        return sum(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("eval", "evalsha"))

    def listen(self, incarnation: str):
        """Subscribe to what is published for *incarnation*; the result returns True once there was something."""
        channel = self.store(1)._channel + incarnation
        listener = self.admin.pubsub()
        listener.subscribe(channel)
        wait_until(lambda: (listener.get_message() or {}).get("type") == "subscribe", "the subscription is there")
        return lambda: (listener.get_message() or {}).get("type") == "message"


class FakeRig:
    """The same over the fake: here time only passes when somebody waits."""

    fake = True

    def __init__(self) -> None:
        self.micros = time.time_ns() // 1000
        self.jumped = 0
        self.server = FakeServer(lambda: self.micros)
        self.snapshot = self.server.snapshot
        self.fail_over = self.server.fail_over
        self.flush = self.server.flush
        self.forget_meta = self.server.forget_meta
        self.restart = self.server.restart

    def store(self, shards: int) -> FakeStore:
        return FakeStore(self.server, shards, TERMS)

    def run(self, coroutine):
        with contextlib.suppress(StopIteration):
            coroutine.send(None)
            raise AssertionError("the fake never waits")

    def close(self) -> None:
        pass

    def now(self) -> float:
        """Seconds on the clock of every node; the server's may jump."""
        return (self.micros - self.jumped) / 1e6

    def jump(self, seconds: int) -> None:
        """Turn the server's clock."""
        self.micros += 1_000_000 * seconds
        self.jumped += 1_000_000 * seconds

    def until(self, condition, what: str):
        for _ in range(1000):
            if result := condition():
                return result
            self.micros += 10_000
        raise AssertionError(f"not within 10 s of the fake's time: {what}")

    def calls(self) -> int:
        return self.server.calls

    def listen(self, incarnation: str):
        heard = []
        self.server.publish = heard.append
        return lambda: incarnation in heard


class Node:
    """Keeps what it was answered, as a node does, and decides nothing."""

    def __init__(self, rig, name: str, shards: int = 64, incarnation: str = "") -> None:
        self.rig = rig
        self.name = name
        self.incarnation = incarnation or f"{name}#{uuid.uuid4().hex[:8]}"
        self.store = rig.store(shards)
        self.born = ""
        self.seen = 0
        self.floor = 0
        self.members = {}
        self.leases: dict[int, Lease] = {}
        self.answer = None
        self.last_beat = None

    def beat(self, state="active", takes=(), releases=(), asserts=(), buried=()):
        now = self.rig.now()
        elapsed = 0.0 if self.last_beat is None else now - self.last_beat
        self.last_beat = now
        request = Request(
            self.incarnation, self.name, state, self.born, self.seen, self.floor, tuple(takes),
            tuple(Release(*release) for release in releases), tuple(asserts), tuple(buried), elapsed, now,
        )  # fmt: skip
        self.answer = answer = self._call(request)
        if answer.verdict == "ok":
            if answer.born != self.born:
                self.leases.clear()
            self.born, self.seen = answer.born, answer.version
            self.leases.update(answer.leases or {})
            self.members = answer.members or self.members
        return answer

    def _call(self, request: Request):
        answers = []

        async def call() -> None:
            answers.append(await self.store.beat(request))

        self.rig.run(call())
        return answers[0]

    def settle(self) -> "Node":
        """Beat until the table may be used."""
        self.rig.until(lambda: self.beat().settles_in == 0, f"the table settles for {self.name}")
        return self

    def owned(self) -> dict[int, int]:
        """Shard -> epoch of what is its own."""
        return {shard: lease.epoch for shard, lease in self.leases.items() if lease.owner == self.incarnation}
