"""Same key, same process, same connection: two nodes, each with half of the shards, over SSH."""

from collections import defaultdict
from collections.abc import Callable

import pytest

from pool.loopback_sshd import LoopbackSshd
from pool.sharding.hashing import shard_of
from tests.support.celery_nodes import WorkerNode
from tests.support.site import BROKERS, RESULT_TIMEOUT, Producer, Site, connections, ssh_hosts

USERS = [f"user-{number}" for number in range(12)]


@pytest.fixture(scope="module", params=BROKERS)
def broker(request: pytest.FixtureRequest) -> str:
    """Everything here holds on both brokers."""
    return request.param


@pytest.fixture(scope="module")
def hosts(sshd: LoopbackSshd) -> str:
    """Every user has a folder of its own on the build host."""
    return ssh_hosts(sshd.info)


@pytest.fixture(scope="module")
def start_nodes() -> Callable[[Site], list[WorkerNode]]:
    return lambda site: [
        site.start("low", env={"POOL_NODE_SHARDS": "0-31"}),
        site.start("high", env={"POOL_NODE_SHARDS": "32-63"}),
    ]


def test_each_user_stays_in_one_process_on_one_connection(producer: Producer, sshd: LoopbackSshd) -> None:
    """12 users x 10 tasks over two nodes: all succeed, one process and one login for each user, files kept apart."""
    low, high = producer.worker_cluster
    sent = [(user, producer.build(user, "echo x >> built; pwd")) for _ in range(10) for user in USERS]
    seen = defaultdict(list)
    for user, result in sent:
        seen[user].append(result.get(timeout=RESULT_TIMEOUT))
    for user, results in seen.items():
        owner = low if shard_of(user, 64) < 32 else high
        assert {(r["pid"], r["node"]) for r in results} == {(owner.pid, owner.hostname())}
        assert {r["output"].strip() for r in results} == {str(sshd.info.home / "builds" / user)}
        assert len((sshd.info.home / "builds" / user / "built").read_text().splitlines()) == 10
    assert {r["pid"] for results in seen.values() for r in results} == {low.pid, high.pid}
    assert producer.built(USERS[0])["warm"]
    assert sshd.info.count_logins() == len(USERS)
    assert connections(sshd.pid) == len(USERS)


def test_a_node_consumes_the_queues_of_its_shards_only(producer: Producer) -> None:
    """``inspect active_queues`` of each node: its half of the shards and the app's default queue."""
    low, high = producer.worker_cluster
    queues = producer.app.control.inspect(timeout=10.0, limit=2).active_queues()
    for node, shards in ((low, range(32)), (high, range(32, 64))):
        expected = {"celery", *(f"pool.shard.{shard:03d}" for shard in shards)}
        assert {queue["name"] for queue in queues[node.hostname()]} == expected
