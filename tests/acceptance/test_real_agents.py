"""codex-acp and opencode through Celery: whatever happens between two turns, the next one continues the session.

``POOL_TEST_ROUNDS``: how often each thing happens to each agent (once unless told otherwise).
"""

import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from pool.demo.llm import FakeLlm
from pool.sessions import RedisChats
from pool.sharding.hashing import shard_of
from tests.support.celery_nodes import WorkerNode
from tests.support.real_agents import codex_home, opencode_home
from tests.support.site import RESULT_TIMEOUT, Producer, Site
from tests.support.waiting import wait_until

ROUNDS = int(os.environ.get("POOL_TEST_ROUNDS") or 1)
AGENTS = ("codex", "opencode")
HANDOFF_TIMEOUT = 60.0

pytestmark = pytest.mark.timeout(120 + 60 * ROUNDS)


@pytest.fixture(scope="module")
def llm() -> Iterator[FakeLlm]:
    with FakeLlm() as llm:
        yield llm


@pytest.fixture(scope="module")
def hosts(site: Site, llm: FakeLlm) -> str:
    """Both agents on the worker, each with one home for all nodes."""
    codex = codex_home(site.folder / "codex", llm.url)
    opencode = opencode_home(site.folder / "opencode", llm.url)
    return f"""
[default]
backend = "local"
root_dir = {json.dumps(str(site.data / "work" / "{key}"))}

[agents.codex]
kind = "acp"
command = {json.dumps(codex.command)}
root_dir = {json.dumps(str(site.folder / "chats" / "codex-{key}"))}
permissions = {{ execute = "allow" }}
[agents.codex.env]
{_table(codex.env)}

[agents.opencode]
kind = "opencode"
command = {json.dumps(opencode.serve_command[:2])}
root_dir = {json.dumps(str(site.folder / "chats" / "opencode-{key}"))}
permissions = {{ execute = "allow" }}
[agents.opencode.env]
{_table(opencode.env)}
"""


def _table(env: dict[str, str]) -> str:
    return "\n".join(f"{name} = {json.dumps(value)}" for name, value in env.items())


@pytest.fixture(autouse=True)
def written(celery_worker_cluster: Any) -> None:
    """The hosts file is there, although each test starts its own nodes."""


class Talk:
    """One chat with one agent: what was said, and how often the agent went on as it should."""

    def __init__(self, producer: Producer, chat: str, agent: str) -> None:
        self.agent = agent
        self.good = 0
        self.bad: list[Any] = []
        self._send = lambda prompt: producer.app.tasks["tasks.turns.run_turn"].delay(chat, agent, prompt)
        self._said: list[str] = []
        self._session = ""

    def begin(self) -> dict[str, Any]:
        """The first turn, which finds nothing; or one more."""
        return self._turn()

    def send(self, prompt: str) -> Any:
        """Send a turn that is not waited for."""
        self._said.append(prompt)
        return self._send(prompt)

    def goes_on(self) -> dict[str, Any]:
        """The turn after something happened: the same session, brought back, with all that was said before."""
        earlier, session = list(self._said), self._session
        got = self._turn()
        text = f"turn {len(earlier) + 1}: {self._said[-1]}; earlier: [{', '.join(earlier)}]"
        self._judge(got, (got["session_id"], got["resumed"], got["text"]) == (session, True, text))
        return got

    def ran_again(self, got: dict[str, Any]) -> None:
        """A turn that was cut off has run again in the same session; the next one knows all that was said before."""
        before, session = list(self._said), self._session
        after = self._turn()
        heard = after["text"].partition("earlier: [")[2].removesuffix("]").split(", ")
        good = got["repeated"] and got["session_id"] == after["session_id"] == session
        good = good and list(dict.fromkeys(heard)) == list(dict.fromkeys(before))  # perhaps heard twice
        self._judge([got, after], good)
        self._said = [*heard, self._said[-1]]

    def _turn(self) -> dict[str, Any]:
        prompt = f"{self.agent} {len(self._said)}"
        got: dict[str, Any] = self.send(prompt).get(timeout=RESULT_TIMEOUT)
        if got["session_id"] != self._session:
            self._session, self._said = got["session_id"], [prompt]
        return got

    def _judge(self, got: Any, good: bool) -> None:
        self.good += good
        if not good:
            self.bad.append(got)


@pytest.fixture
def talks(producer: Producer, key: str) -> Iterator[list[Talk]]:
    """One chat's talks with both agents; in the end each must have gone on each time."""
    talks = [Talk(producer, key, agent) for agent in AGENTS]
    yield talks
    for talk in talks:
        print(f"{talk.agent}: {talk.good} of {ROUNDS}")
    assert {talk.agent: (talk.good, talk.bad) for talk in talks} == {agent: (ROUNDS, []) for agent in AGENTS}


