"""One of each kind of agent, for one chat with a home of its own, under one interface."""

import importlib.util
import os
import shutil
import stat
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import psutil

from pool.backends.acp import AcpBackend
from pool.backends.agent import AgentBackend
from pool.chats import Chat
from pool.demo.llm import FakeLlm
from pool.loopback_sshd import SshdInfo
from pool.manager import BackendPoolManager
from pool.runtime import loop_thread
from tests.support import faulty_agent
from tests.support.real_agents import codex_home, opencode_home
from tests.support.rigs import ssh_backend
from tests.support.services import require_service

CHAT = "c1"
_MARK = "POOL_TEST_RIG"


class AgentRig:
    """Makes backends of one kind for the chat `CHAT`, all over one home, and destroys them at the end.

    ``root`` is the folder that the agent works in. Prompts that every kind knows: ``!slow SECONDS WORDS`` says the
    words within that time, ``!tool COMMAND`` runs a shell command, for which it asks for leave; anything else is
    answered by ``turn N: <text>; earlier: [<text>, ...]``.
    """

    cannot: frozenset[str] = frozenset()
    """What the kind lacks: ``say`` - it does not say a word of a slow answer before its end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = folder / "root"
        self._id = uuid.uuid4().hex
        self._backends: list[AgentBackend] = []

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        for backend in self._backends:
            backend.destroy()

    @property
    def env(self) -> dict[str, str]:
        """Added to the agent's environment; marks its processes as ours."""
        return {_MARK: self._id}

    def make(self, **config: Any) -> AgentBackend:
        """Return a backend that is not connected."""
        raise NotImplementedError

    def backend(self, **config: Any) -> AgentBackend:
        """Return a new backend, connected: a new process."""
        backend = self.make(**config)
        self._backends.append(backend)
        loop_thread().run(backend.connect())
        return backend

    def ready(self, session_id: str = "", **config: Any) -> AgentBackend:
        """Return a new backend with a session."""
        backend = self.backend(**config)
        backend.ensure_session(self.chat(session_id))
        return backend

    def chat(self, session_id: str = "") -> Chat:
        """The record of the chat."""
        return Chat(CHAT, "agent", session_id=session_id)

    def processes(self) -> list[int]:
        """Ids of all processes of its agents that run, wherever they are on this machine."""
        return [process.pid for process in psutil.process_iter() if _env(process).get(_MARK) == self._id]


class EchoRig(AgentRig):
    """Our own agent on the worker, with *flags*."""

    flags: Sequence[str] = ("--load",)

    @property
    def store(self) -> Path:
        """Where it keeps its sessions, and the ids of what it forked."""
        return self.folder / "store"

    def __enter__(self) -> Self:
        super().__enter__()
        self.store.mkdir(exist_ok=True)
        return self

    def command(self, flags: Sequence[str]) -> list[str]:
        """The agent's command line."""
        return [sys.executable, "-P", faulty_agent.__file__, "--store", str(self.store), *flags]

    def config(self, flags: Sequence[str] | None = None, **config: Any) -> dict[str, Any]:
        """What its `AcpBackend` gets."""
        command = self.command(self.flags if flags is None else flags)
        return {"command": command, "chat": CHAT, **config, "env": {**self.env, **config.get("env", {})}}

    def make(self, **config: Any) -> AgentBackend:
        return AcpBackend(**self.config(**{"root_dir": str(self.root), **config}))

    def forked(self) -> list[int]:
        """Ids of the processes that it has forked, as far as they have begun."""
        file = self.store / "pids"
        return [int(line) for line in file.read_text().split()] if file.exists() else []

    def started(self) -> list[int]:
        """Ids of the agent's processes that were ever started."""
        file = self.store / "started"
        return [int(line) for line in file.read_text().split()] if file.exists() else []


