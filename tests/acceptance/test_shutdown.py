"""How a node ends, and what becomes of the build that runs in it."""

import json
import os
import signal
import time
from collections.abc import Callable
from zlib import crc32

import pytest
from celery import states

from pool.loopback_sshd import LoopbackSshd
from pool.sharding.hashing import shard_of
from tests.support.celery_nodes import WorkerNode, process_gone
from tests.support.processes import wait_group_gone
from tests.support.site import BROKERS, RESULT_TIMEOUT, Gate, Producer, Site, connections, ssh_hosts
from tests.support.waiting import wait_until

Start = Callable[..., WorkerNode]
COMPOSED = "tests.acceptance.apps.composed"


@pytest.fixture(scope="module", params=BROKERS)
def broker(request: pytest.FixtureRequest) -> str:
    """Everything here holds on both brokers."""
    return request.param


@pytest.fixture(scope="module")
def hosts(sshd: LoopbackSshd) -> str:
    """``here*`` builds on the node's machine, everything else over SSH."""
    here = f"""
        [[match]]
        key = "here*"
        backend = "local"
        root_dir = "{sshd.info.home}/{{key}}"
    """
    return ssh_hosts(sshd.info, f"{sshd.info.home}/{{key}}") + here


@pytest.fixture(params=["remote", "here"])
def key(request: pytest.FixtureRequest) -> str:
    """A key on the build host, and one on the node's own machine."""
    return f"{request.param}{crc32(request.node.nodeid.encode())}"


@pytest.fixture
def gate(sshd: LoopbackSshd, key: str):
    gate = Gate(sshd.info.home / key)
    yield gate
    gate.folder.mkdir(exist_ok=True)
    gate.open()


def assert_nothing_left(node: WorkerNode, sshd: LoopbackSshd) -> None:
    """No process of the node, no connection to the host."""
    wait_until(lambda: not node.container.children(), f"no process of {node.name()} is left", 20.0)
    wait_until(lambda: connections(sshd.pid) == 0, "the host has no connection left", 20.0)


@pytest.mark.parametrize("execution", ["threads", "prefork", "solo"])
def test_term_waits_for_the_build_and_then_closes_everything(
    execution: str, start: Start, producer: Producer, sshd: LoopbackSshd, gate: Gate, key: str
) -> None:
    """Warm shutdown: the running build ends with its result, nothing else starts, the connection is closed, exit code 0."""
    node = start(env={"POOL_EXECUTION": execution})
    result = producer.build(key, gate.command)
    gate.wait_started()
    node.kill("SIGTERM")
    node.wait_for("Warm shutdown")
    gate.open()
    assert node.wait() == 0
    assert result.get(timeout=RESULT_TIMEOUT)["output"] == "built\n"
    assert gate.runs == 1
    assert_nothing_left(node, sshd)


@pytest.mark.parametrize("key", ["here1"])
def test_term_of_a_static_node_waits_as_long_as_the_build_takes(
    start: Start, producer: Producer, gate: Gate, key: str, site: Site, broker: str
) -> None:
    """The broker hears from it all the time: nothing is delivered again, and nothing is left."""
    node = start(env={"POOL_NODE_SHARDS": "0-63"})
    result = producer.build(key, gate.command)
    gate.wait_started()
    node.kill("SIGTERM")
    node.wait_for("Warm shutdown")
    if broker == "rabbitmq":
        time.sleep(7)  # not to wait for something: longer than it waits for a node that is silent
    gate.open()
    assert node.wait() == 0
    assert result.get(timeout=RESULT_TIMEOUT)["output"] == "built\n"
    assert gate.runs == 1
    assert site.messages() == 0


