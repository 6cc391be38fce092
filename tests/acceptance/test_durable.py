"""Durable builds: whatever happens to the node that started one, it runs once, and its task ends with its result."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pool import follow
from tests.support.celery_nodes import WorkerNode
from tests.support.cluster import QUICK, Cluster, build_hosts
from tests.support.openssh import OpenSshd
from tests.support.processes import group_members, wait_group_gone
from tests.support.site import RESULT_TIMEOUT, Gate, Producer, Site
from tests.support.waiting import wait_until

pytestmark = pytest.mark.openssh


@pytest.fixture(scope="module")
def hosts(openssh: OpenSshd, host_folder: Path) -> str:
    return build_hosts(openssh, str(host_folder))


@pytest.fixture
def gate(host_folder: Path, key: str):
    gate = Gate(host_folder / key)
    yield gate
    gate.folder.mkdir(exist_ok=True)
    gate.open()


def of(nodes: list[WorkerNode], producer: Producer, key: str) -> tuple[WorkerNode, WorkerNode]:
    """Return the node that works for the key, and the other."""
    producer.wait_shared(nodes)
    name = producer.where(key)["node"]
    first, second = sorted(nodes, key=lambda node: node.hostname() != name)
    assert first.hostname() == name
    return first, second


def kill(node: WorkerNode) -> None:
    node.kill("SIGKILL")
    node.wait()


def quit_cold(node: WorkerNode) -> None:
    node.kill("SIGQUIT")
    node.wait()


@pytest.mark.parametrize("end", [kill, quit_cold])
def test_the_node_goes_and_the_build_goes_on(
    end: Callable[[WorkerNode], None], cluster: Cluster, producer: Producer, gate: Gate, key: str
) -> None:
    """Another node takes the shard, its task is delivered again, and goes on with the command that runs."""
    first, second = of(cluster.start("one", "two", env=QUICK), producer, key)
    result = producer.build(key, gate.command, durable=True)
    group = gate.wait_started()
    end(first)
    assert producer.where(key)["node"] == second.hostname()
    assert group_members(group)
    gate.open()
    told = result.get(timeout=RESULT_TIMEOUT)
    assert (told["node"], told["exit_code"], told["output"]) == (second.hostname(), 0, "built\n")
    assert gate.runs == 1


def test_those_who_follow_it_see_each_byte_once(cluster: Cluster, producer: Producer, gate: Gate, key: str) -> None:
    """One who was there from the start, and one who comes late: another node goes on at the next byte."""
    first, second = of(cluster.start("one", "two", env=QUICK), producer, key)
    numbers = "n=0; while [ ! -e go ] || [ $n -lt 60 ]; do n=$((n + 1)); echo line $n; sleep 0.05; done"
    result = producer.build(key, f"{gate.command.partition(';')[0]}; mv started.new started; {numbers}", durable=True)
    pieces, seen = follow(result.id, app=producer.app, timeout=RESULT_TIMEOUT), []
    while len(seen) < 10:
        seen.append(next(pieces))
    kill(first)
    gate.open()
    seen += pieces
    assert [piece.facts["node"] for piece in seen if piece.kind == "begin"] == [first.hostname(), second.hostname()]
    for told in seen, list(follow(result.id, app=producer.app, wait=False)):
        assert not any(piece.skipped for piece in told)
        output = b"".join(piece.data for piece in told).decode()
        assert output == result.get(timeout=RESULT_TIMEOUT)["output"]
    lines = output.splitlines()
    assert lines == [f"line {number}" for number in range(1, len(lines) + 1)]


def test_a_build_that_ended_while_nobody_followed(
    cluster: Cluster, producer: Producer, gate: Gate, key: str, start: Callable[..., WorkerNode]
) -> None:
    """Its output and exit code wait on the host for the node that comes."""
    [first] = cluster.start("one", env=QUICK)
    result = producer.build(key, f"{gate.command}; exit 3", durable=True, check=False)
    group = gate.wait_started()
    kill(first)
    gate.open()
    wait_group_gone(group)
    cluster.start("two", env=QUICK)
    told = result.get(timeout=RESULT_TIMEOUT)
    assert (told["exit_code"], told["output"]) == (3, "built\n")
    assert gate.runs == 1


def test_a_restart_of_redis(cluster: Cluster, producer: Producer, site: Site, gate: Gate, key: str) -> None:
    """The leases end, the node lets go of the build and goes on with it when it owns the shard again."""
    cluster.start("one", env=QUICK)
    result = producer.build(key, gate.command, durable=True)
    group = gate.wait_started()
    site.valkey.restart()
    assert group_members(group)
    gate.open()
    assert result.get(timeout=RESULT_TIMEOUT)["output"] == "built\n"
    assert gate.runs == 1


def test_a_cancelled_build_is_gone(cluster: Cluster, producer: Producer, gate: Gate, key: str) -> None:
    """Durable against accidents, not against its user."""
    [node] = cluster.start("one", env=QUICK)
    result = producer.build(key, gate.command, durable=True)
    group = gate.wait_started()
    producer.command("pool_cancel", node, task_id=result.id)
    wait_group_gone(group)
    wait_until(lambda: result.state == "REVOKED", "it is told", RESULT_TIMEOUT)
