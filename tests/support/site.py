"""One place for an acceptance test: a data folder, its embedded Valkey, perhaps a RabbitMQ, the nodes on it, and an app to send tasks from."""

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis
from celery import Celery
from celery.result import AsyncResult
from kombu import Connection
from pytest_celery import CeleryTestSetup

import tasks.builds
import tests.acceptance.apps.probe  # noqa: F401 - shared tasks: every app knows them
from pool import Settings, install
from pool.embedded import is_redis
from pool.loopback_sshd import SshdInfo
from pool.sharding.hashing import queue_name
from tests.support.celery_nodes import (
    CHECKOUT,
    BeatContainer,
    RabbitContainer,
    ValkeyContainer,
    WorkerContainer,
    WorkerNode,
)
from tests.support.rabbitmq import RabbitServer
from tests.support.waiting import wait_until

RESULT_TIMEOUT = 60.0

BROKERS = ["redis", pytest.param("rabbitmq", marks=pytest.mark.rabbitmq)]
"""For modules whose tests run on each."""


class Site:
    """A data folder with its Valkey; ``env`` is what every node here gets.

    *rabbit*: the server whose virtual host is the broker here; None: the Valkey is.
    """

    def __init__(self, folder: Path, rabbit: RabbitServer | None = None) -> None:
        self.folder = folder
        self.data = folder / "data"
        self.valkey = ValkeyContainer(self.data / "valkey")
        self.broker = self.valkey if rabbit is None else RabbitContainer(rabbit)
        self.env = {"POOL_DATA_DIR": str(self.data)}
        if rabbit is not None:
            self.env |= {"POOL_BROKER_URL": self.broker.url, "POOL_REDIS_URL": self.valkey.url}
        self.hosts_file = folder / "hosts.toml"

    def write_hosts(self, text: str) -> None:
        """From here on, nodes use this hosts file."""
        self.hosts_file.write_text(text)
        self.env["POOL_HOSTS_FILE"] = str(self.hosts_file)

    def start(
        self,
        name: str = "node",
        *,
        app: str = "worker_config",
        options: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> WorkerNode:
        """Start a node; wait for it with ``ready()``. It also runs the tests' own tasks."""
        options = ["-I", "tests.acceptance.apps.probe", *options]
        container = WorkerContainer(name, self.folder, app=app, options=options, env={**self.env, **(env or {})})
        return WorkerNode(container, None)

    def beat(self, *, app: str, env: Mapping[str, str] | None = None) -> BeatContainer:
        return BeatContainer(self.folder, app=app, env={**self.env, **(env or {})})

    def work(self, key: str) -> Path:
        """Where the built-in hosts rule puts a key's files."""
        return self.data / "work" / key

    @contextlib.contextmanager
    def redis(self) -> Any:
        with redis.Redis.from_url(self.valkey.url, decode_responses=True) as client:
            yield client

    def forget_everything(self) -> None:
        """Empty the Valkey and the queues; for a test that shares them and whose nodes have ended."""
        with self.redis() as client:
            client.flushall()
        if self.broker is not self.valkey:
            list(rabbit_queues(self.broker.url, purge=True))

    def messages(self) -> int:
        """Messages that wait in any queue, or were taken and are not acknowledged (RabbitMQ: by nodes that ended)."""
        if self.broker is not self.valkey:
            return sum(rabbit_queues(self.broker.url))
        with self.redis() as client:
            lists = sum(client.llen(name) for name in client.scan_iter(_type="list"))
            claims = sum(client.hlen(name) for name in client.scan_iter(match="*.claims.*", _type="hash"))
            return lists + claims + client.hlen("unacked")

    def teardown(self) -> None:
        self.valkey.teardown()
        if self.broker is not self.valkey:
            self.broker.teardown()


def rabbit_queues(url: str, *, purge: bool = False) -> Iterator[int]:
    """For each queue that a node here may have made: how many messages it has that nobody has taken."""
    names = ["celery", *(queue_name(shard) for shard in range(64)), *(f"celery_delayed_{bit}" for bit in range(28))]
    with Connection(url) as connection:
        for name in names:
            with contextlib.suppress(*connection.channel_errors), connection.channel() as channel:
                yield channel.queue_declare(name, passive=True).message_count
                if purge:
                    channel.queue_purge(name)


def ssh_hosts(info: SshdInfo, root_dir: str = "builds/{key}") -> str:
    """A hosts file that sends every key to a build host."""
    return f"""
        [default]
        backend = "ssh"
        host = "127.0.0.1"
        port = {info.port}
        username = "builder"
        root_dir = "{root_dir}"
        client_keys = "{info.client_key}"
        known_hosts = "{info.known_hosts}"
    """


def echo_hosts(site: Site) -> str:
    """A hosts file with the agent ``echo``, run on the worker."""
    store = site.folder / "store"
    store.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.support.faulty_agent", "--store", str(store), "--load"]
    return f"""
        [default]
        backend = "local"
        root_dir = {json.dumps(str(site.data / "work" / "{key}"))}

        [agents.echo]
        kind = "acp"
        command = {json.dumps(command)}
        env = {{ PYTHONPATH = {json.dumps(str(CHECKOUT))} }}
        root_dir = {json.dumps(str(site.folder / "chats" / "{key}"))}
        permissions = {{ execute = "allow" }}
        cancel_timeout = 2
    """


class Producer(CeleryTestSetup):
    """pytest-celery's setup, whose app routes by key as any web app with the extension would."""

    app: Celery
    shards = 64
    """As many as the nodes have."""

    @classmethod
    def update_app_config(cls, app: Celery) -> None:
        app.conf.update(task_serializer="json", result_serializer="json", accept_content=["json"])
        if is_redis(app.conf.broker_url):
            app.conf.broker_transport_options = {"priority_steps": [0]}
        install(app, Settings(broker_url=app.conf.broker_url, result_url=app.conf.result_backend, shards=cls.shards))

    def send(self, name: str, *args: Any, **options: Any) -> AsyncResult:
        """Send one of the tasks that this process knows, by its name, as ``apply_async`` of the task does."""
        return self.app.tasks[name].apply_async(args, options.pop("kwargs", None), **options)

    def build(self, key: str, cmd: str, **kwargs: Any) -> AsyncResult:
        """``run_build.delay`` of this app."""
        return self.app.tasks[tasks.builds.run_build.name].delay(key, cmd, **kwargs)

    def built(self, key: str, cmd: str = "true", **kwargs: Any) -> dict[str, Any]:
        """Run a build to its end; return its result."""
        return self.build(key, cmd, **kwargs).get(timeout=RESULT_TIMEOUT)

    def shards_of(self, node: WorkerNode) -> int:
        """How many shards the node serves."""
        with self.app.connection_for_write() as connection:  # none of the pool's, which would outlive the broker
            ask = self.app.control.inspect([node.hostname()], timeout=20.0, limit=1, connection=connection)
            return int(ask.stats()[node.hostname()]["backend_pool"]["shards"])

    def wait_shared(self, nodes: Iterable[WorkerNode]) -> None:
        """Wait until these have shared the shards out: no key moves any more."""
        nodes = list(nodes)

        def even() -> bool:
            shares = [self.shards_of(node) for node in nodes]
            return sum(shares) == self.shards and max(shares) - min(shares) <= 1

        wait_until(even, "the shards are shared out", 60.0)

    def command(self, name: str, node: WorkerNode, **arguments: Any) -> None:
        """Have the node do what a control command says; it must agree."""
        options = {"destination": [node.hostname()], "reply": True, "timeout": 20.0, "limit": 1}
        with self.app.connection_for_write() as connection:
            (reply,) = self.app.control.broadcast(name, arguments, connection=connection, **options)
        assert "ok" in reply[node.hostname()]

    def where(self, key: str) -> dict[str, Any]:
        """Return who works for *key*: node, pid, queue, whether the backend was warm."""
        return self.send("probe.where", key).get(timeout=RESULT_TIMEOUT)

    def teardown(self) -> None:
        """Close the connections of this test's app."""
        close_app(self.app)


def close_app(app: Celery) -> None:
    """Close what an app of this process has open; a result that is dropped later must not come back to it."""
    consumer = app.backend.result_consumer
    consumer.stop()
    consumer._pubsub = None
    app.backend.client.close()
    app.close()


class Gate:
    """A build that runs until the test opens the gate: no build is ever caught, or missed, by timing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.command = (
            "echo $$ > started.new; echo run >> runs; mv started.new started;"
            " while [ ! -e go ]; do sleep 0.05; done; echo built"
        )

    @property
    def runs(self) -> int:
        """How often it was started."""
        with contextlib.suppress(FileNotFoundError):
            return len((self.folder / "runs").read_text().splitlines())
        return 0

    def wait_started(self, runs: int = 1) -> int:
        """Wait until it runs for the *runs*-th time; return the id of its process group."""
        wait_until(lambda: self.runs >= runs and (self.folder / "started").exists(), "the build runs", RESULT_TIMEOUT)
        pid = int((self.folder / "started").read_text())
        (self.folder / "started").unlink()
        return os.getpgid(pid)

    def open(self) -> None:
        (self.folder / "go").touch()


def connections(server_pid: int) -> int:
    """Open connections of a server on this machine, as the kernel sees them."""
    found = psutil.Process(server_pid).net_connections("tcp")
    return sum(1 for connection in found if connection.status == psutil.CONN_ESTABLISHED)
