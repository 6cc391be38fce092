"""Who may take part in sharing out the shards, and what becomes of single tasks when a shard moves."""

import os
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from tests.support.celery_nodes import WorkerNode
from tests.support.cluster import QUICK, Cluster, build_hosts
from tests.support.openssh import OpenSshd
from tests.support.processes import group_members
from tests.support.proxy import Proxy
from tests.support.site import RESULT_TIMEOUT, Gate, Producer, Site
from tests.support.waiting import wait_until

pytestmark = pytest.mark.openssh

Start = Callable[..., WorkerNode]


@pytest.fixture(scope="module")
def hosts(openssh: OpenSshd, host_folder: Path) -> str:
    return build_hosts(openssh, str(host_folder))


@pytest.fixture
def gate(host_folder: Path, key: str):
    gate = Gate(host_folder / key)
    yield gate
    gate.folder.mkdir(exist_ok=True)
    gate.open()


def owner(nodes: list[WorkerNode], producer: Producer, key: str) -> tuple[WorkerNode, list[WorkerNode]]:
    """Return the node that works for the key, and the others."""
    producer.wait_shared(nodes)
    name = producer.where(key)["node"]
    found = next(node for node in nodes if node.hostname() == name)
    return found, [node for node in nodes if node is not found]


def refusal(start: Start, **env: str) -> str:
    """Start a node that must not run; return what it says, on one line."""
    node = start("refused", ready=False, env=env)
    assert node.wait() != 0
    return " ".join(node.logs().split())


def test_a_node_that_is_cut_off_from_the_leases_ends_its_build_before_another_runs_it(
    cluster: Cluster, producer: Producer, site: Site, gate: Gate, key: str
) -> None:
    """It lives, and reaches the broker and the build host; nobody tells it that its time is over. Then it joins again."""
    url = urlsplit(site.valkey.url)
    with Proxy(("127.0.0.1", url.port)) as proxy:
        through = {"POOL_REDIS_URL": site.valkey.url.replace(str(url.port), str(proxy.port))}
        direct = {"POOL_BROKER_URL": site.valkey.url, "POOL_RESULT_URL": site.valkey.url}
        [lonely] = cluster.start("lonely", env={**QUICK, **direct, **through})
        result = producer.build(key, gate.command)
        group = gate.wait_started()
        [other] = cluster.start("other", env=QUICK)
        proxy.cut()
        again = gate.wait_started(runs=2)
        assert not group_members(group)
        gate.open()
        assert result.get(timeout=RESULT_TIMEOUT)["node"] == other.hostname()
        assert again != group
        assert gate.runs == 2
        proxy.mend()
        keys = [f"user-{number}" for number in range(12)]
        wait_until(
            lambda: {producer.where(key)["node"] for key in keys} == {lonely.hostname(), other.hostname()},
            "both work",
            30.0,
        )


@pytest.mark.parametrize("execution", ["threads", "prefork", "solo"])
def test_a_key_moves_when_its_node_is_drained_and_leaves_no_connection_behind(
    execution: str, cluster: Cluster, producer: Producer, openssh: OpenSshd, key: str
) -> None:
    """The handoff closes the backends where they are, in a prefork child too; the node stays."""
    nodes = cluster.start("one", "two", env={"POOL_EXECUTION": execution})
    first, [second] = owner(nodes, producer, key)
    process = psutil.Process(producer.where(key)["pid"])
    assert process.pid == first.pid or execution == "prefork"

    def connected() -> bool:
        return any(c.raddr and c.raddr.port == openssh.info.port for c in process.net_connections("tcp"))

    assert connected()
    producer.command("pool_drain", first)
    wait_until(lambda: producer.where(key)["node"] == second.hostname(), "the key has moved", 20.0)
    wait_until(lambda: not connected(), "the old connection is closed", 10.0)
    assert process.is_running()


def test_delayed_tasks_and_those_that_wait_survive_a_handoff_in_order(
    cluster: Cluster, producer: Producer, gate: Gate, key: str
) -> None:
    """One runs, two wait behind it, three have an ETA, one asks for retries; the key moves; each runs once, in order."""
    nodes = cluster.start("one", "two", env={"POOL_KEY_CONCURRENCY": "1"})
    first, [second] = owner(nodes, producer, key)
    running = producer.build(key, gate.command)
    gate.wait_started()
    retried = producer.send("probe.retried_later", key)
    waiting = [producer.build(key, f"echo {number} >> order") for number in range(2)]
    delayed = [
        producer.send("tasks.builds.run_build", key, f"echo {2 + number} >> order", countdown=6 + number / 2)
        for number in range(3)
    ]
    producer.command("pool_drain", first)
    first.wait_for("gave back")
    gate.open()
    results = [result.get(timeout=RESULT_TIMEOUT) for result in [running, retried, *waiting, *delayed]]
    assert [result["node"] for result in results] == [first.hostname(), *6 * [second.hostname()]]
    assert producer.built(key, "cat order")["output"] == "0\n1\n2\n3\n4\n"


def test_prefork_and_solo_nodes_share_the_shards_with_a_threads_node(cluster: Cluster) -> None:
    """Under load, one of each kind is killed, restarted, stopped."""
    cluster.env |= QUICK
    [threads] = cluster.start("threads")
    [prefork] = cluster.start("prefork", env={"POOL_EXECUTION": "prefork"})
    [solo] = cluster.start("solo", env={"POOL_EXECUTION": "solo"})
    with cluster.load(rate=5, long=0.5) as load:
        cluster.wait_working(threads, prefork, solo)
        prefork.container.restart()
        solo.kill("SIGKILL")
        solo.wait()
        cluster.wait_working(threads, prefork)
        solo.container.restart()
        cluster.wait_working(threads, prefork, solo)
        assert threads.stop() == 0
        cluster.wait_working(prefork, solo)
        account = cluster.settled(load)
    assert not account.wrong


def test_a_second_node_with_the_same_name_is_refused_and_the_first_goes_on(
    start: Start, producer: Producer, key: str
) -> None:
    """It says the name and what to do."""
    first = start("one", env=QUICK)
    assert producer.where(key)["node"] == first.hostname()
    second = start("two", ready=False, options=["-n", first.hostname()], env=QUICK)
    assert second.wait() == os.EX_CONFIG
    assert f"another live node has the name '{first.hostname()}'" in " ".join(second.logs().split())
    assert producer.where(key)["pid"] == first.pid


def test_another_number_of_shards_is_refused_with_both_numbers(start: Start, producer: Producer, key: str) -> None:
    first = start("one")
    said = refusal(start, POOL_SHARDS="32")
    assert "POOL_SHARDS=32" in said
    assert f"64 at node '{first.hostname()}'" in said
    assert producer.where(key)["pid"] == first.pid


def test_a_lease_time_of_two_heartbeats_is_refused(start: Start) -> None:
    """One late heartbeat would lose every shard."""
    said = refusal(start, POOL_LEASE_TTL="2")
    assert "POOL_LEASE_TTL: lease_ttl=2.0 s: must be more than 2 x lease_heartbeat=1.0 s" in said


def test_a_redis_that_throws_keys_away_is_refused(start: Start, site: Site) -> None:
    with site.redis() as client:
        before = client.config_get("maxmemory-policy")["maxmemory-policy"]
        client.config_set("maxmemory-policy", "allkeys-lru")
        try:
            assert "maxmemory-policy=allkeys-lru" in refusal(start)
        finally:
            client.config_set("maxmemory-policy", before)
