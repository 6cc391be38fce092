"""Canaries in place of secrets: where Celery and the pool write things down, none of them turns up."""

import base64
import re
import secrets
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncssh
import pytest
import redis
from celery.events import EventReceiver

from pool.sharding.hashing import queue_name, shard_of
from tests.support.celery_nodes import WorkerNode
from tests.support.flower import Flower
from tests.support.password_sshd import PasswordSshd
from tests.support.site import RESULT_TIMEOUT, Gate, Producer, Site
from tests.support.waiting import wait_until

pytestmark = pytest.mark.timeout(240)


def canary() -> str:
    """A secret that nothing else looks like."""
    return f"canary-{secrets.token_hex(12)}"


PASSWORD, WRONG_PASSWORD, PASSPHRASE, TOKEN = (canary() for _ in range(4))
HOST_SECRETS = {PASSWORD, WRONG_PASSWORD, PASSPHRASE}

NODE_ENV = {
    "BUILD_HOST_PASSWORD": PASSWORD,
    "WRONG_PASSWORD": WRONG_PASSWORD,
    "CLIENT_KEY_PASSPHRASE": PASSPHRASE,
    # Neither is asked for by a Flower that runs beside the nodes, so it has no such variables.
}

ENV = {"TOKEN": TOKEN}
"""What the builds get."""

KEYS = ("pw-1", "key-1", "wrong-1")


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
    """One rule for each way to log in; the last one's password is not the host's."""
    ways = {
        "pw-*": 'client_keys = []\npassword_env = "BUILD_HOST_PASSWORD"',
        "key-*": f'client_keys = "{host.info.client_key.with_name("encrypted_key")}"\npassphrase_env = "CLIENT_KEY_PASSPHRASE"',
        "wrong-*": 'client_keys = []\npassword_env = "WRONG_PASSWORD"',
    }
    return "\n".join(
        f"""
[[match]]
key = "{pattern}"
backend = "ssh"
host = "127.0.0.1"
port = {host.info.port}
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
    """Everything that is sent as an event while the block runs, in a thread."""

    def __init__(self, producer: Producer) -> None:
        self.seen: list[dict[str, Any]] = []
        self._app = producer.app
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="events")

    def __enter__(self) -> "Events":
        self._thread.start()
        wait_until(lambda: self.of("worker-heartbeat"), "events are heard", 30.0)
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(30.0)
        assert not self._thread.is_alive()

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in list(self.seen) if event["type"] == kind]

    def _listen(self) -> None:
        with self._app.connection_for_read() as connection:
            receiver = EventReceiver(connection, handlers={"*": self.seen.append}, app=self._app)
            with receiver.consumer_context() as (connection, _consumer, _channels):
                while not self._ended.is_set():
                    try:
                        connection.drain_events(timeout=0.2)
                    except TimeoutError:
                        continue


def test_secrets_turn_up_nowhere(
    site: Site, producer: Producer, node: WorkerNode, flower: Flower, host: PasswordSshd
) -> None:
    """Passwords of the hosts file are nowhere; a build's env is in the broker while it has the message, and nowhere else.

    Looked through while builds run, wait, fail, are tried again and are refused at the login, and after that: the logs
    at DEBUG, all events, results, all that Redis holds, what ``inspect`` answers, every page of Flower.
    """
    gate = Gate(host.info.home / "builds" / "pw-1")
    with Events(producer) as events:
        running = producer.build("pw-1", gate.command, env=ENV)
        gate.wait_started()
        builds = [
            producer.build(key, command, env=ENV)
            for key in KEYS
            for command in ('test -n "$TOKEN" && echo built', "echo 'no rule' >&2; exit 2", "sleep 60 & wait")
        ]
        builds += [
            producer.send("tasks.builds.run_build", "pw-1", "true", kwargs={"env": ENV}, countdown=3600),
            *(foreign(producer, key) for key in KEYS),
        ]
    events.seen.clear()
