"""Seeing and steering a node by Celery's own doors: inspect, control, events, states, time limits."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import states
from celery.exceptions import TaskRevokedError

from pool.loopback_sshd import LoopbackSshd
from pool.sharding.hashing import shard_of
from tests.support.celery_nodes import WorkerNode
from tests.support.site import RESULT_TIMEOUT, Gate, Producer, Site, ssh_hosts
from tests.support.steering import (
    Ask,
    asker,
    assert_it_cancels,
    assert_it_keeps_time,
    assert_it_tells_what_it_has,
    free_port,
    sample,
    scrape,
)
from tests.support.waiting import wait_until

METRICS = free_port()


@pytest.fixture(scope="module")
def hosts(sshd: LoopbackSshd) -> str:
    return ssh_hosts(sshd.info)


@pytest.fixture(scope="module")
def start_nodes() -> Callable[[Site], list[WorkerNode]]:
    """One node; nothing sweeps it unasked before a minute is over."""
    env = {"POOL_KEY_CONCURRENCY": "1", "POOL_IDLE_TIMEOUT": "0.2", "POOL_METRICS_PORT": str(METRICS)}
    return lambda site: [site.start(env=env)]


@pytest.fixture
def gate(sshd: LoopbackSshd, key: str) -> Gate:
    """A build of the key at the build host that ends when the test says so."""
    return Gate(sshd.info.home / "builds" / key)


@pytest.fixture
def ask(producer: Producer) -> Ask:
    return asker(producer)


def test_a_cancelled_build_ends_with_all_its_processes_and_its_backend_stays_warm(
    producer: Producer, gate: Gate, key: str
) -> None:
    """Five times in a row."""
    assert_it_cancels(producer, gate, key)


def test_time_limits_end_a_build_where_celery_has_none(producer: Producer, gate: Gate, key: str) -> None:
    """The hard one and the soft one, of the message."""
    assert_it_keeps_time(producer, gate, key)


def test_a_node_tells_what_it_has(producer: Producer, gate: Gate, key: str) -> None:
    """From its own memory."""
    assert_it_tells_what_it_has(producer, gate, key, "threads")


def test_a_build_that_waits_is_cancelled_before_it_starts(producer: Producer, ask: Ask, gate: Gate, key: str) -> None:
    """It waits for its key's turn, in the node; it never runs."""
    first = producer.build(key, gate.command)
    gate.wait_started()
    second = producer.build(key, "echo run >> runs")
    inspect = producer.app.control.inspect(timeout=20, limit=1)
    wait_until(lambda: second.id in str(inspect.reserved()), "the node has it", RESULT_TIMEOUT)
    assert ask("pool_cancel", task_id=second.id)["found"] == "waiting"
    gate.open()
    assert first.get(timeout=RESULT_TIMEOUT)["exit_code"] == 0
    with pytest.raises(TaskRevokedError):
        second.get(timeout=RESULT_TIMEOUT)
    producer.built(key)
    assert gate.runs == 1


def test_what_cannot_be_cancelled_says_so(producer: Producer, ask: Ask, key: str) -> None:
    """A task that nobody knows will not start, as with revoke; a key that is none is named."""
    assert ask("pool_cancel", task_id="no-such-task") == {"ok": "it will not start at this node", "found": "no"}
    for command in ("pool_explain", "pool_close"):
        assert "control character" in ask(command, key="a\nb")["error"]
    producer.built(key)
    assert ask("pool_close", key=key)["owns"] is True


def test_a_long_build_tells_of_its_progress(producer: Producer, gate: Gate, key: str) -> None:
    """State PROGRESS with what it has written so far; its end is its own state."""
    result = producer.build(key, f"printf 'one\\ntwo\\n'; {gate.command}")

    def progress():
        told = result.info if result.state == "PROGRESS" else None
        return told and told["lines"] == 2 and told  # it may have told of none before

    told = wait_until(progress, "it tells of its progress", RESULT_TIMEOUT)
    assert (told["bytes"], told["lines"], told["key"]) == (8, 2, key)
    assert told["elapsed"] >= 1
    gate.open()
    assert result.get(timeout=RESULT_TIMEOUT)["output"] == "one\ntwo\nbuilt\n"
    assert result.state == states.SUCCESS


@pytest.fixture
def events(producer: Producer) -> Iterator[list[dict[str, Any]]]:
    """What an event receiver hears of the pool."""
    heard: list[dict[str, Any]] = []
    listening = threading.Event()

    def listen() -> None:
        receiver.capture(limit=None, timeout=None, wakeup=False)

    with producer.app.connection_for_read() as connection:
        receiver = producer.app.events.Receiver(connection, handlers={"*": heard.append})
        receiver.on_consume_ready = lambda *_, **__: listening.set()
        thread = threading.Thread(target=listen)
        thread.start()
        assert listening.wait(30)
        yield heard
        receiver.should_stop = True
        thread.join(30)


def test_the_steps_of_backends_and_shards_are_events(
    events: list[dict[str, Any]], producer: Producer, ask: Ask, key: str
) -> None:
    """Anybody who listens to Celery's events hears of them; and the log of the node has a line for each."""

    def heard(kind: str) -> list[dict[str, Any]]:
        return [event for event in events if event["type"] == f"backend-pool-{kind}"]

    producer.built(key)
    wait_until(
        lambda: ask("pool_sweep") and key in [e["key"] for e in heard("evicted")], "it is evicted", RESULT_TIMEOUT
    )
    (created,), (evicted,) = (
        [event for event in heard("created") if event["key"] == key],
        [event for event in heard("evicted") if event["key"] == key],
    )
    for event, reason in ((created, ""), (evicted, "idle")):
        assert (event["key"], event["agent"], event["kind"], event["reason"]) == (key, "default", "ssh", reason)
        assert event["shard"] == shard_of(key, 64)
        assert event["epoch"] > 0
        assert event["node"] == event["hostname"]
    producer.built(key)
    assert ask("pool_close", key=key)["owns"]
    wait_until(lambda: heard("retired") and heard("closed"), "the key's backend is closed", RESULT_TIMEOUT)
    assert heard("retired")[-1]["reason"] == "key_closed"
    log = producer.worker.logs()
    for what in (
        "backend created",
        "backend evicted",
        "backend retired",
        "backend closed",
        "shards taken: shards=0-63",
    ):
        assert what in log


def test_metrics_of_a_node(producer: Producer, ask: Ask, key: str) -> None:
    """What Prometheus scrapes agrees with what inspect tells, and names no key."""
    producer.built(key)
    text = scrape(METRICS)
    assert sample(text, "backend_pool_shards_owned") == 64
    assert sample(text, 'backend_pool_creations_total{kind="ssh"}') >= 1
    assert sample(text, 'backend_pool_exec_seconds_count{kind="ssh",outcome="ok"}') >= 1
    assert sample(text, "backend_pool_warm_hits_total") == ask("pool_stats")["hits"]
    assert key not in text