class HostRig(EchoRig):
    """Our own agent on a build host, over the connection of a pool."""

    def __init__(self, info: SshdInfo) -> None:
        super().__init__(info.home / f"agents-{uuid.uuid4().hex}")
        self._info = info
        self._borrowed: list[Any] = []
        self._python = _python_for(info)
        self.pool: BackendPoolManager[Any] = BackendPoolManager(
            lambda make, **config: make(**config), config_for=self._config_for, enable_periodic_cleanup=False
        )

    def __enter__(self) -> Self:
        super().__enter__()
        self.root.mkdir()
        shutil.copy(faulty_agent.__file__, self.folder / "agent.py")  # the checkout may be readable by us alone
        owner = self._info.home.stat()
        for path in (self.folder, *self.folder.iterdir()):
            path.chmod(0o755)
            os.chown(path, owner.st_uid, owner.st_gid)
        return self

    def __exit__(self, *_: object) -> None:
        for borrowed in self._borrowed:
            borrowed.release()
        self.pool.dispose()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _config_for(self, primary: str, agent: str) -> Mapping[str, Any]:
        if agent == "default":
            return {"make": lambda: ssh_backend(self._info, root_dir=str(self.root))}
        return {"make": AcpBackend, **self.config(), "where": "host"}

    def command(self, flags: Sequence[str]) -> list[str]:
        return [self._python, "-P", str(self.folder / "agent.py"), "--store", str(self.store), *flags]

    @property
    def env(self) -> dict[str, str]:
        spec = importlib.util.find_spec("acp")
        assert spec is not None
        assert spec.origin is not None
        return {**super().env, "PYTHONPATH": str(Path(spec.origin).parents[1]), "PYTHONDONTWRITEBYTECODE": "1"}

    def backend(self, **config: Any) -> AgentBackend:
        name = f"agent{len(self._borrowed)}"  # to the pool each is an agent of its own
        self._borrowed.append(self.pool.acquire_backend(CHAT, name, self.config(**config) if config else None))
        backend: AgentBackend = self._borrowed[-1].backend
        return backend


class _LlmRig(AgentRig):
    """A real agent that asks a `FakeLlm`."""

    def __enter__(self) -> Self:
        super().__enter__()
        self._llm = FakeLlm().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__()
        self._llm.__exit__(*error)

    def home(self, url: str) -> tuple[list[str], Mapping[str, str]]:
        """Set its home up; returns its command and environment."""
        raise NotImplementedError

    def make(self, **config: Any) -> AgentBackend:
        command, env = self.home(self._llm.url)
        env = {**env, **self.env, **config.pop("env", {})}
        return AcpBackend(command, **{"chat": CHAT, "root_dir": str(self.root), "env": env, **config})


class CodexRig(_LlmRig):
    """codex-acp."""

    cannot = frozenset({"say"})

    def home(self, url: str) -> tuple[list[str], Mapping[str, str]]:
        home = codex_home(self.folder / "home", url)
        return home.command, home.env


class OpencodeRig(_LlmRig):
    """``opencode acp``."""

    cannot = frozenset({"say"})

    def home(self, url: str) -> tuple[list[str], Mapping[str, str]]:
        home = opencode_home(self.folder / "home", url)
        return home.acp_command, home.env


def _env(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ() if process.status() != psutil.STATUS_ZOMBIE else {}
    except (psutil.Error, OSError):
        return {}


def _python_for(info: SshdInfo) -> str:
    """Return a Python with our version that the account of a server can run; ours may be in a private folder."""
    system = f"/usr/bin/python{sys.version_info[0]}.{sys.version_info[1]}"
    mine = info.home.stat().st_uid == os.geteuid()
    found = sys.executable if mine or _open_to_all(sys.executable) else system if _open_to_all(system) else None
    require_service("a Python that the account of sshd can run", found)
    return str(found)


def _open_to_all(program: str) -> bool:
    path = Path(program).resolve()
    return path.exists() and all(folder.stat().st_mode & stat.S_IXOTH for folder in (path, *path.parents))
