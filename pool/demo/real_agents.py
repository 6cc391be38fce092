"""Real agents that need no network: how codex-acp and opencode are found, configured for a `FakeLlm`, and counted."""

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pool.backends.shell import MARK

__all__ = ["AgentProcess", "CodexHome", "OpencodeHome", "agent_processes", "find_binary"]

BINARIES = ("codex-acp", "opencode")

_KEY = "FAKE_LLM_KEY"
_ASK: Mapping[str, str] = {"bash": "ask", "edit": "ask"}


def find_binary(name: str) -> Path | None:
    """Where *name* (``codex-acp``, ``opencode``) is installed below ``POOL_AGENTS_DIR``, a folder with node_modules.

    Its default is ``.pool/agents`` in the checkout.
    """
    folder = Path(os.environ.get("POOL_AGENTS_DIR") or Path(__file__).parents[2] / ".pool" / "agents").absolute()
    return next(
        (path for depth in ("*", "@*/*") for path in sorted(folder.glob(f"node_modules/{depth}/bin/{name}"))), None
    )


class CodexHome:
    """codex-acp with everything it keeps in *folder*: run *command* with *env* added to the environment.

    It asks for permission before each command that may change something, and runs it without a sandbox.
    """

    def __init__(self, folder: Path, llm_url: str, api_key: str = "fake") -> None:
        self.folder = folder.absolute()
        self.command = [_binary("codex-acp")]
        self.env = {"HOME": str(self.folder), "CODEX_HOME": str(self.folder), _KEY: api_key}
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.toml").write_text(
            'model = "gpt-5.5"\n'
            'model_provider = "fake"\n'
            'approval_policy = "untrusted"\n'
            'sandbox_mode = "danger-full-access"\n'
            "[model_providers.fake]\n"
            'name = "fake"\n'
            f"base_url = {json.dumps(llm_url + '/v1')}\n"
            'wire_api = "responses"\n'
            f"env_key = {json.dumps(_KEY)}\n",
            encoding="utf-8",
        )


class OpencodeHome:
    """opencode with everything it keeps in *folder*: run a command with *env* added to the environment.

    *acp_command* speaks ACP. *serve_command* is an HTTP server on 127.0.0.1; a port is still to be added
    (``--port N``). *permission* is opencode's own setting; by default it asks before each command and edit.
    *env* holds no password for the server.
    """

    def __init__(self, folder: Path, llm_url: str, api_key: str = "fake", permission: Mapping[str, str] = _ASK) -> None:
        self.folder = folder.absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        binary = _binary("opencode")
        self.acp_command = [binary, "acp"]
        self.serve_command = [binary, "serve", "--hostname", "127.0.0.1"]
        homes = {f"XDG_{kind}_HOME": str(self.folder / kind.lower()) for kind in ("DATA", "CONFIG", "STATE", "CACHE")}
        self.env = {
            "HOME": str(self.folder),
            **homes,
            "OPENCODE_CONFIG_CONTENT": json.dumps(_opencode_config(llm_url, api_key, permission)),
            "OPENCODE_DISABLE_MODELS_FETCH": "1",
            "OPENCODE_DISABLE_AUTOUPDATE": "1",
            "OPENCODE_DISABLE_LSP_DOWNLOAD": "1",
            "OPENCODE_DISABLE_DEFAULT_PLUGINS": "1",
            "npm_config_offline": "true",
        }


def _opencode_config(llm_url: str, api_key: str, permission: Mapping[str, str]) -> dict[str, Any]:
    return {
        "model": "fake/fake",
        "small_model": "fake/fake",
        "enabled_providers": ["fake"],
        "share": "disabled",
        "autoupdate": False,
        "lsp": False,
        "formatter": False,
        "snapshot": False,
        "permission": dict(permission),
        "provider": {
            "fake": {
                "npm": "@ai-sdk/openai-compatible",
                "options": {"baseURL": f"{llm_url}/v1", "apiKey": api_key},
                "models": {"fake": {"tool_call": True, "limit": {"context": 100_000, "output": 10_000}}},
            }
        },
    }


@dataclass(frozen=True)
class AgentProcess:
    """A process that a worker has started for an agent, or that such a process has started."""

    pid: int
    program: str
    """Name of the file that runs: one of `BINARIES`, or the shell around it, or a command of the agent."""
    worker: int
    """Process id of the worker."""
    folder: str
    """Where it works, symlinks resolved."""

    @property
    def is_agent(self) -> bool:
        return self.program in BINARIES


def agent_processes(workers: Collection[int]) -> list[AgentProcess]:
    """Return what runs on this machine for agents of these worker processes, dead or alive; by the mark it carries."""
    import psutil

    found = []
    for process in psutil.process_iter():
        try:
            mark = process.environ().get(MARK, "").split(".")
            if len(mark) == 4 and int(mark[1]) in workers and process.status() != psutil.STATUS_ZOMBIE:
                program = os.path.basename(process.exe())
                found.append(AgentProcess(process.pid, program, int(mark[1]), process.cwd()))
        except (psutil.Error, OSError):  # another user's, or just gone
            continue
    return found


def _binary(name: str) -> str:
    found = find_binary(name)
    if found is None:
        raise FileNotFoundError(f"no node_modules/**/bin/{name} in POOL_AGENTS_DIR")
    return str(found)
