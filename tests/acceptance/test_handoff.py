"""Nodes come and go in order, under load: nothing fails, nothing is lost, nothing runs twice. Told by the build host's ledger."""

import time
from pathlib import Path

import pytest

from tests.support.cluster import KEYS, Cluster, build_hosts
from tests.support.ledger import Account
from tests.support.openssh import OpenSshd
from tests.support.site import BROKERS, Producer
from tests.support.waiting import wait_until

pytestmark = pytest.mark.openssh

FLOOD = 3000
"""Builds that wait when a node is told to stop."""


@pytest.fixture(scope="module", params=BROKERS)
def broker(request: pytest.FixtureRequest) -> str:
    """Everything here holds on both brokers."""
    return request.param


@pytest.fixture(scope="module")
def hosts(openssh: OpenSshd, host_folder: Path) -> str:
    return build_hosts(openssh, str(host_folder))


def assert_in_order(account: Account) -> None:
    """Each task ran once, to its end."""
    assert (account.wrong, account.duplicates, account.killed) == ({}, {}, [])


@pytest.mark.timeout(180)
def test_term_under_a_flood_stops_the_node_after_its_last_running_task(cluster: Cluster, record_property) -> None:
    """3,000 builds wait; a node stops, with exit code 0; none of them runs twice."""
    with cluster.load(rate=0.1) as load:
        for number in range(FLOOD):
            load.send(KEYS[number % len(KEYS)], 0.0)
        one, _two, _three = cluster.start("one", "two", "three")
        cluster.wait_working(one)
        one.kill("SIGTERM")
        assert one.wait() == 0
        stopped = time.time_ns()
        last = max(build.ended or 0 for build in cluster.ledger.builds() if build.node == one.hostname())
        record_property("seconds_from_last_task_to_stop", (stopped - last) / 1e9)
        print(f"stopped {(stopped - last) / 1e9:.2f} s after the last task")
        assert stopped - last < 10e9
        left = len(load.sent.keys() - cluster.ledger.ended())
        assert left > 0.5 * FLOOD, "the flood was over before the node was"
        assert_in_order(cluster.settled(load))


def test_a_rolling_restart_of_all_nodes_fails_loses_and_doubles_nothing(cluster: Cluster) -> None:
    """One after the other, each comes back under its own name."""
    nodes = cluster.start("one", "two", "three")
    with cluster.load() as load:
        cluster.wait_working(*nodes)
        for node in nodes:
            node.container.restart()
            cluster.wait_working(*nodes)
        assert_in_order(cluster.settled(load))


def test_two_nodes_become_five_and_then_two_again(cluster: Cluster) -> None:
    """All five work; three of them go at once."""
    first = cluster.start("one", "two")
    with cluster.load() as load:
        cluster.wait_working(*first)
        more = cluster.start("three", "four", "five")
        cluster.wait_working(*first, *more)
        for node in more:
            node.kill("SIGTERM")
        assert [node.wait() for node in more] == [0, 0, 0]
        cluster.wait_working(*first)
        assert_in_order(cluster.settled(load))


def test_a_drained_node_does_nothing_until_it_is_undrained(cluster: Cluster, producer: Producer) -> None:
    """By remote control: pool_drain and pool_undrain; the node stays."""
    one, two, three = cluster.start("one", "two", "three")
    with cluster.load() as load:
        cluster.wait_working(one, two, three)
        producer.command("pool_drain", one)
        wait_until(lambda: producer.shards_of(one) == 0, "it has no shard", 30.0)
        drained = time.time_ns()
        cluster.wait_working(two, three)
        assert not [b for b in cluster.ledger.builds() if b.node == one.hostname() and b.began > drained]
        producer.command("pool_undrain", one)
        cluster.wait_working(one, two, three)
        assert_in_order(cluster.settled(load))
