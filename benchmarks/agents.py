"""A warm turn through Celery, ``run_turn.delay(...).get()``, against the same agent's own warm prompt."""

import asyncio
import random
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

from benchmarks.agent_site import TURN_TIMEOUT, AgentSite, agent_site, fake_llm
from benchmarks.fleet import percentile
from benchmarks.harness import Report, p50, pong, ratio, spread
from pool.demo.real_agents import CodexHome, OpencodeHome, find_binary

FACTOR, EXTRA = 1.2, 10.0  # a turn through Celery may take this many times the agent's own, and ms more
SETTLE = 0.2  # seconds before each prompt: agents clear up after the last one
PROMPT = "!slow 0 hello"  # answered with "hello" however much was said before

Ask = Callable[[], Any]


def measure(*, quick: bool) -> Report:
    rounds = 5 if quick else 100
    report = Report("agents", "a warm turn through Celery, and the agent's own warm prompt, taken in turns")
    with agent_site() as site, fake_llm() as llm, ExitStack() as stack:
        own = {name: stack.enter_context(make()) for name, make in _agents(site, llm).items()}
        node = site.node("node0")
        node.until(lambda: pong(site.app, "node0"), "answers a ping")
        contestants: dict[str, Ask] = {"an empty task": lambda: site.app.tasks["bench.nothing"].delay().get(timeout=30)}
        for name, ask in own.items():
            contestants[f"{name}, its own prompt"] = ask
            contestants[f"{name}, through Celery"] = _through_celery(site, name)
        for ask in contestants.values():
            for _ in range(5):
                ask()
        told = _shuffled(contestants, rounds)
    report.raw["ms"] = told
    for name in own:
        _add(report, name, told[f"{name}, its own prompt"], told[f"{name}, through Celery"])
    empty = told["an empty task"]
    report.add("an empty task: Celery, broker and result alone, p50", p50(empty), "ms", remark=spread(empty))
    report.notes.append(f"Required: {FACTOR:g} x the agent's own + {EXTRA:g} ms, at the same percentile.")
    missing = {"codex-acp", "opencode"} - own.keys()
    if missing:
        report.notes.append(f"Not installed (POOL_AGENTS_DIR), so not measured: {', '.join(sorted(missing))}.")
    return report


def _add(report: Report, name: str, own: list[float], celery: list[float]) -> None:
    report.add(f"{name}: its own prompt, p50", p50(own), "ms", remark=spread(own))
    report.add("... p99", percentile(own, 0.99), "ms")
    report.add(f"{name}: through Celery, p50", p50(celery), "ms", FACTOR * p50(own) + EXTRA, remark=spread(celery))
    report.add("... p99", percentile(celery, 0.99), "ms", FACTOR * percentile(own, 0.99) + EXTRA)
    report.add("... ratio within a round", ratio(celery, own), "x")
    report.add("... difference within a round", p50([c - o for c, o in zip(celery, own, strict=True)]), "ms")


def _shuffled(contestants: Mapping[str, Ask], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each; in another order each round, for an agent is still busy when it has answered."""
    told: dict[str, list[float]] = {name: [] for name in contestants}
    chance = random.Random(5)
    for _ in range(rounds):
        for name in chance.sample(list(contestants), len(contestants)):
            sleep(SETTLE)
            started = perf_counter()
            contestants[name]()
            told[name].append(1e3 * (perf_counter() - started))
    return told


def _through_celery(site: AgentSite, name: str) -> Ask:
    ready: list[str] = []

    def ask() -> None:
        got = site.turn("chat", name, PROMPT)
        if not got["warm"] and ready:
            raise RuntimeError(f"a cold turn: {got}")
        if "hello" not in got["text"]:
            raise RuntimeError(f"a wrong answer: {got}")
        ready.append(got["session_id"])

    return ask


def _agents(site: AgentSite, llm: str) -> dict[str, Callable[[], Any]]:
    """Add the agents to the hosts file; return, by name, what starts one of one's own, warm, and yields its prompt."""
    made: dict[str, Callable[[], Any]] = {}
    site.add_agent("echo", "acp", site.echo_command(), {})
    made["echo"] = lambda: _acp(site.echo_command(), {}, site.folder)
    if find_binary("codex-acp") is not None:
        codex = CodexHome(site.folder / "codex", llm)
        own = CodexHome(site.folder / "own-codex", llm)
        site.add_agent("codex-acp", "acp", codex.command, codex.env)
        made["codex-acp"] = lambda: _acp(own.command, own.env, site.folder)
    if find_binary("opencode") is not None:
        opencode = OpencodeHome(site.folder / "opencode", llm)
        ours = OpencodeHome(site.folder / "own-opencode", llm)
        site.add_agent("opencode", "opencode", opencode.serve_command[:2], opencode.env)
        made["opencode"] = lambda: _http(ours.serve_command, ours.env, site.folder)
    return made


class _Client:
    """What a client of the protocol must be able to do here: listen."""

    def __init__(self) -> None:
        self.text = ""

    async def session_update(self, session_id: str, update: Any, **_: Any) -> None:  # noqa: ARG002
        content = getattr(update, "content", None)
        self.text += getattr(content, "text", "")

    def on_connect(self, connection: Any) -> None:
        """Need nothing of it."""


@contextmanager
def _acp(command: Sequence[str], env: Mapping[str, str], folder: Path) -> Iterator[Ask]:
    """An agent over the SDK's own stdio, in an event loop of this thread."""
    import acp

    client: Any = _Client()  # the SDK asks for more than is needed
    with asyncio.Runner() as runner:
        context = acp.spawn_agent_process(client, command[0], *command[1:], env=dict(env), cwd=folder)
        connection, _ = runner.run(context.__aenter__())
        runner.run(connection.initialize(protocol_version=acp.PROTOCOL_VERSION))
        session = runner.run(connection.new_session(cwd=str(folder), mcp_servers=[])).session_id

        def ask() -> None:
            client.text = ""
            runner.run(connection.prompt(session_id=session, prompt=[acp.text_block(PROMPT)]))
            if "hello" not in client.text:
                raise RuntimeError(f"a wrong answer: {client.text!r}")

        try:
            yield ask
        finally:
            runner.run(context.__aexit__(None, None, None))


@contextmanager
def _http(command: Sequence[str], env: Mapping[str, str], folder: Path) -> Iterator[Ask]:
    """An opencode server of one's own, asked over blocking HTTP."""
    import os

    import httpx

    process = subprocess.Popen(
        [*command, "--port", "0"], env={**os.environ, **env}, cwd=folder, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        while (found := re.search(r"listening on (http://\S+)", line := process.stdout.readline())) is None:
            if not line:
                raise RuntimeError("opencode serve has ended")
        with httpx.Client(base_url=found[1], timeout=TURN_TIMEOUT, trust_env=False) as client:
            session = client.post("/session", json={"title": "bench"}).json()["id"]
            body = {"parts": [{"type": "text", "text": PROMPT}]}

            def ask() -> None:
                answer = client.post(f"/session/{session}/message", json=body).json()
                if not any("hello" in part.get("text", "") for part in answer["parts"]):
                    raise RuntimeError(f"a wrong answer: {answer}")

            yield ask
    finally:
        process.terminate()
        process.wait()
