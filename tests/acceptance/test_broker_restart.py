"""The Valkey goes away and comes back; the nodes stay."""

from collections.abc import Callable

import pytest

from tests.support.celery_nodes import WorkerNode
from tests.support.site import RESULT_TIMEOUT, Gate, Producer, Site


@pytest.fixture(scope="module")
def start_nodes() -> Callable[[Site], list[WorkerNode]]:
    return lambda site: [site.start(env={"POOL_NODE_SHARDS": "0-31"}), site.start(env={"POOL_NODE_SHARDS": "32-63"})]


def test_nodes_go_on_serving_after_the_broker_was_restarted(producer: Producer, site: Site) -> None:
    """Every shard is consumed again, and the backends are still warm: they never depended on the broker."""
    keys = [f"user-{number}" for number in range(8)]
    before = {key: producer.built(key)["pid"] for key in keys}
    assert set(before.values()) == {node.pid for node in producer.worker_cluster}
    producer.broker.container.restart()
    for key in keys:
        built = producer.built(key)
        assert (built["pid"], built["warm"]) == (before[key], True)


def test_a_build_that_ran_through_the_restart_succeeds(producer: Producer, site: Site, gate: Gate, key: str) -> None:
    """Its result arrives; the message, taken before the restart, may at most be seen once more."""
    result = producer.build(key, gate.command)
    gate.wait_started()
    producer.broker.container.restart()
    gate.open()
    assert result.get(timeout=RESULT_TIMEOUT)["output"] == "built\n"
    assert 1 <= gate.runs <= 2
    assert producer.built(key)["warm"]
