"""What the tests of steering a node share."""

import socket
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest
from celery import states
from celery.exceptions import SoftTimeLimitExceeded, TaskRevokedError, TimeLimitExceeded

from pool.sharding.hashing import key_hash, shard_of
from tests.support.processes import wait_group_gone
from tests.support.site import RESULT_TIMEOUT, Gate, Producer
from tests.support.waiting import wait_until

Ask = Callable[..., dict[str, Any]]
"""Sends a control command to as many nodes as there should be; returns the reply of one, or all by node."""


def asker(producer: Producer) -> Ask:
    def ask(command: str, nodes: int = 1, **arguments: Any) -> dict[str, Any]:
        replies: dict[str, Any] = {}
        found = producer.app.control.broadcast(command, arguments, reply=True, timeout=RESULT_TIMEOUT, limit=nodes)
        for reply in found:
            replies |= reply
        assert len(replies) == nodes, replies
        return next(iter(replies.values())) if nodes == 1 else replies

    return ask


def free_port() -> int:
    """A port of this machine that nobody uses yet."""
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        port: int = made.getsockname()[1]
        return port


def scrape(port: int) -> str:
    """What a node tells Prometheus."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        return answer.read().decode()


def sample(text: str, name: str) -> float:
    """The value of one sample."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"{name} ")]
    return float(line.rpartition(" ")[2])


def assert_it_cancels(producer: Producer, gate: Gate, key: str) -> None:
    """State REVOKED with the reason, nothing of the command stays; the next build of the key finds the connection."""
    ask = asker(producer)
    producer.built(key)
    for round_ in range(1, 6):
        result = producer.build(key, f"sh -c 'trap \"\" TERM; {gate.command}' & wait")
        group = gate.wait_started(round_)
        assert ask("pool_cancel", task_id=result.id, reason="enough of this") == {
            "ok": "cancelling tasks.builds.run_build",
            "found": "running",
        }
        with pytest.raises(TaskRevokedError, match="enough of this"):
            result.get(timeout=RESULT_TIMEOUT)
        assert result.state == states.REVOKED
        wait_group_gone(group)
        assert producer.built(key)["warm"]


def assert_it_keeps_time(producer: Producer, gate: Gate, key: str) -> None:
    """FAILURE with Celery's own exceptions; nothing of the command stays, and the backend is warm."""
    build = producer.app.tasks["tasks.builds.run_build"]
    producer.built(key)  # a login takes of the time, too
    limits = ({"time_limit": 2.0}, TimeLimitExceeded), ({"soft_time_limit": 2.0}, SoftTimeLimitExceeded)
    for round_, (options, error) in enumerate(limits, 1):
        result = build.apply_async((key, gate.command), **options)
        group = gate.wait_started(round_)
        with pytest.raises(error):
            result.get(timeout=RESULT_TIMEOUT)
        assert result.state == states.FAILURE
        wait_group_gone(group)
    assert producer.built(key)["warm"]


def assert_it_tells_what_it_has(producer: Producer, gate: Gate, key: str, execution: str) -> None:
    """Counts, backends and one key, while a build of it runs."""
    ask = asker(producer)
    result = producer.build(key, gate.command)
    gate.wait_started()
    wait_until(lambda: ask("pool_stats").get("busy") == 1, "the node tells of it", RESULT_TIMEOUT)
    stats = ask("pool_stats")
    assert (stats["running"], stats["shards"], stats["execution"]) == (1, 64, execution)
    assert 0 < stats["trusted_s"] <= 5
    listed = ask("pool_backends", key=key + "*")
    assert (listed["total"], listed["backends"][0]["key"], listed["backends"][0]["kind"]) == (1, key, "ssh")
    assert ask("pool_backends", key="other*") == {"total": 0, "shown": 0, "backends": []}
    assert ask("pool_backends", limit=0)["backends"] == []
    told = ask("pool_explain", key=key)
    assert (told["hash"], told["shard"]) == (f"{key_hash(key):016x}", shard_of(key, 64))
    assert (told["queue"], told["state"], told["how"]) == (
        f"pool.shard.{told['shard']:03d}",
        "serving",
        "nobody had it",
    )
    assert told["running"][0]["task_id"] == result.id
    assert told["backends"][0]["state"] == "busy"
    assert "rendezvous" in told["why"]
    gate.open()
    result.get(timeout=RESULT_TIMEOUT)
    wait_until(lambda: ask("pool_explain", key=key)["last"], "the build is remembered", RESULT_TIMEOUT)
    (last,) = ask("pool_explain", key=key)["last"]
    assert (last["task_id"], last["state"], last["lines"]) == (result.id, states.SUCCESS, 1)
