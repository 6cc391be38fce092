"""What differs with RabbitMQ: redelivery is the broker's, delays wait in the broker, and it has a limit of time."""

import json
import time
from collections.abc import Callable

import pytest
from celery import states

from pool.sharding.hashing import queue_name, shard_of
from tests.support.celery_nodes import WorkerNode
from tests.support.site import RESULT_TIMEOUT, Gate, Producer, Site
from tests.support.waiting import wait_until

pytestmark = pytest.mark.rabbitmq

Start = Callable[..., WorkerNode]

LOW = [queue_name(shard) for shard in range(32)]
ALL = {"POOL_NODE_SHARDS": "0-63"}
HIGH = [queue_name(shard) for shard in range(32, 64)]


@pytest.fixture(scope="module")
def broker() -> str:
    return "rabbitmq"


def test_a_killed_node_s_messages_come_to_the_next_node_in_order(
    start: Start, producer: Producer, gate: Gate, key: str
) -> None:
    """kill -9: the running build and the ones behind it; without leases, by the broker alone."""
    one = {"POOL_CONCURRENCY": "1", **ALL}
    first = start("first", env=one)
    running = producer.build(key, gate.command)
    gate.wait_started()
    waiting = [producer.build(key, f"echo {number} >> order") for number in range(5)]
    second = start("second", env=one)
    first.kill("SIGKILL")
    gate.open()
    assert running.get(timeout=RESULT_TIMEOUT)["node"] == second.hostname()
    assert {result.get(timeout=RESULT_TIMEOUT)["node"] for result in waiting} == {second.hostname()}
    assert producer.built(key, "cat order")["output"] == "0\n1\n2\n3\n4\n"
    assert gate.runs == 2


def test_a_frozen_node_is_dropped_after_a_few_seconds(start: Start, producer: Producer, gate: Gate, key: str) -> None:
    """SIGSTOP: no heartbeat for 4 to 6 seconds, and the node that took its shards over has the message."""
    first = start("first")
    running = producer.build(key, gate.command)
    gate.wait_started()
    second = start("second")
    first.kill("SIGSTOP")
    try:
        gate.wait_started(runs=2)
        gate.open()
        assert running.get(timeout=RESULT_TIMEOUT)["node"] == second.hostname()
    finally:
        first.kill("SIGKILL")
        first.kill("SIGCONT")


def test_with_all_shards_on_every_node_a_key_stays_at_one(start: Start, producer: Producer) -> None:
    """Single active consumer, without leases: the second node stands by for every shard that the first one has."""
    first = start("first", env=ALL)
    second = start("second", env=ALL)
    keys = [f"user-{number}" for number in range(20)]
    assert {producer.where(key)["node"] for key in keys} == {first.hostname()}
    assert first.stop() == 0
    assert {producer.where(key)["node"] for key in keys} == {second.hostname()}


def test_a_delayed_message_waits_in_the_broker_and_not_in_a_node(
    start: Start, producer: Producer, site: Site, key: str
) -> None:
    """Nothing to hand over: the node that was there when it was sent is gone when it comes."""
    first = start("first")
    sent = time.monotonic()
    result = producer.send("probe.where", key, countdown=6)
    assert producer.app.control.inspect(timeout=20.0, limit=1).scheduled() == {first.hostname(): []}
    wait_until(lambda: site.messages() == 1, "the broker has it")
    first.kill("SIGKILL")
    second = start("second")
    assert result.get(timeout=RESULT_TIMEOUT)["node"] == second.hostname()
    assert time.monotonic() - sent > 5.5


def test_a_node_prepares_delays_for_the_shards_of_others(start: Start) -> None:
    """On a server that knows no shard yet; a message whose delay ends must find its queue."""
    node = start(env={"POOL_NAMESPACE": "fresh", "POOL_NODE_SHARDS": "0-31"})
    assert "ailed to" not in node.logs()


def test_a_retry_with_a_delay_below_a_second_comes_back_to_its_queue(
    start: Start, producer: Producer, key: str
) -> None:
    """Twice, as the second one starts from a message that was delayed itself."""
    start()
    report = producer.send("probe.retried_later", key).get(timeout=RESULT_TIMEOUT)
    assert (report["retries"], report["queue"]) == (2, queue_name(shard_of(key, 64)))


def test_queues_come_and_go_at_a_live_node(start: Start, producer: Producer, site: Site) -> None:
    """32 consumers added and 32 cancelled in the event loop, a build of a cancelled queue running: it ends where it is."""
    low, high = (next(f"u{n}" for n in range(99) if (shard_of(f"u{n}", 64) < 32) == here) for here in (True, False))
    node = start("node", env={"POOL_NODE_SHARDS": "0-31"})
    gate = Gate(site.work(low))
    running = producer.build(low, gate.command)
    gate.wait_started()
    orphan = producer.send("probe.stats", high)
    wait_until(lambda: site.messages() == 1, "it waits for a consumer")
    took = change(producer, node, add=HIGH, cancel=LOW)
    assert orphan.get(timeout=RESULT_TIMEOUT)["pid"] == node.pid
    behind = producer.send("probe.stats", low)
    wait_until(lambda: site.messages() == 1, "the cancelled queue keeps what comes")
    gate.open()
    assert running.get(timeout=RESULT_TIMEOUT)["output"] == "built\n"
    assert behind.state not in states.READY_STATES
    back = change(producer, node, add=LOW, cancel=[])
    assert behind.get(timeout=RESULT_TIMEOUT)["pid"] == node.pid
    assert max(took["add_ms"], took["cancel_ms"], back["add_ms"]) < 10_000, (took, back)


def test_a_time_limit_above_the_consumer_timeout_is_refused_at_start(start: Start) -> None:
    """The node ends with the reason."""
    limit = {"TEST_CONF": json.dumps({"task_time_limit": 3600})}
    node = start(app="tests.acceptance.apps.composed", env=limit, ready=False)
    assert node.wait() != 0
    assert "above RabbitMQ's consumer timeout of 1800 s" in " ".join(node.logs().split())
    node = start(app="tests.acceptance.apps.composed", env={**limit, "POOL_CONSUMER_TIMEOUT": "7200"})
    assert node.stop() == 0


def change(producer: Producer, node: WorkerNode, *, add: list[str], cancel: list[str]) -> dict[str, float]:
    """Have the node consume other queues."""
    arguments = {"add": add, "cancel": cancel}
    replies = producer.app.control.broadcast(
        "probe_consume", arguments, destination=[node.hostname()], reply=True, timeout=20.0, limit=1
    )
    return replies[0][node.hostname()]
