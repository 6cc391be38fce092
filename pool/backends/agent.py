"""What the pool asks of a coding agent, of whatever kind: a session that lasts, and one turn at a time.

A subclass writes the five ``_...`` methods; cancelling, time-outs and what is kept of a turn are the same for all.
"""

import asyncio
import contextlib
import logging
from abc import abstractmethod
from typing import Any

from pool.backends.base import Backend, Capabilities
from pool.backends.output import TAP, DirectSink, Sink, Tap, ThreadSink
from pool.backends.turn import Collector, OnUpdate, Session, Turn, UpdateReader
from pool.chats import Chat
from pool.config import check_number
from pool.errors import BackendClosed, ConfigError, TurnFailed, TurnTimeout
from pool.runtime import loop_thread, was_cancelled

logger = logging.getLogger(__name__)

MAX_PROMPT = 4 << 20
"""Bytes of a prompt at most, as UTF-8."""

_ASK_AGAIN = 0.5
"""Seconds until an agent that goes on is asked again to end its turn."""
_TAIL = 2000


class AgentBackend(Backend):
    """One agent for one chat. Each method exists twice: ``prompt`` blocks, ``aprompt`` is for any event loop.

    *cancel_timeout*: seconds that an agent gets to end a turn that was cancelled; then it is ended itself.
    """

    capabilities = Capabilities(max_users=1)

    def __init__(self, *, cancel_timeout: float = 5.0) -> None:
        super().__init__()
        check_number("cancel_timeout", cancel_timeout, "must be more than 0")
        self.cancel_timeout = cancel_timeout
        self._cancel_asked: asyncio.Event | None = None  # of the running turn

    # -- written by a kind of agent; on the pool's event loop

    @abstractmethod
    async def _ensure_session(self, chat: Chat) -> Session:
        """Have the session of *chat* ready, made anew or brought back; each wait bounded. A warm one costs no IO."""

    @abstractmethod
    async def _prompt(self, text: str, collector: Collector) -> str:
        """Work on a prompt and return the stop reason. Raises `TurnFailed`, or what a lost connection raises."""

    @abstractmethod
    async def _cancel(self) -> None:
        """Ask the agent to end the running turn."""

    @abstractmethod
    async def _close_session(self, chat: Chat) -> None:
        """Have the agent forget the session for good, if it knows how; `_ensure_session` need not have been called."""

    @abstractmethod
    async def _forget(self, chat: Chat) -> dict[str, Any]:
        """Remove what outlives the agent; on a backend that is not connected. Returns what there is to tell."""

    @abstractmethod
    async def _abandon(self) -> None:
        """End what runs the turn, because it does not end by itself: the agent's process, or at least the session."""

    # -- called by tasks

    def ensure_session(self, chat: Chat) -> Session:
        """Return the session that the record names, brought back if need be, or a new one (``memory_lost``)."""
        return loop_thread().run(self._ensured(chat))

    async def aensure_session(self, chat: Chat) -> Session:
        """`ensure_session` for any event loop."""
        return await loop_thread().arun(self._ensured(chat))

    async def _ensured(self, chat: Chat) -> Session:
        self._refuse_closed()
        try:
            return await self._ensure_session(chat)
        except Exception:
            self._refuse_closed()  # what was closed under it fails in many ways
            raise

    def prompt(self, text: str, on_update: OnUpdate | None = None, timeout: float | None = None) -> Turn:
        """Have the agent work on *text* in the session of `ensure_session`; returns when it has ended its turn.

        *on_update* is called in this thread with each thing that the agent reports. *timeout*: seconds, after which
        the turn is cancelled. Raises `TurnFailed`, `TurnTimeout`, `BackendUnavailable` (the connection to the agent's
        machine was lost), `BackendClosed`, `ConfigError` for what is no prompt.
        """
        with self.timed():
            if on_update is None:
                return loop_thread().run(self._turn(text, None, timeout, TAP.get()))
            sink = ThreadSink(UpdateReader(on_update))
            return sink.drive(loop_thread().spawn(self._turn(text, sink, timeout, TAP.get())))

    async def aprompt(self, text: str, on_update: OnUpdate | None = None, timeout: float | None = None) -> Turn:
        """`prompt` for any event loop; *on_update* is called on the pool's own and must not block it."""
        sink = None if on_update is None else DirectSink(UpdateReader(on_update))
        turn = self._turn(text, sink, timeout, TAP.get())
        with self.timed():
            return await loop_thread().arun(turn if sink is None else sink.drive(turn))

    def cancel(self) -> bool:
        """Ask for the running turn to end; its `prompt` returns ``cancelled`` soon. False: none runs."""
        return loop_thread().run(self.acancel())

    async def acancel(self) -> bool:
        """`cancel` for any event loop."""

        async def ask() -> bool:
            if self._cancel_asked is None:
                return False
            self._cancel_asked.set()
            return True

        return await loop_thread().arun(ask())

    def close_session(self, chat: Chat) -> None:
        """Have the agent forget the chat for good, as far as it can."""
        loop_thread().run(self._close_session(chat))

    async def aclose_session(self, chat: Chat) -> None:
        """`close_session` for any event loop."""
        await loop_thread().arun(self._close_session(chat))

    def forget(self, chat: Chat) -> dict[str, Any]:
        """Remove what the chat has left: its session on a server, its worktree if nothing in it would be lost.

        On a backend that was not connected, and that nobody uses afterwards. Returns what there is to tell, such as
        ``{"worktree": {"worktree": path, "removed": bool, "branch": kept branch, "why": why}}``.
        """
        return loop_thread().run(self._forget(chat))

    def is_busy(self) -> bool:
        """Whether a turn runs."""
        return self._cancel_asked is not None

    def dispose(self) -> None:
        """`destroy`, by the name that agents' pools use."""
        self.destroy()

    # -- one turn

    async def _turn(self, text: str, sink: Sink | None, timeout: float | None, tap: Tap | None) -> Turn:
        check_prompt(text)
        if timeout is not None:
            check_number("timeout", timeout, "must be more than 0, or None for no limit")
        self._refuse_closed()
        if self._cancel_asked is not None:
            raise ConfigError("a turn runs already: one at a time")
        self._cancel_asked = asked = asyncio.Event()
        collector = Collector(sink, tap)
        working = asyncio.ensure_future(self._prompt(text, collector))
        asking = asyncio.ensure_future(asked.wait())
        try:
            await asyncio.wait({working, asking}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return collector.turn(working.result())
            stop_reason = await self._stop(working)
            self._refuse_closed()
            if asked.is_set():
                silent = stop_reason == "end_turn" and not collector.text  # so opencode ends what had hardly begun
                return collector.turn("cancelled" if silent else stop_reason)
        except asyncio.CancelledError:
            if not was_cancelled():  # let out by what the prompt awaited
                self._refuse_closed()
                self.mark_lost()
                raise TurnFailed(f"{self!r} gave the turn up", "died", collector.text[-_TAIL:]) from None
            collector.detach()  # who follows may be gone, and what is not read would hold the agent up
            stopping = asyncio.ensure_future(self._stop(working))
            while not stopping.done():  # a second cancel, as by the hard limit after the soft one, changes nothing
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait({stopping})
            raise
        except Exception:
            self._refuse_closed()
            raise
        finally:
            asking.cancel()
            self._cancel_asked = None
        told = f"the turn was cancelled after {timeout:g} s: {_short(text)}"
        raise TurnTimeout(told, "timeout", collector.text[-_TAIL:])

    async def _stop(self, working: "asyncio.Future[str]") -> str:
        """Have the agent end its turn, or end the agent; returns the stop reason when nothing works any more."""
        try:
            async with asyncio.timeout(self.cancel_timeout):
                while not working.done():  # an agent that has hardly heard the prompt can miss the first time
                    await self._cancel()
                    await asyncio.wait({working}, timeout=_ASK_AGAIN)
        except TimeoutError:
            if not working.done():
                logger.warning("%r did not end its turn within %g s: it is ended", self, self.cancel_timeout)
        except asyncio.CancelledError:
            if was_cancelled():
                raise
        except Exception as error:
            logger.info("%r, asked to end its turn: %s", self, error)
        if not working.done():
            await self._give_up(working)
        if working.cancelled():
            return "cancelled"
        if failed := working.exception():
            logger.info("%r, asked to end its turn: %s", self, failed)
            return "cancelled"
        return working.result()

    async def _give_up(self, working: "asyncio.Future[str]") -> None:
        """End the agent; it would work on outside of any turn."""
        self.mark_lost()
        try:
            await self._abandon()
        except Exception:
            logger.exception("ending %r failed", self)
        working.cancel()
        await asyncio.wait({working})

    def _refuse_closed(self) -> None:
        if self.status == "closed":
            raise BackendClosed(f"{self!r} was closed")


def check_prompt(text: Any) -> str:
    """Return *text*, or raise `ConfigError`."""
    if not isinstance(text, str):
        raise ConfigError(f"prompt={text!r}: must be text, not {type(text).__name__}")
    if not text.strip():
        raise ConfigError("prompt is empty")
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise ConfigError("prompt must not contain a lone surrogate") from None
    if size > MAX_PROMPT:
        raise ConfigError(f"prompt is {size} bytes long: at most {MAX_PROMPT} bytes of UTF-8")
    return text


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 80 else line[:77] + "..."
