"""The Valkey goes away and comes back; the nodes stay."""

from collections.abc import Callable

from tests.support.celery_nodes import WorkerNode
from tests.support.site import RESULT_TIMEOUT, Gate, Producer, Site
from tests.support.waiting import wait_until


def test_nodes_go_on_serving_after_the_broker_was_restarted(
    start: Callable[..., WorkerNode], producer: Producer
) -> None:
    """Every shard is consumed again, and the backends are still warm: they never depended on the broker."""
    nodes = [start(shards, env={"POOL_NODE_SHARDS": shards}) for shards in ("0-31", "32-63")]
    keys = [f"user-{number}" for number in range(8)]
    before = {key: producer.built(key)["pid"] for key in keys}
    assert set(before.values()) == {node.pid for node in nodes}
    producer.broker.restart()
    for key in keys:
        built = producer.built(key)
        assert (built["pid"], built["warm"]) == (before[key], True)


def test_a_node_with_a_running_build_outlives_an_outage_of_the_broker(
    start: Callable[..., WorkerNode], producer: Producer, gate: Gate, key: str, site: Site
) -> None:
    """The build goes on, its result arrives, its message is acknowledged: it is not built twice."""
    node = start(env={"POOL_LEASE_TTL": "15"})  # a local build goes on for as long as the lease is trusted
    result = producer.build(key, gate.command)
    gate.wait_started()
    producer.broker.kill()
    wait_until(
        lambda: "Cannot connect to" in node.logs() or "Unrecoverable error" in node.logs(),
        "the node has noticed",
        RESULT_TIMEOUT,
    )
    producer.broker.restart()
    assert "Unrecoverable error" not in node.logs()
    assert producer.built(f"{key}-other")["output"] == ""  # the node consumes again, while the build still runs
    gate.open()
    assert result.get(timeout=RESULT_TIMEOUT)["output"] == "built\n"
    assert producer.built(key)["warm"]
    assert node.stop() == 0
    assert gate.runs == 1
    assert site.messages() == 0
