"""Canaries in place of secrets: where Celery, the pool and Flower write things down, none of them turns up."""

import base64
import binascii
import re
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self
from urllib.parse import urlsplit

import asyncssh
import psutil
import pytest
import redis
from celery import Celery
from kombu import Exchange, Queue

from pool.sharding.hashing import queue_name, shard_of
from tests.support.celery_nodes import WorkerNode
from tests.support.flower import Flower
from tests.support.password_sshd import PasswordSshd
from tests.support.site import RESULT_TIMEOUT, Gate, Producer, Site, close_app
from tests.support.waiting import wait_until

pytestmark = pytest.mark.timeout(240)

PASSWORD, WRONG_PASSWORD, PASSPHRASE, TOKEN, LATER = (f"canary-{secrets.token_hex(12)}" for _ in range(5))

NODE_ENV = {
    "BUILD_HOST_PASSWORD": PASSWORD,
    "WRONG_PASSWORD": WRONG_PASSWORD,
    "CLIENT_KEY_PASSPHRASE": PASSPHRASE,
    "POOL_KEY_CONCURRENCY": "1",  # the second build of a key waits
}

BROKER_KEYS = re.compile(r"unacked|pool\.shard\.\d+|.*\.claims\..*")
"""Redis keys that hold messages: a task's arguments are in them until it is done."""

Place = tuple[str, bytes]
"""A name and what is written there."""


@pytest.fixture(scope="module")
def host(site: Site) -> Iterator[PasswordSshd]:
    """A build host that takes a password, or an encrypted key."""
    with PasswordSshd(site.folder / "sshd", PASSWORD) as server:
        key = asyncssh.read_private_key(server.info.client_key)
        encrypted = server.info.client_key.with_name("encrypted_key")
        encrypted.touch(mode=0o600)
        key.write_private_key(encrypted, passphrase=PASSPHRASE)
        yield server


@pytest.fixture(scope="module")
def hosts(host: PasswordSshd) -> str:
    """One rule for each way to log in: right, wrong, and where there is no server."""
    ways = {
        "pw-*": 'client_keys = []\npassword_env = "BUILD_HOST_PASSWORD"',
        "key-*": f'client_keys = "{host.info.client_key.with_name("encrypted_key")}"\npassphrase_env = "CLIENT_KEY_PASSPHRASE"',
        "wrong-*": 'client_keys = []\npassword_env = "WRONG_PASSWORD"',
        "gone-*": 'client_keys = []\npassword_env = "BUILD_HOST_PASSWORD"',
    }
    return "\n".join(
        f"""
[[match]]
key = "{pattern}"
backend = "ssh"
host = "127.0.0.1"
port = {1 if pattern == "gone-*" else host.info.port}
username = "builder"
root_dir = "builds/{{key}}"
known_hosts = "{host.info.known_hosts}"
{way}
"""
        for pattern, way in ways.items()
    )


@pytest.fixture(scope="module")
def start_nodes() -> Any:
    """One node, that logs everything there is."""
    return lambda site: [site.start("node", options=["-l", "DEBUG"], env=NODE_ENV)]


@pytest.fixture(scope="module")
def node(celery_worker_cluster: Any) -> WorkerNode:
    return celery_worker_cluster[0]


@pytest.fixture(scope="module")
def flower(site: Site, node: WorkerNode) -> Iterator[Flower]:
    flower = Flower(site, "--logging=debug")
    try:
        flower.ready()
        flower.wait_for(node)
        yield flower
    finally:
        flower.teardown()


class Events:
    """Everything that is sent as an event while the block runs, heard in a thread."""

    def __init__(self, app: Celery) -> None:
        self.seen: list[dict[str, Any]] = []
        self._app = app
        self._connection = app.connection_for_read()
        self._receiver = app.events.Receiver(self._connection, handlers={"*": self.seen.append})
        self._thread = threading.Thread(target=self._receiver.capture, kwargs={"limit": None}, name="events")

    def __enter__(self) -> Self:
        self._thread.start()
        wait_until(lambda: self.count("worker-heartbeat"), "events are heard", 30.0)
        return self

    def __exit__(self, *_: object) -> None:
        self._receiver.should_stop = True
        self._thread.join(30.0)
        assert not self._thread.is_alive()
        self._connection.close()

    def count(self, kind: str) -> int:
        return sum(event["type"] == kind for event in list(self.seen))


# -- where to look


def in_redis(site: Site) -> Iterator[Place]:
    """All values of all keys, and the messages in them decoded."""
    with redis.Redis.from_url(site.valkey.url) as client:
        readers: dict[bytes, Callable[[bytes], Any]] = {
            b"string": client.get,
            b"list": lambda key: client.lrange(key, 0, -1),
            b"hash": client.hgetall,
            b"set": client.smembers,
            b"zset": lambda key: client.zrange(key, 0, -1),
            b"stream": client.xrange,
            b"none": lambda key: None,  # it has just expired
        }
        for key in client.scan_iter():
            text = b"%r" % [key, readers[client.type(key)](key)]
            yield f"Redis {key.decode()}", text + b"".join(decoded(text))


