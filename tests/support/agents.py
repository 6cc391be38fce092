"""A coding agent that a test holds, fails and counts, and the chats of a process that has nothing else."""

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

from pool import agents as tables
from pool.agents import GROUP, Agents
from pool.backends.agent import AgentBackend
from pool.backends.memory import MemoryBackend
from pool.backends.turn import Collector, Session
from pool.chats import Chat
from pool.config import GroupLimit, PoolConfig
from pool.hosts import Hosts
from pool.manager import BackendPoolManager
from pool.worker.chats import Chats
from tests.support.chat_store import FakeChats
from tests.support.fakes import Gate


class AgentFarm:
    """Where `FakeAgent`s come from: ``kind`` is their class. ``diary`` is what they did, in order.

    ``opens``, ``prompts`` and ``cancels`` are gates. An exception under a name in ``errors`` (``open``, ``session``,
    ``prompt``, ``cancel``, ``close_session``, ``forget``, ``abandon``) is raised by each such call, after its gate.
    """

    def __init__(self) -> None:
        self.kind: type[FakeAgent] = type("FakeAgent", (FakeAgent,), {"farm": self})
        self.made: list[FakeAgent] = []
        self.diary: list[tuple[str, ...]] = []
        self.opens, self.prompts, self.cancels = Gate(), Gate(), Gate()
        self.errors: dict[str, BaseException] = {}
        self.obeys = True
        self.misses = 0  # cancels that are not heard
        """Whether a turn ends when it is cancelled."""
        self.says: list[str] = []
        self.kept: set[str] = set()
        """Sessions that an agent can bring back."""
        self.version = ""
        self.worktree = ""
        self.borrows_in_forget = False
        self._number = 0

    def new_session(self) -> str:
        """The id of another session, which is kept."""
        self._number += 1
        self.kept.add(f"s{self._number}")
        return f"s{self._number}"

    def write(self, what: str, *about: str) -> None:
        """Note what was done; raise what a test wants raised."""
        self.diary.append((what, *about))
        if what in self.errors:
            raise self.errors[what]

    @property
    def prompted(self) -> list[str]:
        """All prompts that agents have heard."""
        return [entry[2] for entry in self.diary if entry[0] == "prompt"]

    def did(self, *whats: str) -> list[str]:
        """Which of these things were done, in order."""
        return [entry[0] for entry in self.diary if entry[0] in whats]


class FakeAgent(AgentBackend):
    """See `AgentFarm`."""

    kind = "fake-agent"
    farm: AgentFarm

    def __init__(self, *, chat: str = "", root_dir: str = "", cancel_timeout: float = 5.0) -> None:
        super().__init__(cancel_timeout=cancel_timeout)
        self.chat = chat
        self.root_dir = root_dir
        self.session_id = ""
        self.abandoned = False
        self.gone = False
        self.cancelled = False
        self.working = 0
        self.farm.made.append(self)

    async def open(self) -> None:
        await self.farm.opens.passed()
        self.farm.write("open", self.chat)

    async def close(self) -> None:
        self.gone = True
        self.farm.write("close", self.chat)

    async def _ensure_session(self, chat: Chat) -> Session:
        self.farm.write("session", chat.chat, chat.session_id)
        extras = {"version": self.farm.version, "worktree": self.farm.worktree}
        if chat.session_id and chat.session_id == self.session_id:
            return Session(self.session_id, **extras)
        resumed = chat.session_id in self.farm.kept
        self.session_id = chat.session_id if resumed else self.farm.new_session()
        return Session(self.session_id, resumed, bool(chat.session_id) and not resumed, **extras)

    async def _prompt(self, text: str, collector: Collector) -> str:
        self.cancelled = False
        self.working += 1
        try:
            self.farm.diary.append(("prompt", self.chat, text))
            for words in self.farm.says:
                collector.say(words)
            while not (self.farm.prompts.is_open or (self.cancelled and self.farm.obeys) or self.gone):
                await asyncio.sleep(0.001)
        finally:
            self.working -= 1
        if "prompt" in self.farm.errors:
            raise self.farm.errors["prompt"]
        if self.gone:
            raise ConnectionError("gone")
        return "cancelled" if self.cancelled and self.farm.obeys else "end_turn"

    async def _cancel(self) -> None:
        self.farm.write("cancel", self.chat)
        await self.farm.cancels.passed()
        self.cancelled = len(self.farm.did("cancel")) > self.farm.misses

    async def _close_session(self, chat: Chat) -> None:
        self.farm.write("close_session", chat.chat, chat.session_id)
        self.farm.kept.discard(chat.session_id)

    async def _forget(self, chat: Chat) -> dict[str, Any]:
        self.farm.write("forget", chat.chat, chat.agent)
        if self.farm.borrows_in_forget:
            (await self.pool.aacquire_backend(chat.chat)).release()
        self.farm.kept.discard(chat.session_id)
        return {"session": "deleted"}

    async def _abandon(self) -> None:
        self.abandoned = True
        self.farm.write("abandon", self.chat)


