"""Chats with two real coding agents on two nodes: codex-acp, a process for each chat, and opencode, a server per node.

No network: a fake LLM answers, and its answers quote all that it was told in a chat, so that one sees what an agent
remembers. As promised only if each chat was answered by the one process that has its agent and remembered everything,
also after an eviction and after the kill -9 of its node, and if no agent is left running in the end.
"""

import importlib.util
import json
import os
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from itertools import count
from typing import Any

from pool.demo.llm import FakeLlm
from pool.demo.real_agents import BINARIES, AgentProcess, CodexHome, OpencodeHome, agent_processes, find_binary
from pool.demo.stage import DemoError, Stage, until
from pool.demo.talks import PLACES, TOOL, WARM, AgentsReport, Talk, table_of, verdict_of

NODES = ("node-a", "node-b")
CHATS = 2  # with each agent at each node
IDLE_TIMEOUT = 3.0  # seconds; short, so that the sweep can be watched
ENVIRONMENT = {"POOL_IDLE_TIMEOUT": str(IDLE_TIMEOUT)}
TURN_TIMEOUT = 90.0  # seconds for a turn: on a slow machine, with a takeover and the start of an agent before it
END_TIMEOUT = 60.0  # seconds for processes to be gone

Pending = tuple[Talk, str, float, Any]
"""Chat, prompt, when that was sent, and the result to come."""


def check_agents() -> None:
    """Raise `DemoError` that says what to do if something is missing."""
    if missing := [name for name in BINARIES if find_binary(name) is None]:
        raise DemoError(f"not installed: {' and '.join(missing)}. Run `make agents`, which needs npm")
    if any(importlib.util.find_spec(name) is None for name in ("acp", "httpx", "psutil")):
        raise DemoError("agents need more packages: pip install 'celery-warm-pool[agents]'")


