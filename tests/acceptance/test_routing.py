"""Every way to send a task ends in the queue of its key."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta

import pytest
from celery import Celery, chain, chord, group
from kombu import Exchange, Queue

from pool import ConfigError, InvalidKey, NotOwner, Settings
from pool.sharding.hashing import queue_name, shard_of
from pool.worker.router import ShardRouter
from tests.support.celery_nodes import WorkerNode
from tests.support.site import BROKERS, RESULT_TIMEOUT, Producer, Site, close_app

KEYS = [f"chat:{number}" for number in range(6)]


@pytest.fixture(scope="module", params=BROKERS)
def broker(request: pytest.FixtureRequest) -> str:
    """Everything here holds on both brokers."""
    return request.param


@pytest.fixture(scope="module")
def hosts() -> str:
    """Memory backends take any key, also one that cannot be the name of a folder."""
    return '[default]\nbackend = "memory"\n'


@pytest.fixture(scope="module")
def start_nodes() -> Callable[[Site], list[WorkerNode]]:
    return lambda site: [
        site.start("low", env={"POOL_NODE_SHARDS": "0-31"}),
        site.start("high", env={"POOL_NODE_SHARDS": "32-63"}),
    ]


def assert_at_home(report: dict, key: str, producer: Producer) -> None:
    """The report was made by the owner of *key*, from the key's queue."""
    low, high = producer.worker_cluster
    owner = low if shard_of(key, 64) < 32 else high
    assert (report["key"], report["pid"]) == (key, owner.pid)
    assert report["queue"] == queue_name(shard_of(key, 64))


def test_delay_reaches_the_owner_of_its_key(producer: Producer) -> None:
    """The plain case, for keys of both nodes."""
    assert {shard_of(key, 64) < 32 for key in KEYS} == {True, False}
    for key in KEYS:
        assert_at_home(producer.where(key), key, producer)


@pytest.mark.parametrize("key", ["ключ", "with space", "acme:user:1", "🐝", "a/b", "x" * 256, "Ünï cödé: 9"])
def test_any_text_is_a_key(key: str, producer: Producer) -> None:
    """Unicode, spaces, colons and slashes are keys like any other."""
    assert_at_home(producer.where(key), key, producer)
    assert producer.where(key)["warm"]


@pytest.mark.parametrize("key", ["", "a\nb", "x" * 257, 7, None])
def test_what_is_no_key_is_refused_in_the_producer(key: object, producer: Producer) -> None:
    """Nothing is sent: ``delay`` itself raises."""
    with pytest.raises(InvalidKey):
        producer.send("probe.where", key)


@pytest.mark.parametrize("key", KEYS[:3])
def test_a_retry_goes_back_to_the_owner(key: str, producer: Producer) -> None:
    """``self.retry()`` routes by the key again."""
    report = producer.send("probe.retried", key).get(timeout=RESULT_TIMEOUT)
    assert report["retries"] == 1
    assert_at_home(report, key, producer)


def test_countdown_and_eta_keep_the_route(producer: Producer) -> None:
    """Messages that wait in a node for their time."""
    later = producer.send("probe.where", KEYS[0], countdown=0.3)
    at = producer.send("probe.where", KEYS[1], eta=datetime.now(UTC) + timedelta(seconds=0.3))
    assert_at_home(later.get(timeout=RESULT_TIMEOUT), KEYS[0], producer)
    assert_at_home(at.get(timeout=RESULT_TIMEOUT), KEYS[1], producer)


def test_each_link_of_a_chain_goes_to_the_owner_of_its_own_key(producer: Producer) -> None:
    """The worker that ends one link routes the next."""
    tasks = producer.app.tasks
    links = chain(tasks["probe.where"].s(KEYS[0]), *(tasks["probe.after"].s(key) for key in KEYS[1:]))
    report = links.apply_async().get(timeout=RESULT_TIMEOUT)
    for key in reversed(KEYS):
        assert_at_home(report, key, producer)
        report = report.get("before")


def test_group_and_chord_reach_the_owners(producer: Producer) -> None:
    """Headers and body of a chord each have a key of their own."""
    tasks = producer.app.tasks
    members = group(tasks["probe.where"].s(key) for key in KEYS)
    for report, key in zip(members.apply_async().get(timeout=RESULT_TIMEOUT), KEYS, strict=True):
        assert_at_home(report, key, producer)
    report = chord(members.clone(), tasks["probe.after"].s(KEYS[3])).apply_async().get(timeout=RESULT_TIMEOUT)
    assert_at_home(report, KEYS[3], producer)
    assert [before["key"] for before in report["before"]] == KEYS


def test_a_cloned_signature_goes_by_the_key_it_has_now(producer: Producer) -> None:
    """``clone`` with another argument routes to that one's owner, options of the first one or not."""
    signature = producer.app.tasks["probe.where"].s(key=KEYS[0])
    signature.apply_async().get(timeout=RESULT_TIMEOUT)
    for key in KEYS:
        report = signature.clone(kwargs={"key": key}).apply_async().get(timeout=RESULT_TIMEOUT)
        assert_at_home(report, key, producer)