class DiaryChats(FakeChats):
    """Writes down, in a farm's diary, what it was asked to write."""

    def __init__(self, farm: AgentFarm) -> None:
        super().__init__(leased=True)
        self.farm = farm

    def begin(self, chat, agent, epoch, turn):
        self.farm.diary.append(("begin", chat, agent))
        return super().begin(chat, agent, epoch, turn)

    def save(self, chat, epoch):
        self.farm.diary.append(("save", chat.chat, chat.session_id))
        return super().save(chat, epoch)

    def finish(self, chat, agent, epoch, turn):
        self.farm.diary.append(("finish", chat, agent))
        super().finish(chat, agent, epoch, turn)

    def mark_closing(self, chat, epoch):
        self.farm.diary.append(("mark_closing", chat))
        return super().mark_closing(chat, epoch)

    def delete(self, chat, agent, epoch):
        self.farm.diary.append(("delete", chat, agent))
        super().delete(chat, agent, epoch)


class Office:
    """The `Chats` of one process, with a pool of `FakeAgent`s and memory backends, over a `DiaryChats`."""

    def __init__(self, monkeypatch: Any, names: tuple[str, ...] = ("fake",), places: int = 20) -> None:
        self.farm = AgentFarm()
        self.store = DiaryChats(self.farm)
        self.stores_made = 0
        self.epochs: dict[str, int] = {}
        monkeypatch.setattr(tables, "_KINDS", {"fake-agent": (self.farm.kind, None, "json")})
        self.agents = Agents({name: {"kind": "fake-agent", "root_dir": "/srv/{key}"} for name in names}, "hosts.toml")
        hosts = Hosts({"backend": "memory"}, agents=self.agents)
        settings = PoolConfig(acquire_timeout=5, groups={GROUP: GroupLimit(places)})
        self.pool: BackendPoolManager[Any] = BackendPoolManager(
            lambda backend, **config: self.farm.kind(**config) if backend == "fake-agent" else MemoryBackend(**config),
            config_for=hosts.config_for,
            group_for=self.agents.group_for,
            settings=settings,
            enable_periodic_cleanup=False,
        )
        self.chats = Chats(self.agents, lambda key: self.epochs.get(key, 1), self._make_store)

    def _make_store(self) -> FakeChats:
        self.stores_made += 1
        return self.store

    def task(self, key: str = "c1", turn: str = "t1") -> Any:
        """What `Chats` needs of a running task."""

        def acquire_backend(agent: str) -> Any:
            return self.pool.acquire_backend(key, agent)

        request = SimpleNamespace(id=turn)
        return SimpleNamespace(pool_key=key, request=request, pool=self.pool, acquire_backend=acquire_backend)

    def turn(self, key: str = "c1", turn: str = "t1", *, agent: str = "fake", timeout: float = 5.0) -> Any:
        """A turn of a chat, to enter."""
        return self.chats.turn(self.task(key, turn), agent, timeout)

    def run(self, key: str = "c1", turn: str = "t1", text: str = "do it", **options: Any) -> Any:
        """A whole turn; returns its `ChatTurn`."""
        with self.turn(key, turn, **options) as chat:
            chat.prompt(text)
        return chat

    def close(self, key: str = "c1", timeout: float = 5.0) -> dict[str, Any]:
        """Close a chat."""
        return self.chats.close(key, self.pool, timeout)


class Aside:
    """A call in a thread of its own: ``result()`` waits for it and returns, or raises, what it did."""

    def __init__(self, call: Any) -> None:
        self._outcome: tuple[bool, Any] | None = None
        self._call = call
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._outcome = True, self._call()
        except BaseException as error:
            self._outcome = False, error

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self._outcome is not None

    def result(self, timeout: float = 10.0) -> Any:
        """What it returned."""
        self._thread.join(timeout)
        assert self._outcome is not None, f"still running after {timeout} s"
        fine, value = self._outcome
        if not fine:
            raise value
        return value
