"""Turns of agents through Celery: nodes, records, closes and cancels as processes, with an agent of our own."""

from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
from celery import states
from celery.exceptions import TaskRevokedError

from pool import ConfigError, InvalidKey, TurnFailed, TurnTimeout
from pool.sessions import RedisChats
from tests.support.celery_nodes import WorkerNode
from tests.support.cluster import QUICK
from tests.support.site import RESULT_TIMEOUT, Producer, Site, echo_hosts
from tests.support.waiting import wait_until

pytestmark = pytest.mark.timeout(300)  # an agent starts in a second, or in ten on a busy machine


@pytest.fixture(scope="module")
def hosts(site: Site) -> str:
    return echo_hosts(site)


@pytest.fixture(autouse=True)
def written(celery_worker_cluster: Any) -> None:
    """The hosts file is there, although each test starts its own nodes."""


@pytest.fixture
def turn(producer: Producer) -> Callable[..., Any]:
    """Send a turn to the agent ``echo``."""

    def send(chat: str, prompt: str, agent: str = "echo", **kwargs: Any) -> Any:
        return producer.app.tasks["tasks.turns.run_turn"].delay(chat, agent, prompt, **kwargs)

    return send


@pytest.fixture
def turned(turn: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """Run a turn to its end; return its result."""
    return lambda *args, **kwargs: turn(*args, **kwargs).get(timeout=RESULT_TIMEOUT)


@pytest.fixture
def records(site: Site) -> Iterator[RedisChats]:
    """What the store knows, as anybody may look."""
    store = RedisChats.from_url(site.valkey.url, "pool", 64)
    yield store
    store.close()


def agents_of(site: Site) -> list[psutil.Process]:
    """The running processes of the site's agents, whatever their node is."""
    found = []
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
            if str(site.folder / "store") in command and process.status() != psutil.STATUS_ZOMBIE:
                if command[1:2] == ["-m"]:
                    found.append(process)
        except psutil.Error:
            continue
    return found


def test_a_chat_has_one_warm_agent_that_remembers(site, start, turned, key, records):
    """The second turn finds the agent of the first one; the record names its session."""
    start("a")
    first, second = turned(key, "hello"), turned(key, "again")
    assert (first["text"], first["warm"], first["resumed"], first["memory_lost"]) == (
        "turn 1: hello; earlier: []",
        False,
        False,
        False,
    )
    assert (second["text"], second["warm"], second["stop_reason"]) == (
        "turn 2: again; earlier: [hello]",
        True,
        "end_turn",
    )
    assert second["pid"] == first["pid"]
    (record,) = records.records(key)
    assert (record.session_id, record.agent, record.turn, record.state) == (first["session_id"], "echo", "", "open")
    assert len(agents_of(site)) == 1


def test_the_chat_goes_on_at_another_node(site, start, turned, key):
    """After a warm stop and after kill -9 the next turn continues the same session, and no agent is left behind."""
    a = start("a", env=QUICK)
    first = turned(key, "one")
    b = start("b", env=QUICK)
    a.stop()
    second = turned(key, "two")
    assert second["node"] != first["node"]
    assert (second["text"], second["resumed"], second["memory_lost"]) == ("turn 2: two; earlier: [one]", True, False)
    (left,) = agents_of(site)
    b.kill("SIGKILL")
    b.wait()
    start("c", env=QUICK)
    third = turned(key, "three")
    assert (third["text"], third["session_id"]) == ("turn 3: three; earlier: [one, two]", first["session_id"])
    wait_until(lambda: not left.is_running() or left.status() == psutil.STATUS_ZOMBIE, "the dead node's agent is gone")


def test_a_turn_that_ran_on_a_node_that_died_says_so(site, start, turn, key, records):
    """It runs again at the next owner, and tells that the agent may have heard it before."""
    a = start("a", env=QUICK)
    result = turn(key, "/slow 2 words")
    wait_until(lambda: records.records(key) and records.records(key)[0].turn == result.id, "the turn runs")
    a.kill("SIGKILL")
    start("b", env=QUICK)
    got = result.get(timeout=RESULT_TIMEOUT)
    assert (got["repeated"], got["stop_reason"]) == (True, "end_turn")


def test_turns_of_a_chat_run_one_at_a_time_and_hold_no_thread(site, start, turn, turned, key, producer, records):
    """While one runs the others wait, other chats go on although there are few threads, and the order is kept."""
    start("a", env={"POOL_CONCURRENCY": "2"})
    slow = turn(key, "/hang")
    waiting = [turn(key, f"number {n}") for n in range(6)]
    assert turned(f"{key}-other", "hi")["text"].startswith("turn 1")
    assert slow.state != states.SUCCESS
    wait_until(lambda: records.records(key) and records.records(key)[0].turn == slow.id, "the turn runs")
    assert producer.app.tasks["pool.cancel_turn"](key)["cancelled"] == [slow.id]
    texts = [result.get(timeout=RESULT_TIMEOUT)["text"] for result in waiting]
    assert [text.split(";")[0] for text in texts] == [f"turn {n + 2}: number {n}" for n in range(6)]


def test_a_turn_can_be_cancelled_like_any_task(site, start, turn, turned, key, producer):
    """By pool_cancel: state REVOKED; the agent stays, and remembers what it had heard."""
    node = start()
    turned(key, "hello")
    (agent,) = agents_of(site)
    result = turn(key, "/slow 100 on and on")
    wait_until(lambda: result.state == "PROGRESS", "it works", RESULT_TIMEOUT)
    (reply,) = producer.app.control.broadcast("pool_cancel", {"task_id": result.id}, reply=True, timeout=60, limit=1)
    assert reply == {node.hostname(): {"ok": "cancelling tasks.turns.run_turn", "found": "running"}}
    with pytest.raises(TaskRevokedError):
        result.get(timeout=RESULT_TIMEOUT)
    told = turned(key, "still there?")
    assert told["warm"]
    assert "hello" in told["text"]
    assert agents_of(site) == [agent]


def test_a_running_turn_can_be_cancelled(site, start, turn, turned, key, producer, records):
    """By a task, or by a plain call; it returns what was said so far, and the chat goes on with its memory."""
    start("a")
    turned(key, "hello")
    cancel = producer.app.tasks["pool.cancel_turn"]
    for ask in (lambda: cancel.delay(key).get(timeout=RESULT_TIMEOUT), lambda: cancel(key)):
        result = turn(key, "/slow 100 on and on")
        wait_until(lambda: records.records(key)[0].turn, "the turn runs")
        assert ask() == {"key": key, "cancelled": [result.id]}
        assert result.get(timeout=RESULT_TIMEOUT)["stop_reason"] == "cancelled"
    assert cancel(key) == {"key": key, "cancelled": []}
    after = turned(key, "still there?")
    assert after["warm"] and "hello" in after["text"]


def test_a_closed_chat_is_gone_and_begins_anew(site, start, turn, turned, key, producer, records):
    """The close waits for the running turn; process and record are gone; it can be repeated."""
    start("a")
    close = producer.app.tasks["pool.close_chat"]
    running = turn(key, "/slow 1 words")
    wait_until(lambda: records.records(key), "the turn runs")
    closed = close.delay(key)
    assert closed.get(timeout=RESULT_TIMEOUT) == {"key": key, "closed": ["echo"], "retired": [], "agents": {"echo": {}}}
    assert running.get(timeout=1)["stop_reason"] == "end_turn"
    assert not agents_of(site)
    assert records.records(key) == []
    assert close.delay(key).get(timeout=RESULT_TIMEOUT)["agents"] == {}
    again = turned(key, "hello?")
    assert (again["text"], again["memory_lost"]) == ("turn 1: hello?; earlier: []", False)


def test_a_close_that_was_interrupted_is_finished(site, start, turned, key, producer, records):
    """By the next pass over the shard, or by the next turn, which begins a new chat."""
    start("a")
    turned(key, "hello")
    shards = producer.app.warm_pool.settings.shards
    from pool.sharding.hashing import shard_of

    shard = shard_of(key, shards)
    store = RedisChats.from_url(site.valkey.url, "pool", shards)
    store.mark_closing(key, 0)
    closing = producer.app.tasks["pool.close_idle_chats"]
    assert closing.delay(shard).get(timeout=RESULT_TIMEOUT) == {"shard": shard, "closed": [key]}
    assert records.records(key) == []
    turned(key, "hello")
    store.mark_closing(key, 0)
    assert turned(key, "anew")["text"] == "turn 1: anew; earlier: []"
    store.close()


def test_beat_closes_chats_that_nobody_uses(site, start, turned, key, records):
    """After POOL_CHAT_TTL the process and the record are gone."""
    env = {"POOL_CHAT_TTL": "1", "POOL_CLOSE_INTERVAL": "0.5"}
    start("a", env=env)
    beat = site.beat(app="worker_config", env=env)
    try:
        beat.ready()
        turned(key, "hello")
        wait_until(lambda: not records.records(key), "the chat is closed", 30.0)
        wait_until(lambda: not agents_of(site), "its agent is gone", 30.0)
    finally:
        beat.teardown()


def test_bad_turns_get_a_clear_error_and_the_chat_goes_on(site, start, turned, key, records):
    """Nothing is written for them, and nothing is lost by them."""
    start("a")
    for chat, agent, prompt, kwargs, error, text in [
        (key, "ecko", "hi", {}, ConfigError, "there is no agent 'ecko'; did you mean 'echo'?"),
        (key, "echo", " ", {}, ConfigError, "prompt is empty"),
        (key, "echo", "x" * 10_000_000, {}, ConfigError, "at most 4194304 bytes"),
        (key, "echo", "hi", {"timeout": -1}, ConfigError, "timeout=-1"),
        ("../etc", "echo", "hi", {}, InvalidKey, "cannot stand in root_dir"),
        (key, "echo", "/error", {}, TurnFailed, "told to fail"),
        (key, "echo", "/slow 100 x", {"timeout": 0.5}, TurnTimeout, "cancelled after 0.5 s"),
    ]:
        with pytest.raises(error, match=text):
            turned(chat, prompt, agent, **kwargs)
    assert records.records("../etc") == []
    assert turned(key, "hello")["stop_reason"] == "end_turn"


@pytest.mark.parametrize("terminate", [False, True])
def test_a_waiting_turn_can_be_revoked(terminate, start, turn, turned, key, producer, records):
    """As any task that has not begun."""
    node = start("a")
    slow = turn(key, "/hang")
    waiting = turn(key, "never said")
    node.wait_for(f"[{waiting.id}] received")
    producer.app.control.revoke(waiting.id, terminate=terminate, reply=True, timeout=20.0, limit=1)
    wait_until(lambda: records.records(key) and records.records(key)[0].turn == slow.id, "the turn runs")
    assert producer.app.tasks["pool.cancel_turn"](key)["cancelled"] == [slow.id]
    assert slow.get(timeout=RESULT_TIMEOUT)["stop_reason"] == "cancelled"
    with pytest.raises(TaskRevokedError):
        waiting.get(timeout=RESULT_TIMEOUT)
    assert "never said" not in turned(key, "what did I say?")["text"]
    assert "Traceback" not in node.logs()


def test_many_chats_share_a_few_places_for_agents(site, start: Callable[..., WorkerNode], turn, key):
    """Never more agents than allowed, every turn succeeds, and a chat that lost its place remembers."""
    limit = 4
    start("a", env={"POOL_MAX_AGENTS": str(limit)})
    most = 0
    for n in range(2):
        results = [turn(f"{key}-{chat}", f"round {n}") for chat in range(12)]
        while not all(result.ready() for result in results):
            most = max(most, len(agents_of(site)))
        for result in results:
            got = result.get(timeout=1)
            assert got["text"] == f"turn {n + 1}: round {n}; earlier: [{'round 0' if n else ''}]"
    assert most <= limit


@pytest.mark.parametrize("execution", ["prefork", "solo"])
def test_turns_work_in_every_execution_pool(execution, site, start, turn, turned, key, producer, records):
    """The agent lives in the process that runs the tasks; a cancel reaches it there although that process is busy."""
    start("a", env={"POOL_EXECUTION": execution})
    first, second = turned(key, "hello"), turned(key, "again")
    assert (second["warm"], second["pid"]) == (True, first["pid"])
    result = turn(key, "/slow 100 on and on")
    wait_until(lambda: records.records(key)[0].turn == result.id, "the turn runs")
    assert producer.app.tasks["pool.cancel_turn"](key)["cancelled"] == [result.id]
    assert result.get(timeout=RESULT_TIMEOUT)["stop_reason"] == "cancelled"
    producer.app.tasks["pool.close_chat"].delay(key).get(timeout=RESULT_TIMEOUT)
    assert not agents_of(site)
