"""Several nodes that share the shards out by leases, under a load of builds that the build host keeps a ledger of."""

import json
import time
from collections.abc import Callable, Iterable
from typing import Any

from celery import states
from redis.exceptions import RedisError

from pool.sharding.hashing import shard_of
from tests.support.celery_nodes import WorkerNode
from tests.support.ledger import Account, Build, Ledger, check
from tests.support.load import Load
from tests.support.openssh import OpenSshd
from tests.support.processes import group_members
from tests.support.site import Site
from tests.support.waiting import wait_until

KEYS = list({shard_of(f"user-{number}", 64): f"user-{number}" for number in range(400)}.values())[:41]
"""Each in a shard of its own, so that every one of five nodes has some. A prime number: long builds visit all of them."""

SETTLE_TIMEOUT = 90.0
"""Seconds for everything that was sent to be done, once nothing disturbs the nodes any more."""

QUICK = {"POOL_LEASE_TTL": "2.5", "POOL_LEASE_HEARTBEAT": "0.5"}
"""Half of the default times: for tests in which leases have to end."""


def build_hosts(server: OpenSshd, folder: str) -> str:
    """A hosts file that has every key work in a folder of its own at a real OpenSSH server."""
    info = server.info
    return f"""
        [default]
        backend = "ssh"
        host = "127.0.0.1"
        port = {info.port}
        username = "{info.username}"
        root_dir = "{folder}/{{key}}"
        client_keys = "{info.client_key}"
        known_hosts = "{info.known_hosts}"
    """


class Cluster:
    """The nodes of one test, by name. *env*: what they all get."""

    def __init__(self, site: Site, start: Callable[..., WorkerNode], ledger: Ledger) -> None:
        self.site = site
        self.ledger = ledger
        self.env = {"TEST_LEDGER": str(ledger.folder)}
        self.nodes: dict[str, WorkerNode] = {}
        self._start = start

    def start(self, *names: str, **options: Any) -> list[WorkerNode]:
        """Start nodes side by side; return when they are ready."""
        env = {**self.env, **options.pop("env", {})}
        nodes = [self._start(name, ready=False, env=env, **options) for name in names]
        for name, node in zip(names, nodes, strict=True):
            node.ready()
            self.nodes[name] = node
        return nodes

    def load(self, keys: list[str] | None = None, **options: Any) -> Load:
        return Load(self.site.broker.url, keys or KEYS, **options)

    # -- what the ledger says

    def wait_working(self, *nodes: WorkerNode, timeout: float = 60.0) -> None:
        """Wait until each of them has begun another build, and one has ended there."""
        seen = {build.id for build in self.ledger.builds()}
        hosts = {node.hostname() for node in nodes}

        def all_work() -> bool:
            fresh = [build for build in self.ledger.builds() if build.id not in seen and build.ended]
            return hosts <= {build.node for build in fresh}

        wait_until(all_work, f"builds at {', '.join(hosts)}", timeout, every=0.1)

    def wait_busy(self, node: WorkerNode, timeout: float = 60.0) -> Build:
        """Wait until a long build has begun at the node; return it. It has three seconds left at least."""

        def running() -> Build | None:
            latest = time.time_ns() - int(1e9)
            found = [b for b in self.ledger.builds() if b.node == node.hostname() and not b.ended and b.began > latest]
            return next((b for b in reversed(found) if b.seconds >= 4.0 and group_members(b.group)), None)

        return wait_until(running, f"a long build runs at {node.hostname()}", timeout, every=0.05)

    def wait_rerun(self, build: Build, timeout: float = 30.0) -> Build:
        """Wait until the task of a build runs again, at another node."""

        def again() -> Build | None:
            return next((b for b in self.ledger.builds() if b.task == build.task and b.node != build.node), None)

        return wait_until(again, f"{build} runs again elsewhere", timeout, every=0.05)

    def settled(self, load: Load) -> Account:
        """Stop the load, wait until all is done, and hold the ledger against it."""
        load.stop()
        wait_until(
            lambda: load.sent.keys() <= self.ledger.ended(), lambda: self._missing(load), SETTLE_TIMEOUT, every=0.2
        )
        wait_until(lambda: not self.unfinished(load.sent), lambda: str(self.unfinished(load.sent)), 30.0, every=0.2)
        return check(self.ledger.builds(), load.sent, 4, load.doubtful)

    def _missing(self, load: Load) -> str:
        builds = self.ledger.builds()
        missing = load.sent.keys() - self.ledger.ended()
        told = {task: (load.sent[task], [b for b in builds if b.task == task]) for task in sorted(missing)[:5]}
        return f"{len(missing)} of {len(load.sent)} tasks are done; the first missing: {told}"

    def unfinished(self, tasks: Iterable[str]) -> dict[str, Any]:
        """Those of the tasks whose result is not a success."""
        tasks = list(tasks)
        with self.site.redis() as client:
            try:
                found = client.mget([f"celery-task-meta-{task}" for task in tasks]) if tasks else []
            except RedisError as error:
                return {"redis": repr(error)}
        results = dict(zip(tasks, (json.loads(text) if text else {} for text in found), strict=True))
        return {task: result for task, result in results.items() if result.get("status") != states.SUCCESS}
