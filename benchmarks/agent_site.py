"""What the tables of agents share: nodes with agents in their hosts file, an LLM in a process of its own, turns."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.harness import REPOSITORY, Worker, broker, scratch

ECHO_AGENT = Path(__file__).with_name("echo_agent.py")
TURN_TIMEOUT = 120.0  # seconds

_LLM = """
import sys
from pool.demo.llm import FakeLlm
with FakeLlm() as llm:
    print(llm.url, flush=True)
    sys.stdin.read()
"""


class AgentSite:
    """A broker, a hosts file and the nodes on them. ``store``: the folder of the echo agents."""

    def __init__(self, folder: Path, url: str, stack: ExitStack) -> None:
        self.folder = folder
        self.store = folder / "store"
        self.store.mkdir()
        self._stack = stack
        self._hosts = folder / "hosts.toml"
        self._hosts.write_text(f'[default]\nbackend = "local"\nroot_dir = "{folder}/work/{{key}}"\n')
        self.env = {
            "POOL_BROKER_URL": url,
            "POOL_REDIS_URL": url,
            "POOL_RESULT_URL": url,
            "POOL_DATA_DIR": str(folder / "data"),
            "POOL_HOSTS_FILE": str(self._hosts),
        }

    def write_hosts(self, text: str) -> None:
        """Use this hosts file; before any agent is added."""
        self._hosts.write_text(text)

    def add_agent(self, name: str, kind: str, command: Sequence[str], env: Mapping[str, str], **fields: str) -> None:
        """Add an agent to the hosts file."""
        fields.setdefault("root_dir", f"{self.folder}/chats/{name}-{{key}}")
        if fields.get("where") == "host":
            del fields["root_dir"]
        lines = [f"[agents.{name}]", f'kind = "{kind}"', f"command = {json.dumps(list(command))}"]
        lines += [f"{field} = {json.dumps(value)}" for field, value in fields.items()]
        lines += [f"[agents.{name}.env]", *(f"{key} = {json.dumps(value)}" for key, value in env.items())]
        with self._hosts.open("a") as file:
            file.write("\n".join(["", *lines, ""]))

    def echo_command(self, *options: str) -> list[str]:
        return [sys.executable, "-I", str(ECHO_AGENT), str(self.store), *options]

    def node(self, name: str, shards: str = "0-63", **env: str) -> Worker:
        """Start a node that has these shards for good; it logs to ``NAME.log``."""
        log = self.folder / f"{name}.log"
        env = {**self.env, "POOL_NODE_SHARDS": shards, **env}
        return self._stack.enter_context(Worker("benchmarks.build_app", name, env, log=log))

    @property
    def app(self) -> Any:
        """The app as a producer sees it."""
        os.environ.update(self.env)  # every table has a process of its own
        import tasks.turns  # noqa: F401 - a shared task: every app knows it
        from benchmarks.build_app import app

        return app

    def send(self, chat: str, agent: str, prompt: str) -> Any:
        """Send a turn; return its result to come."""
        return self.app.tasks["tasks.turns.run_turn"].delay(chat, agent, prompt)

    def turn(self, chat: str, agent: str, prompt: str) -> dict[str, Any]:
        result: dict[str, Any] = self.send(chat, agent, prompt).get(timeout=TURN_TIMEOUT)
        return result


@contextmanager
def agent_site() -> Iterator[AgentSite]:
    """A site without agents and nodes, on a Valkey of its own."""
    with scratch() as folder, broker(folder) as url, ExitStack() as stack:
        yield AgentSite(folder, url, stack)


@contextmanager
def fake_llm() -> Iterator[str]:
    """The URL of a `pool.demo.llm.FakeLlm` in a process of its own."""
    command = [sys.executable, "-c", _LLM]
    with subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()  # at the end its stdin is closed
