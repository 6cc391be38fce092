"""Seeing and steering under the other execution pools, and nodes that tell from whom they have their shards."""

from collections.abc import Callable
from typing import Any

import pytest

from pool.loopback_sshd import LoopbackSshd
from tests.support.celery_nodes import WorkerNode
from tests.support.site import RESULT_TIMEOUT, Gate, Producer, ssh_hosts
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

Start = Callable[..., WorkerNode]


@pytest.fixture(scope="module")
def hosts(sshd: LoopbackSshd) -> str:
    return ssh_hosts(sshd.info)


@pytest.fixture(autouse=True)
def written(celery_worker_cluster: Any) -> None:
    """The hosts file is there, although each test starts its own nodes."""


@pytest.fixture
def gate(sshd: LoopbackSshd, key: str) -> Gate:
    """A build of the key at the build host that ends when the test says so."""
    return Gate(sshd.info.home / "builds" / key)


@pytest.fixture
def ask(producer: Producer) -> Ask:
    return asker(producer)


def test_the_backends_of_a_prefork_child_are_told_and_its_builds_cancelled(
    start: Start, producer: Producer, ask: Ask, sshd: LoopbackSshd, key: str
) -> None:
    """By its parent, which never waits for it: the child posts what it knows."""
    port = free_port()
    node = start(env={"POOL_EXECUTION": "prefork", "POOL_METRICS_PORT": str(port)})
    assert_it_tells_what_it_has(producer, Gate(sshd.info.home / "builds" / key), key, "prefork")
    assert ask("pool_stats")["pid"] not in (node.pid, None)
    text = scrape(port)
    assert sample(text, 'backend_pool_exec_seconds_count{kind="ssh",outcome="ok"}') == 1
    assert sample(text, "backend_pool_shards_owned") == 64
    other = f"{key}-2"
    assert_it_cancels(producer, Gate(sshd.info.home / "builds" / other), other)


def test_solo_keeps_time_limits_too(start: Start, producer: Producer, gate: Gate, key: str) -> None:
    """Though nothing else reaches its main thread while a task runs."""
    start(env={"POOL_EXECUTION": "solo"})
    assert_it_keeps_time(producer, gate, key)


def test_who_got_a_shard_from_whom(start: Start, producer: Producer, ask: Ask, key: str) -> None:
    """Handed over, and taken over from a node that died; only the owner has more to tell."""
    env = {"POOL_LEASE_TTL": "6", "POOL_LEASE_HEARTBEAT": "0.3"}
    start("first", env=env)
    second = start("second", env=env)
    wait_until(lambda: {r["shards"] for r in ask("pool_stats", 2).values()} == {32}, "they share", RESULT_TIMEOUT)
    keys = [f"{key}-{n}" for n in range(20)]
    replies = {each: ask("pool_explain", 2, key=each) for each in keys}
    moved = [r for both in replies.values() for node, r in both.items() if r["owns"] and node.startswith("second")]
    assert moved
    assert {told["how"].partition(" by ")[0] for told in moved} == {"handed over"}
    for both in replies.values():
        assert sorted(told["owns"] for told in both.values()) == [False, True]
    second.kill("SIGKILL")
    wait_until(lambda: ask("pool_stats")["shards"] == 64, "the first has all", RESULT_TIMEOUT)
    told = ask("pool_explain", key=moved[0]["key"])
    assert told["how"].startswith("taken over from the dead node second")