class Conversations:
    """Some chats with each agent at each of two nodes."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.app = stage.app
        self.console = stage.console
        self.talks: list[Talk] = []
        self.failures: list[str] = []
        self.seen: set[int] = set()  # process ids of agents

    def run(self) -> AgentsReport:
        """Start the nodes; talk, have the agents evicted, kill a node, close the chats."""
        self.stage.add_hosts(self._agents(self.stage.enter(FakeLlm()).url))
        for name in NODES:
            self.stage.start_node(name)
        with self.console.status("starting Valkey, an SSH server, a fake LLM and two worker nodes ..."):
            self.stage.wait_for_nodes()
            self.pids: dict[str, int] = {name: stats["pid"] for name, stats in self.stage.all_stats().items()}
            self._cast()
        self._talk()
        self._evict()
        self._kill()
        self._close()
        return self._report()

    def show(self, report: AgentsReport) -> None:
        """Print the table and the verdict."""
        self.console.print(table_of(self.talks))
        for line in [*verdict_of(report, IDLE_TIMEOUT), *self.failures[:5]]:
            self.console.print(line, highlight=False)

    # -- before

    def _agents(self, llm: str) -> str:
        """The agents' part of the hosts file."""
        folder = self.stage.folder
        on_worker, on_host = CodexHome(folder / "codex", llm), CodexHome(folder / "host" / ".codex", llm)
        opencode = OpencodeHome(folder / "opencode", llm)
        root_dir = f"root_dir = {json.dumps(str(folder / 'chats' / '{key}'))}"
        agents = [
            ("codex", "acp", on_worker.command, root_dir, on_worker.env),
            ("codex-host", "acp", on_host.command, 'where = "host"', on_host.env),
            ("opencode", "opencode", [opencode.acp_command[0], "serve"], root_dir, opencode.env),
        ]
        return "".join(
            f"\n[agents.{agent}]\n"
            f'kind = "{kind}"\n'
            f"command = {json.dumps(command)}\n"
            f"{place}\n"
            f"env = {{ {', '.join(f'{name} = {json.dumps(value)}' for name, value in env.items())} }}\n"
            'permissions = { execute = "allow" }\n'
            for agent, kind, command, place, env in agents
        )

    def _cast(self) -> None:
        """Name the chats such that each agent has as many at each node."""
        queues = self.app.control.inspect(timeout=1.0, limit=len(NODES)).active_queues() or {}
        nodes = {queue["name"]: node.partition("@")[0] for node, found in queues.items() for queue in found}
        parts = [(agent, node) for _ in range(CHATS) for agent in PLACES for node in NODES]
        for chat in (f"chat-{number:02d}" for number in count(1)):
            node = nodes[self.app.warm_pool.queue_for(chat)]
            agent = next((agent for agent, at in parts if at == node), None)
            if agent is not None:
                parts.remove((agent, node))
                folder = self.stage.folder / ("host" if agent == "codex-host" else "chats") / chat
                self.talks.append(Talk(chat, agent, node, os.path.realpath(folder)))
            if not parts:
                break
        self.talks.sort(key=lambda talk: (talk.agent, talk.chat))

    # -- turns

    def _talk(self) -> None:
        """In each chat a turn that starts the agent, one in which it runs a command, then two quiet, warm ones."""
        for number, talk in enumerate(reversed(self.talks), start=1):  # first with those that take long
            with self.console.status(f"chat {number} of {len(self.talks)}, {talk.program} ..."):
                running = [process.program for process in self._running(talk.node)]
                talk.started_server = talk.agent == "opencode" and "opencode" not in running
                for text in (f"I am {talk.chat}", TOOL, *WARM):
                    self._say([talk], text)
        for node in NODES:
            self.console.print(f"{node} has {self._counted(node)}", highlight=False)

    def _say(self, talks: Sequence[Talk], text: str) -> None:
        """Say something in some chats at once; return when all have answered."""
        self._collect(self._send(talks, text))

    def _send(self, talks: Sequence[Talk], text: str) -> list[Pending]:
        run_turn = self.app.tasks["tasks.turns.run_turn"]
        return [(talk, text, time.perf_counter(), run_turn.delay(talk.chat, talk.agent, text)) for talk in talks]

    def _collect(self, pending: Sequence[Pending]) -> None:
        for talk, text, sent_at, result in pending:
            try:
                answer = result.get(timeout=TURN_TIMEOUT)
                talk.take(text, answer, 1e3 * (time.perf_counter() - sent_at))
                # Of several that were asked at once, the first may be idle, and gone, when the last has answered.
                self._look(talk, sure=len(pending) == 1)
            except Exception as error:
                self.failures.append(f"{talk.chat}, {talk.agent}: {error!r}")
            finally:
                self.app.backend.remove_pending_result(result)  # see `pool.demo.affinity`

    def _look(self, talk: Talk, *, sure: bool) -> None:
        """See whether it is the process with the chat's agent that has answered. *sure*: the agent must be there."""
        home = self.pids[talk.node]
        owners = [
            process.worker
            for process in self._running()
            if process.program == talk.program
            and (process.folder == talk.folder or (talk.agent == "opencode" and process.worker == home))
        ]
        talk.at_home = talk.at_home and (owners == [home] or (not owners and not sure))

    # -- processes

    def _processes(self, *nodes: str) -> list[AgentProcess]:
        """What runs for the agents of these nodes; of all, if none is given."""
        return agent_processes([self.pids[node] for node in nodes or NODES])

    def _running(self, *nodes: str) -> list[AgentProcess]:
        """Their agents themselves."""
        running = [process for process in self._processes(*nodes) if process.is_agent]
        self.seen.update(process.pid for process in running)
        return running

    def _counted(self, node: str) -> str:
        programs = Counter(process.program for process in self._running(node))
        return " and ".join(f"{number} x {program}" for program, number in sorted(programs.items())) or "no agent"

    # -- what may happen to a chat

    def _evict(self) -> None:
        """Have beat's sweep end all agents, and go on with all chats."""
        with self.console.status(f"beat sweeps what nobody uses for {IDLE_TIMEOUT:g} s ..."):
            self._sweep()
        self.evicted = len(self.seen)
        self.console.print("beat's sweep has ended all agents")
        with self.console.status("all chats go on ..."):
            for program in BINARIES[::-1]:  # first those that take long
                talks = [talk for talk in self.talks if talk.program == program]
                self._say(talks, "still there?")
            self.evicted_resumed = sum(talk.answers[-1]["resumed"] for talk in self.talks if talk.answers)

    def _sweep(self) -> None:
        """Have beat's sweep end all agents. It runs no longer than that: else agents end while others still start."""
        self.stage.start_beat()
        until(lambda: not self._processes(), END_TIMEOUT, "the sweep has ended all agents", 0.2)
        self.stage.stop_beat()

    def _kill(self) -> None:
        """Kill a node under its agents, and go on with its chats."""
        self.killed = random.choice(NODES)  # noqa: S311 - any
        self.moved = [talk for talk in self.talks if talk.node == self.killed]
        self.killed_agents = len(self._running(self.killed))
        self.console.print(f"kill -9 of {self.killed}, which has {self._counted(self.killed)}", highlight=False)
        killed_at = self.stage.kill(self.killed, self.pids[self.killed])
        with self.console.status("its leases run out, the other node takes over ..."):
            pending = self._send(self.moved, "and now?")
            until(lambda: not self._processes(self.killed), END_TIMEOUT, "nothing is left of its agents")
            self.gone_s = time.time() - killed_at
            self._collect(pending)
            self.continued_s = time.time() - killed_at
            self.killed_resumed = sum(
                talk.node != self.killed and talk.answers[-1]["resumed"] for talk in self.moved if talk.answers
            )

    def _close(self) -> None:
        close_chat = self.app.tasks["pool.close_chat"]
        with self.console.status("the chats are closed ..."):
            pending = [(talk, close_chat.delay(talk.chat)) for talk in self.talks]
            self.closed = sum(self._closed(talk, result) for talk, result in pending)
            self._sweep()  # the opencode server, which belongs to no chat

    def _closed(self, talk: Talk, result: Any) -> bool:
        """Whether a chat was closed and has left nothing."""
        try:
            told = result.get(timeout=TURN_TIMEOUT)["agents"][talk.agent]
        except Exception as error:
            self.failures.append(f"close of {talk.chat}, {talk.agent}: {error!r}")
            return False
        finally:
            self.app.backend.remove_pending_result(result)
        forgotten = told == ({"session": "deleted"} if talk.agent == "opencode" else {})
        return forgotten and not self.app.warm_pool.chats.store.records(talk.chat)

    # -- what is told

    def _report(self) -> AgentsReport:
        turns = sum(len(talk.answers) for talk in self.talks)
        asked = [ask for talk in self.talks for answer in talk.answers for ask in answer["permissions"]]
        return AgentsReport(
            chats=len(self.talks),
            turns=turns + len(self.failures),
            failed=len(self.failures),
            astray=sum(not talk.at_home for talk in self.talks),
            forgotten=turns - sum(talk.remembered for talk in self.talks),
            refused=sum(ask["answer"] != "allow" for ask in asked),
            cold_ms_p50=self._medians(lambda talk: [] if talk.started_server else talk.times[:1]),
            server_start_ms_p50=_median([talk.times[0] for talk in self.talks if talk.started_server and talk.times]),
            warm_ms_p50=self._medians(lambda talk: talk.warm_ms),
            evicted=self.evicted,
            evicted_resumed=self.evicted_resumed,
            killed=self.killed,
            killed_chats=len(self.moved),
            killed_agents=self.killed_agents,
            gone_s=round(self.gone_s, 2),
            killed_resumed=self.killed_resumed,
            continued_s=round(self.continued_s, 2),
            closed=self.closed,
        )

    def _medians(self, times: Callable[[Talk], Collection[float]]) -> dict[str, float]:
        found = {agent: [ms for talk in self.talks if talk.agent == agent for ms in times(talk)] for agent in PLACES}
        return {agent: _median(ms) for agent, ms in found.items() if ms}


def _median(values: Collection[float]) -> float:
    return round(statistics.median(values), 1) if values else 0.0
