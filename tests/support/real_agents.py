"""The real agents, for tests that need them: skipped, or failed in CI, where they are not installed."""

from pathlib import Path
from typing import Any

from pool.demo.real_agents import BINARIES, CodexHome, OpencodeHome, find_binary
from tests.support.services import require_service


def require_agents() -> None:
    for name in BINARIES:
        require_service(name, find_binary(name))


def codex_home(folder: Path, llm_url: str, **options: Any) -> CodexHome:
    require_service("codex-acp", find_binary("codex-acp"))
    return CodexHome(folder, llm_url, **options)


def opencode_home(folder: Path, llm_url: str, **options: Any) -> OpencodeHome:
    require_service("opencode", find_binary("opencode"))
    return OpencodeHome(folder, llm_url, **options)
