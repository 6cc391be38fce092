"""Ending a chat through its shard queue."""

from collections.abc import Callable

import pytest
from celery import states

from pool.loopback_sshd import LoopbackSshd
from tests.support.celery_nodes import WorkerNode
from tests.support.site import RESULT_TIMEOUT, Gate, Producer, Site, connections, ssh_hosts
from tests.support.waiting import wait_until


@pytest.fixture(scope="module")
def hosts(sshd: LoopbackSshd) -> str:
    """Keys on a build host, whose connections can be counted."""
    return ssh_hosts(sshd.info)


@pytest.fixture(scope="module")
def start_nodes() -> Callable[[Site], list[WorkerNode]]:
    return lambda site: [site.start()]


def close(producer: Producer, key: str) -> dict:
    return producer.send("pool.close_chat", key).get(timeout=RESULT_TIMEOUT)


def test_close_chat_ends_an_idle_backend_at_once(producer: Producer, sshd: LoopbackSshd, key: str) -> None:
    """The connection is gone when the task has succeeded; repeating it does no harm; the next build connects anew."""
    producer.built(key)
    assert connections(sshd.pid) == 1
    assert close(producer, key) == {"key": key, "closed": ["default"], "retired": []}
    wait_until(lambda: connections(sshd.pid) == 0, "the host has seen the end")
    assert close(producer, key) == {"key": key, "closed": [], "retired": []}
    assert not producer.built(key)["warm"]
    close(producer, key)


def test_close_chat_waits_for_the_build_that_runs(producer: Producer, sshd: LoopbackSshd, key: str) -> None:
    """Busy: the build finishes with its result, then the connection goes; a new build does not wait for it."""
    gate = Gate(sshd.info.home / "builds" / key)
    running = producer.build(key, gate.command)
    gate.wait_started()
    assert close(producer, key) == {"key": key, "closed": [], "retired": ["default"]}
    assert running.state in {states.STARTED, "PROGRESS"}
    assert not producer.built(key)["warm"]
    assert connections(sshd.pid) == 2
    gate.open()
    assert running.get(timeout=RESULT_TIMEOUT)["output"] == "built\n"
    wait_until(lambda: connections(sshd.pid) == 1, "the retired connection is closed")
    assert producer.built(key)["warm"]
    close(producer, key)


def test_close_chat_of_one_key_leaves_the_others_warm(producer: Producer, key: str) -> None:
    """Keys are apart, also where one is the beginning of the other."""
    for name in (key, f"{key}-2"):
        producer.built(name)
    close(producer, key)
    assert producer.built(f"{key}-2")["warm"]
    assert not producer.built(key)["warm"]