def decoded(text: bytes) -> Iterator[bytes]:
    """What looks like base64 in *text*, decoded: so Celery's messages carry their arguments."""
    for found in re.findall(rb"[A-Za-z0-9+/]{24,}", text):
        with_padding = found[: len(found) // 4 * 4]
        try:
            yield base64.b64decode(with_padding)
        except binascii.Error:
            continue


def in_answers(producer: Producer, ids: list[str]) -> Iterator[Place]:
    """What ``celery inspect`` says."""
    inspect = producer.app.control.inspect(timeout=10.0, limit=1)
    for command in ("active", "reserved", "scheduled", "revoked", "stats", "conf", "report", "active_queues"):
        yield f"inspect {command}", repr(getattr(inspect, command)()).encode()
    yield "inspect query_task", repr(inspect.query_task(*ids)).encode()


def on_command_lines() -> Iterator[Place]:
    """What anybody on this machine sees of the processes."""
    for process in psutil.process_iter(["cmdline"]):
        yield f"process {process.pid}", "\0".join(process.info["cmdline"] or ()).encode()


def holding(secret: str, places: Iterable[Place]) -> set[str]:
    """The names of the places in which the secret is."""
    return {name for name, text in places if secret.encode() in text}


# -- builds that carry them


def foreign(site: Site, key: str) -> str:
    """Send a build as a producer without the task's code, whose Celery shows arguments as they are; return its id."""
    name = queue_name(shard_of(key, 64))
    queue = Queue(name, Exchange("pool.shard", type="direct"), routing_key=name)
    app = Celery("foreign", broker=site.broker.url, backend=site.valkey.url, set_as_current=False)
    app.conf.broker_transport_options = {"priority_steps": [0]}
    try:
        options = {"queue": queue, "headers": {"pool_key": key}}
        return app.send_task("tasks.builds.run_build", (key, "true"), {"env": {"TOKEN": TOKEN}}, **options).id
    finally:
        close_app(app)


def test_secrets_turn_up_nowhere(
    site: Site, producer: Producer, node: WorkerNode, flower: Flower, host: PasswordSshd
) -> None:
    """Secrets of the hosts file are nowhere. A build's env is in the broker until the build is done, and nowhere else.

    Looked through while builds run, wait, have failed, are to be tried again and were refused at the login, and when
    all of these are done: logs at DEBUG, events, what ``inspect`` says, command lines, all of Redis, Flower's pages.
    """
    gate = Gate(host.info.home / "builds" / "pw-1")
    producer.app.conf.task_send_sent_event = True
    with Events(producer.app) as events:
        running = producer.build("pw-1", gate.command, env={"TOKEN": TOKEN})
        gate.wait_started()
        waiting = producer.build("pw-1", 'test -n "$TOKEN"', env={"TOKEN": TOKEN})
        good = producer.build("key-1", 'test "$(cat)" = "$TOKEN"', env={"TOKEN": TOKEN}, stdin=TOKEN)
        bad = producer.build("pw-2", "echo 'no rule' >&2; exit 2", env={"TOKEN": TOKEN})
        refused = producer.build("wrong-1", "true", env={"TOKEN": TOKEN})
        unknowing = producer.app.AsyncResult(foreign(site, "pw-3"))
        later = producer.send(
            "tasks.builds.run_build", "pw-4", "true", kwargs={"env": {"TOKEN": LATER}}, countdown=3600
        )
        again = producer.build("gone-1", "true", env={"TOKEN": LATER})
        assert good.get(timeout=RESULT_TIMEOUT)["exit_code"] == unknowing.get(timeout=RESULT_TIMEOUT)["exit_code"] == 0
        assert "no rule" in str(bad.get(timeout=RESULT_TIMEOUT, propagate=False))
        assert "login refused" in str(refused.get(timeout=RESULT_TIMEOUT, propagate=False))
        flower.wait_state("RETRY", again.id)
        flower.wait_state("RECEIVED", waiting.id, later.id)
        ids = [each.id for each in (running, waiting, good, bad, refused, unknowing, later, again)]

        def everywhere() -> list[Place]:
            return [
                ("log of the node", node.logs().encode()),
                ("log of Flower", flower.logs().encode()),
                ("events", repr(events.seen).encode()),
                *in_answers(producer, ids),
                *on_command_lines(),
                *in_redis(site),
                *((f"Flower {path}", text.encode()) for path, text in flower.everything(node)),
            ]

        def check(places: list[Place], *, in_the_broker: set[str]) -> None:
            redis_password = urlsplit(site.valkey.url).password
            assert redis_password
            for secret in (PASSWORD, WRONG_PASSWORD, PASSPHRASE, redis_password, flower.password):
                assert holding(secret, places) == set()
            for secret in (TOKEN, LATER):
                found = holding(secret, places)
                assert {name for name in found if not BROKER_KEYS.fullmatch(name.removeprefix("Redis "))} == set()
                assert bool(found) == (secret in in_the_broker)

        assert {event["type"] for event in events.seen} >= {"task-sent", "task-received", "task-failed", "task-retried"}
        assert "TaskPool: Apply" in node.logs()  # it is at DEBUG
        places = everywhere()
        seen = holding("pw-1", places)  # so these places do tell of the builds
        assert seen >= {"log of the node", "events", "inspect active", "inspect reserved", f"Flower /task/{running.id}"}
        assert holding("pw-4", places) >= {"inspect scheduled", f"Flower /worker/{node.hostname()}?limit=1000"}
        check(places, in_the_broker={TOKEN, LATER})
        gate.open()
        assert running.get(timeout=RESULT_TIMEOUT)["exit_code"] == waiting.get(timeout=RESULT_TIMEOUT)["exit_code"] == 0
        wait_until(lambda: not holding(TOKEN, in_redis(site)), lambda: f"{holding(TOKEN, in_redis(site))}", 30.0)
        check(everywhere(), in_the_broker={LATER})
