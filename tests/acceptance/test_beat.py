"""A real ``celery beat``: idle backends are evicted, idle chats are closed, and nothing piles up."""

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

import pytest

from pool.loopback_sshd import LoopbackSshd
from pool.sharding.hashing import queue_name, shard_of
from tests.support.celery_nodes import BeatContainer, WorkerNode
from tests.support.site import Gate, Producer, Site, connections
from tests.support.waiting import wait_until

COMPOSED = "tests.acceptance.apps.composed"
SHARDS = 4
SETTINGS = {"sweep_interval": 1.0, "close_interval": 1.0, "chat_ttl": 2.0}


def env(**settings: float) -> dict[str, str]:
    return {"POOL_SHARDS": str(SHARDS), "TEST_SETTINGS": json.dumps({**SETTINGS, **settings})}


@pytest.fixture(scope="module")
def hosts(sshd: LoopbackSshd, site: Site) -> str:
    """Keys on a build host, whose connections can be counted."""
    text = f"""
        [default]
        backend = "ssh"
        host = "127.0.0.1"
        port = {sshd.info.port}
        root_dir = "{{key}}"
        client_keys = "{sshd.info.client_key}"
        known_hosts = "{sshd.info.known_hosts}"
    """
    site.write_hosts(text)
    return text


@pytest.fixture
def beat(site: Site, hosts: str) -> Iterator[Callable[..., BeatContainer]]:
    """Start a beat that ends with the test."""
    started: list[BeatContainer] = []

    def beat(**settings: float) -> BeatContainer:
        started.append(site.beat(app=COMPOSED, env=env(**settings)))
        started[-1].ready()
        return started[-1]

    yield beat
    for container in started:
        container.teardown()


@pytest.fixture
def celery_setup_cls() -> type[Producer]:
    """Computes the same few shards as the nodes here."""

    class FewShards(Producer):
        shards = SHARDS

    return FewShards


def test_beat_evicts_a_backend_that_was_idle_for_too_long(
    start: Callable[..., WorkerNode],
    beat: Callable[..., BeatContainer],
    producer: Producer,
    sshd: LoopbackSshd,
    key: str,
) -> None:
    """POOL_IDLE_TIMEOUT passes, beat's next sweep closes the connection; a busy one stays."""
    node = start(app=COMPOSED, env={**env(chat_ttl=3600.0), "POOL_IDLE_TIMEOUT": "1"})
    busy = f"{key}-busy"
    gate = Gate(sshd.info.home / busy)
    running = producer.build(busy, gate.command)
    gate.wait_started()
    producer.built(key)
    assert connections(sshd.pid) == 2
    beat(chat_ttl=3600.0)
    wait_until(lambda: connections(sshd.pid) == 1, "the idle connection is closed", 60.0)
    node.wait_for(f"'evicted': [['{key}', 'default']]")
    gate.open()
    assert running.get(timeout=60)["output"] == "built\n"
    wait_until(lambda: connections(sshd.pid) == 0, "the other one, once it is idle", 60.0)
    assert not producer.built(key)["warm"]


def test_beat_closes_a_chat_that_nobody_used(
    start: Callable[..., WorkerNode],
    beat: Callable[..., BeatContainer],
    producer: Producer,
    sshd: LoopbackSshd,
    key: str,
) -> None:
    """chat_ttl passes: close_idle_chats of the chat's shard ends it, long before the idle timeout."""
    node = start(app=COMPOSED, env=env())
    producer.built(key)
    beat()
    wait_until(lambda: connections(sshd.pid) == 0, "the chat is closed", 60.0)
    shard = shard_of(key, SHARDS)
    node.wait_for(f"{{'shard': {shard}, 'closed': ['{key}']}}")
    assert not producer.built(key)["warm"]


def test_what_beat_sends_to_stopped_nodes_expires(
    start: Callable[..., WorkerNode], beat: Callable[..., BeatContainer], producer: Producer, site: Site
) -> None:
    """Every entry carries ``expires``: a node that comes back throws the old messages away and does the new ones."""
    container = beat()

    def waiting() -> int:
        with site.redis() as client:
            return min(client.llen(queue_name(shard)) for shard in range(SHARDS))

    wait_until(lambda: waiting() >= 6, "three rounds of two messages for each shard", 60.0)
    container.kill("SIGTERM")
    container.wait()
    with site.redis() as client:
        messages = [json.loads(text) for shard in range(SHARDS) for text in client.lrange(queue_name(shard), 0, -1)]
    assert {message["headers"]["task"] for message in messages} == {"pool.sweep_shard", "pool.close_idle_chats"}
    assert all(message["headers"]["expires"] for message in messages)
    assert all(message["headers"]["ignore_result"] for message in messages)
    sent = len(messages)
    last = max(message["headers"]["expires"] for message in messages)
    wait_until(lambda: passed(last), "the messages have expired", 30.0)
    node = start(app=COMPOSED, env=env())

    def outcomes() -> tuple[int, int]:
        log = node.logs()
        return log.count("Discarding revoked task"), log.count(" succeeded in ")

    wait_until(lambda: sum(outcomes()) >= sent, "the node has seen every message", 60.0)  # one log line for each
    thrown_away, done = outcomes()
    assert (thrown_away, done) == (sent, 0)
    wait_until(lambda: site.messages() == 0, "the last one is acknowledged", 30.0)


def passed(iso: str) -> bool:
    """Whether a time has passed by the clock that the messages were stamped with."""
    return datetime.now(UTC) > datetime.fromisoformat(iso)