@pytest.fixture
def nodes(start: Callable[..., WorkerNode]) -> Callable[..., dict[str, WorkerNode]]:
    """Start nodes side by side; return the ready ones by the name that results have."""

    def begin(*names: str, **env: str) -> dict[str, WorkerNode]:
        started = [start(name, ready=False, env=env) for name in names]
        for node in started:
            node.ready()
        return {node.hostname(): node for node in started}

    return begin


def processes_of(site: Site) -> list[psutil.Process]:
    """The running processes of both agents."""
    homes = {str(site.folder / agent) for agent in AGENTS}

    def belongs(process: psutil.Process) -> bool:
        try:
            return process.environ().get("HOME") in homes and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False

    return [process for process in psutil.process_iter() if belongs(process)]


def test_an_evicted_agent_continues_its_session(site: Site, nodes, talks, producer: Producer, key: str) -> None:
    """Idle for too long, the sweep ends it, the shared server of opencode too; the next turn brings it back."""
    nodes("a", POOL_IDLE_TIMEOUT="0.5")
    sweep = producer.app.tasks["pool.sweep_shard"]
    shard = shard_of(key, producer.shards)
    for talk in talks:
        talk.begin()
    for _ in range(ROUNDS):

        def swept() -> bool:
            sweep.delay(shard).get(timeout=RESULT_TIMEOUT)
            return not processes_of(site)

        wait_until(swept, "the agents are ended", 30.0, every=0.2)
        for talk in talks:
            talk.goes_on()


def test_another_node_continues_the_session_after_a_warm_stop(nodes, talks, producer: Producer) -> None:
    """The owner gets TERM; its shards, and the chat, go to the other node."""
    known = nodes("a", "b")
    owner = settled(producer, known, talks)
    for number in range(ROUNDS):
        known.pop(owner).stop()
        for talk in talks:
            owner = talk.goes_on()["node"]
        known |= nodes(f"c{number}")
        owner = settled(producer, known, talks)


def test_another_node_continues_the_session_after_a_drain(nodes, talks, producer: Producer) -> None:
    """The owner hands its shards over and lives on; later the chat comes back to it."""
    known = nodes("a", "b")
    owner = settled(producer, known, talks)
    for _ in range(ROUNDS):
        producer.command("pool_drain", known[owner])
        wait_until(lambda: producer.shards_of(known[owner]) == 0, "it has no shard", HANDOFF_TIMEOUT)
        for talk in talks:
            assert talk.goes_on()["node"] != owner
        producer.command("pool_undrain", known[owner])
        owner = settled(producer, known, talks)


def test_another_node_continues_the_session_after_kill_minus_9(nodes, talks, producer: Producer) -> None:
    """The agents of the dead node are gone, and the next owner has their sessions."""
    known = nodes("a", "b")
    owner = settled(producer, known, talks)
    for number in range(ROUNDS):
        killed = known.pop(owner)
        left = killed.container.children()
        killed.kill("SIGKILL")
        killed.wait()
        for talk in talks:
            owner = talk.goes_on()["node"]
        wait_until(lambda left=left: not any(map(runs, left)), "the agents of the dead node are gone")
        known |= nodes(f"c{number}")
        owner = settled(producer, known, talks)


def test_a_turn_that_was_cut_off_by_kill_minus_9_runs_again_in_its_session(
    site: Site, nodes, talks, producer: Producer, key: str
) -> None:
    """The agents were in the middle of a word; what was said before is known to them still."""
    known = nodes("a", "b")
    records = RedisChats.from_url(site.valkey.url, "pool", 64)
    for talk in talks:
        talk.begin()
    for number in range(ROUNDS):
        for talk in talks:
            producer.wait_shared(known.values())
            owner = talk.begin()["node"]
            cut = talk.send(f"!slow 3 a b c d e {number}")
            wait_until(lambda cut=cut: any(r.turn == cut.id for r in records.records(key)), "the turn runs")
            wait_until(lambda cut=cut: cut.state in {"STARTED", "PROGRESS"}, "the turn runs")
            killed = known.pop(owner)
            killed.kill("SIGKILL")
            killed.wait()
            talk.ran_again(cut.get(timeout=RESULT_TIMEOUT))
            known |= nodes(f"{talk.agent}{number}")
    records.close()


def settled(producer: Producer, known: dict[str, WorkerNode], talks: list[Talk]) -> str:
    """Have a turn when the nodes have shared the shards out, wherever the chat is now; return where that is."""
    producer.wait_shared(known.values())
    for talk in talks:
        owner = talk.begin()["node"]
    assert owner in known
    return owner


def runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
