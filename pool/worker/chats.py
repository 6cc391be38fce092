"""The chats of this process: turns of agents under their durable records, and how chats are closed.

A turn follows one path: the record says which session (`begin`), the pool has the warm agent or starts one, the agent
has that session or brings it back (`ensure_session`), and what is new is written down (`save`) before it is prompted.
"""

import importlib
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from time import monotonic
from typing import Any

from pool.agents import Agents
from pool.backends.agent import AgentBackend
from pool.backends.leftovers import sweep_leftovers
from pool.backends.turn import OnUpdate, Session, Turn
from pool.borrowing import Borrowed
from pool.chats import Begun, Chat, ChatStore
from pool.errors import AcquireTimeout, BackendClosed, BackendUnavailable, ConfigError, NotOwner, PoolError
from pool.interrupt import check_interrupt, interruptible
from pool.manager import BackendPoolManager
from pool.runtime import fork_count
from pool.sharding.hashing import shard_of
from pool.worker.cancelling import CancelWatch

logger = logging.getLogger(__name__)

_MOST_IDLE = 1000
"""Chats that one pass looks at: more than ever stay because their close fails each time."""


class ChatTurn:
    """A chat's agent in use by one task: made by ``with self.chat(agent) as chat``."""

    def __init__(self, turn: str, begun: Begun, borrowed: Borrowed[Any], session: Session, watch: CancelWatch) -> None:
        self.id = turn
        self.session = session
        self.warm = borrowed.warm and not session.resumed and session.session_id == begun.chat.session_id
        """The agent ran, and had the session."""
        self.repeated = begun.repeated
        """An earlier attempt of this very task had begun: the agent may have seen the prompt before."""
        self.backend: AgentBackend = borrowed.backend
        self.prompted = False
        self._watch = watch

    def prompt(self, text: str, on_update: OnUpdate | None = None, timeout: float | None = None) -> Turn:
        """Have the agent work on *text*; see `AgentBackend.prompt`. `cancel_turn` ends it."""
        with self._watch.watching(self.id, self.backend):
            self.prompted = True
            return self.backend.prompt(text, on_update, timeout)


class _OfProcess:
    """What each process has of its own: connections are not for a forked child, nor are locks that may be held."""

    def __init__(self) -> None:
        self.making = threading.Lock()
        self.store: ChatStore | None = None
        self.watch: CancelWatch | None = None
        self.busy: set[str] = set()  # chats with a turn, or a close, under way
        self.free = threading.Condition()

    def notify(self) -> None:
        """Have those look again who wait for a chat."""
        with self.free:
            self.free.notify_all()