def test_the_header_is_enough_for_a_task_without_a_key_argument(producer: Producer) -> None:
    """``apply_async(headers={"pool_key": ...})``; without it the producer is told."""
    for key in KEYS:
        report = producer.send("probe.by_header", headers={"pool_key": key}).get(timeout=RESULT_TIMEOUT)
        assert_at_home(report, key, producer)
    with pytest.raises(InvalidKey, match="pool_key"):
        producer.send("probe.by_header")


def test_a_header_that_contradicts_the_argument_is_refused(producer: Producer) -> None:
    """Two keys for one message: neither is right."""
    with pytest.raises(InvalidKey, match="header"):
        producer.send("probe.where", KEYS[0], headers={"pool_key": KEYS[1]})


def test_another_queue_than_the_key_s_is_refused(producer: Producer) -> None:
    """``queue=`` cannot be honoured, so it is an error and not a surprise."""
    with pytest.raises(ConfigError, match="cannot be honoured"):
        producer.send("probe.where", KEYS[0], queue="celery")
    own = queue_name(shard_of(KEYS[0], 64))
    assert_at_home(producer.send("probe.where", KEYS[0], queue=own).get(timeout=RESULT_TIMEOUT), KEYS[0], producer)


@pytest.fixture
def foreign(site: Site) -> Iterator[Celery]:
    """An app that knows nothing of the pool and has none of its tasks."""
    app = Celery("foreign", broker=site.broker.url, backend=site.valkey.url, set_as_current=False)
    app.conf.task_queues = [Queue("celery")]
    if site.broker is site.valkey:
        app.conf.broker_transport_options = {"priority_steps": [0]}
    yield app
    close_app(app)


def documented_queue(key: str, shards: int = 64) -> Queue:
    """What docs say to do in another language, written again: SHA-256, jump hash, name of the queue."""
    import hashlib

    value = int.from_bytes(hashlib.sha256(key.encode("utf-8")).digest()[:8], "big")
    shard, candidate = -1, 0
    while candidate < shards:
        shard = candidate
        value = (value * 2862933555777941757 + 1) % 2**64
        candidate = int((shard + 1) * (2**31 / ((value >> 33) + 1)))
    name = f"pool.shard.{shard:03d}"
    # The workers declare both; a producer that would declare them must know their arguments, which RabbitMQ compares.
    return Queue(name, Exchange("pool.shard", no_declare=True), routing_key=name, no_declare=True)


@pytest.mark.parametrize("key", [*KEYS, "ключ"])
def test_a_bare_producer_may_compute_the_queue_itself(key: str, producer: Producer, foreign: Celery) -> None:
    """``send_task`` with the documented hash reaches the owner, with or without the header."""
    queue = documented_queue(key)
    report = foreign.send_task("probe.where", args=[key], queue=queue).get(timeout=RESULT_TIMEOUT)
    assert_at_home(report, key, producer)
    report = foreign.send_task("probe.by_header", queue=queue, headers={"pool_key": key}).get(timeout=RESULT_TIMEOUT)
    assert_at_home(report, key, producer)


def test_a_producer_without_the_code_may_route_by_header_alone(producer: Producer, foreign: Celery, site: Site) -> None:
    """``task_routes = [ShardRouter(settings)]`` and ``headers={"pool_key": ...}``: the task's arguments stay unknown."""
    router = ShardRouter(Settings(broker_url=site.broker.url))
    foreign.conf.task_routes = [router]
    for key in KEYS:
        sent = foreign.send_task("probe.where", args=[key], headers={"pool_key": key})
        assert_at_home(sent.get(timeout=RESULT_TIMEOUT), key, producer)


def test_a_message_at_the_wrong_node_fails_as_not_owner(producer: Producer, foreign: Celery) -> None:
    """A producer that hashes wrongly is told; no second backend is made for the key."""
    low = producer.worker_cluster[0]
    key, other = (next(key for key in KEYS if (shard_of(key, 64) < 32) == here) for here in (False, True))
    sent = foreign.send_task("probe.where", args=[key], queue=documented_queue(other))
    with pytest.raises(NotOwner, match=queue_name(shard_of(key, 64))):
        sent.get(timeout=RESULT_TIMEOUT)
    stats = producer.send("probe.stats", other).get(timeout=RESULT_TIMEOUT)
    assert stats["pid"] == low.pid
    assert key not in stats["keys"]


def test_a_task_without_a_key_is_left_alone(producer: Producer) -> None:
    """Plain tasks of the app run on the default queue of the same nodes."""
    low, high = producer.worker_cluster
    report = producer.send("probe.plain", 3).get(timeout=RESULT_TIMEOUT)
    assert (report["value"], report["queue"]) == (3, "celery")
    assert report["node"] in {low.hostname(), high.hostname()}
