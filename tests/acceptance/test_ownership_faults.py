"""A shard has one owner, whatever happens to the nodes: told by the ledger that the build host keeps."""

import time
from pathlib import Path

import pytest

from tests.support.cluster import QUICK, Cluster, build_hosts
from tests.support.openssh import OpenSshd
from tests.support.processes import group_members
from tests.support.site import BROKERS
from tests.support.waiting import wait_until

pytestmark = pytest.mark.openssh

AWAY = 30.0
"""Seconds of a restart or failover that takes its time."""


@pytest.fixture(scope="module", params=BROKERS)
def broker(request: pytest.FixtureRequest) -> str:
    """Everything here holds on both brokers."""
    return request.param


@pytest.fixture(scope="module")
def hosts(openssh: OpenSshd, host_folder: Path) -> str:
    return build_hosts(openssh, str(host_folder))


def test_kill_9_of_a_node_loses_nothing_and_its_keys_go_to_one_other(cluster: Cluster) -> None:
    """Its builds run again elsewhere; started again under its own name, it takes part again."""
    cluster.env |= QUICK
    one, two, three = cluster.start("one", "two", "three")
    with cluster.load() as load:
        cluster.wait_working(one, two, three)
        cluster.wait_busy(one)
        one.kill("SIGKILL")
        one.wait()
        cluster.wait_working(two, three)
        one.container.restart()
        cluster.wait_working(one, two, three)
        account = cluster.settled(load)
    assert not account.wrong
    assert account.duplicates.keys() <= {
        build.task for build in cluster.ledger.builds() if build.node == one.hostname()
    }


def test_a_node_that_was_frozen_for_longer_than_its_lease_disturbs_nobody(cluster: Cluster) -> None:
    """SIGSTOP, SIGCONT after two lease times: others have its keys, and it joins again under a new epoch."""
    cluster.env |= QUICK
    one, two, three = cluster.start("one", "two", "three")
    with cluster.load() as load:
        cluster.wait_working(one, two, three)
        running = cluster.wait_busy(one)
        one.kill("SIGSTOP")
        try:
            cluster.wait_rerun(running)
            time.sleep(2.5)  # not to wait for something: it is frozen for that much longer
        finally:
            one.kill("SIGCONT")
        cluster.wait_working(one, two, three)
        account = cluster.settled(load)
    assert not account.wrong


def test_a_restart_of_redis_loses_nothing(cluster: Cluster) -> None:
    """Leases, results and (there) the messages: it stops and comes back with what it had on its disk."""
    cluster.env |= QUICK
    nodes = cluster.start("one", "two", "three")
    with cluster.load() as load:
        cluster.wait_working(*nodes)
        cluster.site.valkey.restart()
        cluster.wait_working(*nodes)
        account = cluster.settled(load)
    assert not account.wrong


def test_a_redis_that_is_frozen_for_two_lease_times_stops_everything_and_loses_nothing(cluster: Cluster) -> None:
    """No node can know that it still owns anything: without a grace builds end, and run again later."""
    cluster.env |= QUICK | {"POOL_LEASE_GRACE": "0"}
    nodes = cluster.start("one", "two", "three")
    with cluster.load() as load:
        cluster.wait_working(*nodes)
        running = cluster.wait_busy(nodes[0])
        with cluster.site.valkey.frozen():
            wait_until(lambda: not group_members(running.group), f"{running} ended", 10.0)
            time.sleep(2.5)  # not to wait for something: Redis is silent for that much longer
        cluster.wait_working(*nodes)
        account = cluster.settled(load)
    assert not account.wrong


def test_redis_may_be_away_for_half_a_minute_and_no_build_is_cancelled(cluster: Cluster) -> None:
    """Many lease times: what runs goes on under the fence, nothing starts, and nobody works beside anybody."""
    nodes = cluster.start("one", "two", "three")
    with cluster.load() as load:
        cluster.wait_working(*nodes)
        cluster.wait_busy(nodes[0])
        with cluster.site.valkey.away():
            nobody_trusts = time.time_ns() + int(5e9)
            time.sleep(AWAY)  # not to wait for something: it is away for that long
            back = time.time_ns()
        cluster.wait_working(*nodes)
        account = cluster.settled(load)
    assert not account.wrong
    assert (account.killed, account.duplicates) == ([], {})
    assert not [build for build in cluster.ledger.builds() if nobody_trusts < build.began < back]