class Chats:
    """Made by `WarmPool`. *store* makes the records' store, once in each process that needs it."""

    def __init__(self, agents: Agents, epoch_of: Callable[[str], int], store: Callable[[], ChatStore]) -> None:
        self.agents = agents
        self._epoch_of = epoch_of
        self._make_store = store
        self._of_process: dict[int, _OfProcess] = {}

    @property
    def _here(self) -> "_OfProcess":
        number = fork_count()
        return self._of_process.get(number) or self._of_process.setdefault(number, _OfProcess())

    @property
    def store(self) -> ChatStore:
        """The records. Raises `ConfigError` where none can be kept."""
        here = self._here
        with here.making:
            if here.store is None:
                here.store = self._make_store()
            return here.store

    @property
    def watch(self) -> CancelWatch:
        """Looks for turns that are to be cancelled."""
        store, here = self.store, self._here
        with here.making:
            if here.watch is None:
                here.watch = CancelWatch(store.cancelled)
            return here.watch

    def prepare(self) -> None:
        """In the process that has the pool: end what a killed one left on this machine, load what agents need."""

        def work() -> None:
            try:
                sweep_leftovers()
                if self.agents.speak_acp:
                    importlib.import_module("pool.backends.acp_client")
            except Exception:  # the node works without
                logger.exception("preparing for agents failed")

        if self.agents:
            requests = logging.getLogger("httpx")  # tells of each one to an agent's server, some ten in a turn
            if requests.level == logging.NOTSET:
                requests.setLevel(logging.WARNING)
            threading.Thread(target=work, name="pool-agents-prepare", daemon=True).start()

    # -- turns

    @contextmanager
    def turn(self, task: Any, agent: str, timeout: float) -> Iterator[ChatTurn]:
        """Borrow the agent of the task's chat, with its session ready. *timeout*: seconds for another turn to end."""
        key, turn = task.pool_key, str(task.request.id)
        self.agents.check(agent)
        self.agents.config_for(key, agent)  # raises for a chat that cannot have it, before anything is written
        with self.exclusive(key, timeout):
            begun = self._begin(key, agent, turn, task.pool)
            chat: ChatTurn | None = None
            try:
                with task.acquire_backend(agent) as borrowed:
                    session = borrowed.backend.ensure_session(begun.chat)
                    self._save(begun.chat, session)
                    yield (chat := ChatTurn(turn, begun, borrowed, session, self.watch))
            except BaseException as error:
                # A message that goes back runs again. If the agent may have heard its prompt, the record goes on to
                # name it. What is no Exception is the end of the process, at a cold shutdown of a solo pool.
                again = isinstance(error, BackendUnavailable | BackendClosed) or not isinstance(error, Exception)
                if chat is None or not chat.prompted or not again:
                    self._finish(key, agent, turn)
                raise
            self._finish(key, agent, turn)

    def _begin(self, key: str, agent: str, turn: str, pool: BackendPoolManager[Any]) -> Begun:
        begun = self.store.begin(key, agent, self._epoch_of(key), turn)
        if begun.chat.state == "open":
            return begun
        self._close(key, pool)  # a close was interrupted: what comes after it is a new chat
        return self.store.begin(key, agent, self._epoch_of(key), turn)

    def _save(self, chat: Chat, session: Session) -> None:
        changed = replace(
            chat,
            session_id=session.session_id,
            worktree=session.worktree,
            branch=session.branch,
            version=session.version or chat.version,
        )
        if changed != chat:
            self.store.save(changed, self._epoch_of(chat.chat))

    def _finish(self, key: str, agent: str, turn: str) -> None:
        """Note the end of a turn; what became of it matters more than whether that could be noted."""
        try:
            self.store.finish(key, agent, self._epoch_of(key), turn)
        except PoolError as error:
            logger.info("the end of a turn of chat %r was not written down: %s", key, error)

    @contextmanager
    def exclusive(self, key: str, timeout: float) -> Iterator[None]:
        """One turn, or one close, of a chat at a time. Raises `AcquireTimeout` after *timeout* seconds."""
        deadline = monotonic() + timeout
        here = self._here
        with interruptible(here.notify), here.free:
            while key in here.busy:
                check_interrupt()  # before each wait: what is set from here on notifies
                left = min(max(0.0, deadline - monotonic()), threading.TIMEOUT_MAX)
                if not here.free.wait(left) and key in here.busy:
                    raise AcquireTimeout(f"another turn of chat {key!r} still runs after {timeout:g} s", "turn")
            check_interrupt()
            here.busy.add(key)
        try:
            yield
        finally:
            with here.free:
                here.busy.discard(key)
            here.notify()

    # -- closing

    def close(self, key: str, pool: BackendPoolManager[Any], timeout: float) -> dict[str, Any]:
        """End a chat: its sessions, agents, backends, worktrees, records. Can be repeated, also when interrupted.

        *timeout*: seconds for a running turn to end. Returns ``{"closed", "retired"}`` of the pool, and in ``"agents"``
        what became of each record. Raises `BackendUnavailable` when a host that can be asked again did not answer,
        `AcquireTimeout` when a turn runs for too long or the pool has no room for what the close needs.
        """
        if not self.agents:
            return pool.close_key(key)
        with self.exclusive(key, timeout):
            return self._close(key, pool)

    def _close(self, key: str, pool: BackendPoolManager[Any]) -> dict[str, Any]:
        epoch = self._epoch_of(key)
        records = self.store.mark_closing(key, epoch)
        for record in records:
            self._say_goodbye(record, pool)
        ended: dict[str, Any] = dict(pool.close_key(key))
        ended["agents"] = {}
        for record in records:
            ended["agents"][record.agent] = self._forget(record, pool)
            self.store.delete(key, record.agent, epoch)
        if records:
            pool.close_key(key)  # what clearing away on the chat's host has connected again
        return ended

    def _say_goodbye(self, record: Chat, pool: BackendPoolManager[Any]) -> None:
        """Have a warm agent forget the session, before it is ended."""
        live = pool.peek(record.chat, record.agent)
        if isinstance(live, AgentBackend) and live.usable and record.session_id:
            try:
                live.close_session(record)
            except PoolError as error:
                logger.info("agent %r of chat %r did not close its session: %s", record.agent, record.chat, error)

    def _forget(self, record: Chat, pool: BackendPoolManager[Any]) -> dict[str, Any]:
        """Remove what the chat has left. What only a person can mend is told, and left."""
        try:
            agent = self.agents.make(record.chat, self.agents.check(record.agent))
            agent.pool = pool
            return agent.forget(record)
        except BackendUnavailable as error:
            if error.retry_after is not None:
                raise
            told = str(error)
        except (NotOwner, BackendClosed, AcquireTimeout):
            raise
        except PoolError as error:
            told = str(error)
        logger.warning("chat %r, agent %r: left behind: %s", record.chat, record.agent, told)
        return {"error": told}

    def close_idle(self, shard: int, idle_for: float, pool: BackendPoolManager[Any]) -> list[str]:
        """Close the chats of *shard* that nobody used for *idle_for* seconds; finish closes that were interrupted."""
        closed = []
        for key in self.store.idle(shard, idle_for, _MOST_IDLE) if self.agents else ():
            try:
                with self.exclusive(key, 0.0):
                    if key in self.store.idle(shard, idle_for, _MOST_IDLE):  # still: a turn may have ended in between
                        self._close(key, pool)
                        closed.append(key)
            except AcquireTimeout as error:  # it has a turn, or the pool has no room
                logger.debug("chat %r is not closed now: %s", key, error)
            except (NotOwner, BackendClosed):
                raise
            except PoolError as error:  # the next pass tries again
                logger.warning("closing the idle chat %r failed: %s", key, error)
            except Exception:  # one odd chat must not keep those behind it from being closed
                logger.exception("closing the idle chat %r failed", key)
        return closed


def chats_for(extension: Any, agents: Agents) -> Chats:
    """Return the chats of a `WarmPool`."""
    settings = extension.settings

    def epoch_of(key: str) -> int:
        epoch: int = extension.ownership.epoch(shard_of(key, settings.shards)) if settings.leased else 0
        return epoch

    def store() -> ChatStore:
        from pool.sessions import RedisChats

        if settings.redis_url is None:
            raise ConfigError("POOL_REDIS_URL is not set and the broker is no Redis: chats of agents are kept there")
        return RedisChats.from_url(settings.redis_url, settings.namespace, settings.shards, leased=settings.leased)

    return Chats(agents, epoch_of, store)