def test_term_leaves_what_has_not_started_to_the_next_node(
    start: Start, producer: Producer, gate: Gate, key: str, site: Site
) -> None:
    """A build that the node had reserved goes back, and runs once, on the next node; no node leaves a trace of its own."""
    first = start("first", env={"POOL_CONCURRENCY": "1"})
    running = producer.build(key, gate.command)
    gate.wait_started()
    waiting = producer.build(key, "echo run >> second; echo second")
    first.kill("SIGTERM")
    first.wait_for("Warm shutdown")
    gate.open()
    assert first.wait() == 0
    assert running.get(timeout=RESULT_TIMEOUT)["node"] == first.hostname()
    second = start("second")
    assert waiting.get(timeout=RESULT_TIMEOUT)["output"] == "second\n"
    assert producer.built(key, "cat second")["output"] == "run\n"
    assert second.stop() == 0
    assert site.messages() == 0
    with site.redis() as client:
        assert client.keys("pool.claim*") == []


def test_term_gives_back_at_once_what_waits_for_its_time(
    start: Start, producer: Producer, gate: Gate, key: str, site: Site
) -> None:
    """Another node runs it in time, though a build of another key keeps this one."""
    first = start("first")
    running = producer.build(key, gate.command)
    gate.wait_started()
    other = next(f"{key}-{n}" for n in range(99) if shard_of(f"{key}-{n}", 64) != shard_of(key, 64))
    delayed = producer.send("probe.where", other, countdown=8)
    first.kill("SIGTERM")
    first.wait_for("Warm shutdown")
    second = start("second")
    assert delayed.get(timeout=RESULT_TIMEOUT)["node"] == second.hostname()
    assert running.state not in states.READY_STATES
    gate.open()
    assert first.wait() == 0
    assert running.get(timeout=RESULT_TIMEOUT)["node"] == first.hostname()
    assert second.stop() == 0
    assert site.messages() == 0


@pytest.mark.parametrize("execution", ["threads", "prefork", "solo"])
def test_quit_kills_the_build_and_another_node_runs_it_again(
    execution: str, start: Start, producer: Producer, sshd: LoopbackSshd, gate: Gate, key: str, site: Site
) -> None:
    """Cold shutdown: the command's process group is gone, the message goes back, the next node builds it, one SUCCESS."""
    first = start("first", env={"POOL_EXECUTION": execution})
    result = producer.build(key, gate.command)
    group = gate.wait_started()
    first.kill("SIGQUIT")
    first.wait()
    wait_group_gone(group)
    assert_nothing_left(first, sshd)
    assert result.state not in states.READY_STATES
    gate.open()
    second = start("second", env={"POOL_EXECUTION": execution})
    assert result.get(timeout=RESULT_TIMEOUT)["node"] == second.hostname()
    assert gate.runs == 2
    assert first.logs().count("succeeded in") == 0
    assert "Unrecoverable error" not in first.logs()
    assert second.stop() == 0
    assert site.messages() == 0


def test_a_second_signal_during_a_warm_shutdown_makes_it_cold(
    start: Start, producer: Producer, sshd: LoopbackSshd, gate: Gate, key: str
) -> None:
    """TERM, then QUIT because the build takes too long: as QUIT alone."""
    first = start("first")
    result = producer.build(key, gate.command)
    group = gate.wait_started()
    first.kill("SIGTERM")
    first.wait_for("Warm shutdown")
    first.kill("SIGQUIT")
    first.wait()
    wait_group_gone(group)
    assert_nothing_left(first, sshd)
    gate.open()
    second = start("second")
    assert result.get(timeout=RESULT_TIMEOUT)["node"] == second.hostname()


def test_term_is_the_cold_way_where_celery_is_told_so(
    start: Start, producer: Producer, sshd: LoopbackSshd, gate: Gate, key: str
) -> None:
    """REMAP_SIGTERM=SIGQUIT, Celery's own switch for platforms that only send TERM."""
    first = start("first", env={"REMAP_SIGTERM": "SIGQUIT"})
    result = producer.build(key, gate.command)
    group = gate.wait_started()
    first.stop("SIGTERM")
    wait_group_gone(group)
    gate.open()
    second = start("second")
    assert result.get(timeout=RESULT_TIMEOUT)["node"] == second.hostname()


