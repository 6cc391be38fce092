"""The chats of ``--agents``: what was said in them, what the answers prove, and what is told of it all in the end."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.table import Table

TOOL = "!tool pwd | tee where"
"""Has the agent run a command, for which it must ask."""

WARM = ("hello", "hello again")
"""What is said to an agent that is warm, as its third and fourth turn."""

PLACES: Mapping[str, str] = {"codex": "worker", "codex-host": "host", "opencode": "server"}
"""Name of an agent in the hosts file -> where it runs: on the worker, the chat's build host, the node's server."""


@dataclass
class Talk:
    """One chat with one agent."""

    chat: str
    agent: str
    node: str
    """Where its shard is; after a turn, where that was answered."""
    folder: str
    """Where its agent works, symlinks resolved."""
    nodes: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    """Milliseconds of each turn, from delay() to get()."""
    started_server: bool = False
    """The first turn had to start the node's server."""
    remembered: int = 0
    """Turns whose answers show all that was said before."""
    at_home: bool = True
    """Whether it was the one process with its agent that answered, each time somebody looked."""

    @property
    def program(self) -> str:
        return "opencode" if self.agent == "opencode" else "codex-acp"

    @property
    def resumed(self) -> int:
        """How often its session was brought back."""
        return sum(answer["resumed"] for answer in self.answers)

    @property
    def warm_ms(self) -> list[float]:
        return self.times[2 : 2 + len(WARM)]

    def take(self, text: str, answer: dict[str, Any], ms: float) -> None:
        """Note the answer to *text*, and what it proves."""
        if text == TOOL:
            expected = f"tool said: {self.folder}"  # which proves where it works
        else:
            expected = f"turn {len(self.said) + 1}: {text}; earlier: [{', '.join(self.said)}]"
        one_session = not self.answers or answer["session_id"] == self.answers[0]["session_id"]
        self.remembered += answer["text"].strip() == expected and one_session and not answer["memory_lost"]
        self.said.append(text)
        self.answers.append(answer)
        self.times.append(ms)
        self.node = answer["node"].partition("@")[0]
        self.nodes.append(self.node)


@dataclass(frozen=True)
class AgentsReport:
    """The JSON of ``--agents --json``. Medians by name of the agent in the hosts file."""

    chats: int
    turns: int
    failed: int
    astray: int
    """Chats that were answered by another process than the one that has their agent."""
    forgotten: int
    """Turns whose answers do not show everything that was said before."""
    refused: int
    """Commands that agents asked for and were not allowed: the hosts file allows all."""
    cold_ms_p50: dict[str, float]
    server_start_ms_p50: float
    """A first turn that had to start a node's server; those are not among the cold ones."""
    warm_ms_p50: dict[str, float]
    evicted: int
    """Agent processes that ran until then, and that sweeps have ended."""
    evicted_resumed: int
    """Chats that went on in their session afterwards: all are to."""
    killed: str
    killed_chats: int
    killed_agents: int
    """Agent processes that the killed node had."""
    gone_s: float
    """From the kill until nothing was left of them."""
    killed_resumed: int
    """Chats of the killed node that went on at the other one, in their session: all are to."""
    continued_s: float
    """From the kill until they had."""
    closed: int
    """Chats that were closed and have left no record and no session: all are to."""

    @property
    def ok(self) -> bool:
        """Whether the demo shows what it promises."""
        return (
            not (self.failed or self.astray or self.forgotten or self.refused)
            and self.evicted_resumed == self.closed == self.chats > 0
            and self.killed_resumed == self.killed_chats > 0
            and self.killed_agents > 0 < self.evicted
        )


def table_of(talks: Sequence[Talk]) -> Table:
    """Return a row for each chat; narrow enough for 80 columns."""
    table = Table(
        title="Chats with real agents", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False
    )
    for column in ("chat", "agent", "where", "node"):
        table.add_column(column)
    for column in ("turns", "cold ms", "warm ms", "resumed", "remembered"):
        table.add_column(column, justify="right")
    for talk in talks:
        table.add_row(
            talk.chat,
            talk.program.removesuffix("-acp"),
            PLACES[talk.agent],
            " -> ".join(dict.fromkeys(node.removeprefix("node-") for node in talk.nodes)),
            str(len(talk.answers)),
            f"{'*' if talk.started_server else ''}{talk.times[0]:.0f}" if talk.times else "",
            f"{statistics.median(talk.warm_ms):.0f}" if talk.warm_ms else "",
            f"{talk.resumed}x",
            f"{talk.remembered} of {len(talk.answers)}",
        )
    return table


def verdict_of(report: AgentsReport, idle_timeout: float) -> list[str]:
    """Say what the numbers mean, a sentence each."""
    names = {"codex": "codex on the worker", "codex-host": "codex at the build host", "opencode": "opencode"}
    times = [
        f"{names[agent]} {report.cold_ms_p50[agent]:.0f} and {warm:.0f} ms"
        for agent, warm in report.warm_ms_p50.items()
        if agent in report.cold_ms_p50
    ]
    done = report.turns - report.failed
    return [
        f"* This turn started its node's opencode server; p50: {report.server_start_ms_p50:.0f} ms.",
        f"From delay() to get(), cold and warm, p50: {', '.join(times)}.",
        (
            f"{done} of {report.turns} turns succeeded; {done - report.forgotten} of their answers prove that the agent"
            " remembers all of its chat."
        ),
        (
            f"{report.chats - report.astray} of {report.chats} chats were answered by the one process that has their"
            " agent."
        ),
        (
            f"After {idle_timeout:g} s of silence the sweep ended all {report.evicted} agent processes;"
            f" {report.evicted_resumed} of {report.chats} chats went on in their session."
        ),
        (
            f"kill -9 of {report.killed}: nothing was left of its {report.killed_agents} agent processes after"
            f" {report.gone_s:.1f} s; {report.killed_resumed} of its {report.killed_chats} chats had gone on at the"
            f" other node, in their session, after {report.continued_s:.1f} s."
        ),
        f"{report.closed} of {report.chats} chats were closed; no record, session or agent process of them is left.",
    ]