def soft(seconds: float) -> dict[str, str]:
    return {"TEST_CONF": json.dumps({"worker_soft_shutdown_timeout": seconds})}


def test_a_soft_shutdown_lets_a_short_build_finish(
    start: Start, producer: Producer, sshd: LoopbackSshd, gate: Gate, key: str, site: Site
) -> None:
    """worker_soft_shutdown_timeout: QUIT waits that long, the build ends in time, and is not run again."""
    node = start(app=COMPOSED, env=soft(5.0))
    result = producer.build(key, gate.command)
    gate.wait_started()
    node.kill("SIGQUIT")
    node.wait_for("Initiating Soft Shutdown")
    gate.open()
    assert result.get(timeout=RESULT_TIMEOUT)["output"] == "built\n"
    node.wait()
    assert_nothing_left(node, sshd)
    second = start("second")
    assert producer.built(key, "true")["node"] == second.hostname()
    assert second.stop() == 0
    assert gate.runs == 1
    assert site.messages() == 0


def test_a_soft_shutdown_gives_a_long_build_back(
    start: Start, producer: Producer, sshd: LoopbackSshd, gate: Gate, key: str
) -> None:
    """After the timeout it is as QUIT alone: killed on the host, built again by the next node."""
    first = start("first", app=COMPOSED, env=soft(1.0))
    result = producer.build(key, gate.command)
    group = gate.wait_started()
    first.stop("SIGQUIT")
    wait_group_gone(group)
    assert_nothing_left(first, sshd)
    gate.open()
    second = start("second")
    assert result.get(timeout=RESULT_TIMEOUT)["node"] == second.hostname()
    assert gate.runs == 2


@pytest.mark.parametrize("execution", ["threads", "prefork"])
def test_kill_9_of_the_node_takes_the_command_with_it(
    execution: str, start: Start, producer: Producer, sshd: LoopbackSshd, gate: Gate, key: str, site: Site
) -> None:
    """The lifeline: nobody is left to clean up, and yet the command's process group ends; the node, started again, builds at once."""
    node = start(env={"POOL_EXECUTION": execution})
    result = producer.build(key, gate.command)
    group = gate.wait_started()
    node.kill("SIGKILL")
    node.wait()
    wait_group_gone(group)
    assert_nothing_left(node, sshd)
    wait_until(lambda: site.messages() == 1, "it has gone back")
    gate.open()
    node.container.restart()
    assert result.get(timeout=RESULT_TIMEOUT)["node"] == node.hostname()
    assert gate.runs == 2
    assert node.stop() == 0
    assert site.messages() == 0


def test_kill_9_of_a_prefork_child_has_the_build_run_again_by_the_next_child(
    start: Start, producer: Producer, sshd: LoopbackSshd, gate: Gate, key: str, site: Site
) -> None:
    """reject_on_worker_lost: the command dies with the child, the message goes back, a new child has a pool of its own."""
    node = start(env={"POOL_EXECUTION": "prefork"})
    before = producer.built(key)
    assert before["pid"] != node.pid
    result = producer.build(key, gate.command)
    group = gate.wait_started()
    os.kill(before["pid"], signal.SIGKILL)
    wait_group_gone(group)
    gate.open()
    again = result.get(timeout=RESULT_TIMEOUT)
    assert gate.runs == 2
    assert again["pid"] not in {before["pid"], node.pid}
    assert not again["warm"]
    assert producer.built(key)["warm"]
    assert process_gone(before["pid"])
    wait_until(lambda: connections(sshd.pid) == (0 if key.startswith("here") else 1), "one connection is left", 20.0)
    assert node.stop() == 0
    assert_nothing_left(node, sshd)
    assert site.messages() == 0
