"""A chat's session on the shared opencode server of its worker process."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from typing import Any

from pool.backends.agent import AgentBackend
from pool.backends.base import BackendStatus
from pool.backends.opencode_events import EventStream, TurnEvents
from pool.backends.opencode_server import OpencodeServer
from pool.backends.permissions import Policy
from pool.backends.site import Site
from pool.backends.turn import Collector, Session
from pool.borrowing import Borrowed
from pool.chats import Chat
from pool.config import check_number
from pool.errors import BackendUnavailable, ConfigError, TurnFailed
from pool.keys import SHARED

logger = logging.getLogger(__name__)

_TRAILING = 2.0
"""Seconds for the events of a turn to arrive after its answer."""
_LAST_MESSAGES = 100
_STOP_REASONS = {"stop": "end_turn", "tool-calls": "end_turn", "length": "max_tokens", "content-filter": "refusal"}


class OpencodeBackend(AgentBackend):
    """The session of *chat* on the server that the pool keeps for *agent*. See `Site`, `Policy`, `OpencodeServer`.

    It works in *root_dir*, a folder of the server's machine. Closing it leaves the session where it is: the server
    keeps sessions on its disk, and the next backend of the chat goes on there.

    Times in seconds: *session_timeout* for each request about the session, *cancel_timeout* for a cancelled turn.
    """

    kind = "opencode"

    def __init__(
        self,
        *,
        chat: str = "",
        agent: str = "",
        root_dir: str | None = None,
        cwd: str = ".",
        repository: str | None = None,
        base: str | None = None,
        permissions: str | Mapping[str, str] = "deny",
        session_timeout: float = 30.0,
        cancel_timeout: float = 5.0,
        start_timeout: float = 60.0,
    ) -> None:
        super().__init__(cancel_timeout=cancel_timeout)
        check_number("session_timeout", session_timeout, "must be more than 0")
        self.chat = chat
        self.agent = agent
        self.site = Site(chat, "worker", root_dir, cwd, repository, base)
        self._policy = Policy.parse(permissions)
        self._session_timeout = session_timeout
        self.open_timeout = start_timeout + 30.0  # it may be the one that starts the server
        self._borrowed: Borrowed[Any] | None = None
        self._events: EventStream | None = None
        self._session_id = ""
        self._ignore: Callable[[], None] = lambda: None  # listens to the server no more
        self._detaching: asyncio.Future[None] | None = None
        self._earlier: frozenset[str] = frozenset()  # messages of the last turn
        self._asked: dict[str, asyncio.Task[None]] = {}  # permissions that wait for our answer

    # -- life

    async def open(self) -> None:
        await self.site.open(self.pool)
        await self._attach()

    async def _attach(self) -> None:
        """Borrow the server, and follow what it reports about the chat's folder."""
        if self.pool is None:
            raise ConfigError("kind 'opencode' shares a server through its pool: this agent is in none")
        self._borrowed = await self.pool.aacquire_backend(SHARED, self.agent)
        self._ignore = self._server.on_status_change(self._server_changed)
        self._events = await self._server.follow(self.site.folder_path)

    def _server_changed(self, status: BackendStatus) -> None:
        """Let go of a server that is gone, or it would keep its place among the agents as long as this chat is warm."""
        if status is not BackendStatus.CONNECTED and not self.is_busy():
            self._detaching = asyncio.ensure_future(self._detach())

    @property
    def _server(self) -> OpencodeServer:
        if self._borrowed is None:
            raise BackendUnavailable("the opencode server is gone", "lost", 0.0)
        server: OpencodeServer = self._borrowed.backend
        return server

    async def check(self) -> None:
        if self._borrowed is None or not self._server.usable:
            raise BackendUnavailable("the opencode server is gone", "lost", 0.0)

    async def close(self) -> None:
        try:
            await self._detach()
        finally:
            await self.site.leave()

    async def _detach(self) -> None:
        """Give the server back; its session stays."""
        borrowed, self._borrowed = self._borrowed, None
        events, self._events = self._events, None
        self._session_id = ""
        self._ignore()
        if borrowed is None:
            return
        try:
            if events is not None:
                await borrowed.backend.unfollow(events)
        finally:
            borrowed.release()

    # -- the session

    async def _ensure_session(self, chat: Chat) -> Session:
        if self._borrowed is None or not self._server.usable:  # it was restarted
            await self._detach()
            await self._attach()
        if chat.session_id and chat.session_id == self._session_id:
            return self._session()
        if chat.session_id and await self._exists(chat.session_id):
            self._session_id = chat.session_id
            return self._session(resumed=True)
        if chat.session_id:
            logger.warning("chat %r: session %r is gone: it begins anew", chat.chat, chat.session_id)
        created = await self._request("POST", "/session", json={"title": chat.chat or self.chat or "chat"})
        self._session_id = str(created["id"])
        return self._session(memory_lost=bool(chat.session_id))

    async def _exists(self, session_id: str) -> bool:
        try:
            await self._request("GET", f"/session/{session_id}")
        except TurnFailed:
            return False
        return True

    def _session(self, *, resumed: bool = False, memory_lost: bool = False) -> Session:
        worktree = self.site.worktree
        path, branch = (worktree.path, worktree.branch) if worktree is not None else ("", "")
        return Session(self._session_id, resumed, memory_lost, self._server.version, path, branch)

    async def _request(self, method: str, path: str, **options: Any) -> Any:
        """Ask the server. Raises `TurnFailed` for what it refuses, `BackendUnavailable` when it does not answer."""
        import httpx

        options.setdefault("timeout", httpx.Timeout(self._session_timeout, connect=5.0))
        params = {"directory": self.site.folder_path}
        try:
            answer = await self._server.client.request(method, path, params=params, **options)
        except (httpx.HTTPError, RuntimeError) as error:  # RuntimeError: the client was closed
            why = f"opencode server: {str(error) or type(error).__name__}"
            raise BackendUnavailable(why, "lost", 0.0) from error
        if answer.status_code >= 400:
            raise TurnFailed(f"opencode: HTTP {answer.status_code}: {_message(answer.text)}", "refused")
        try:
            return answer.json() if answer.content else None
        except ValueError:
            raise TurnFailed(f"opencode: no JSON: {answer.text[:200]!r}", "garbage") from None

    async def _close_session(self, chat: Chat) -> None:
        """Nothing to do while it is open: `_forget` deletes the session."""
        if chat.session_id == self._session_id:
            self._session_id = ""

    async def _forget(self, chat: Chat) -> dict[str, Any]:
        """Delete the session, starting the server if need be; then the worktree."""
        report: dict[str, Any] = {}
        if chat.session_id:
            report["session"] = await self._delete(chat.session_id)
        worktree = await self.site.clear_away(self.pool)
        return {**report, **({"worktree": worktree} if worktree is not None else {})}

    async def _delete(self, session_id: str) -> str:
        await self.site.enter(self.pool)
        try:
            await self._attach()
            with contextlib.suppress(TurnFailed):
                await self._request("POST", f"/session/{session_id}/abort")  # or the deletion of a busy one hangs
            await self._request("DELETE", f"/session/{session_id}")
        except TurnFailed as error:
            return str(error)
        else:
            return "deleted"
        finally:
            await self._detach()
            await self.site.leave()

    # -- a turn

    async def _prompt(self, text: str, collector: Collector) -> str:
        if self._events is None or not self._session_id:
            raise ConfigError("call ensure_session before prompt")
        stream, breaks = self._events, self._events.breaks
        events = TurnEvents(collector, lambda *asked: self._answer(collector, *asked), self._earlier)
        complete = False
        try:
            with self._server.turn(self._session_id, events):
                body = {"parts": [{"type": "text", "text": text}]}
                path = f"/session/{self._session_id}/message"
                answer = await self._request("POST", path, json=body, timeout=None) or {}
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_TRAILING):
                        complete = await events.complete(_text([answer]))
        except BackendUnavailable as error:
            raise await self._died(error) from error
        self._earlier = events.messages
        info = answer.get("info") or {}
        if not complete or stream.breaks != breaks:
            collector.replace_text(await self._texts(info))
        collector.usage = _usage(info)
        return self._stop_reason(info)

    def _stop_reason(self, info: dict[str, Any]) -> str:
        error = info.get("error")
        if error and error.get("name") != "MessageAbortedError":
            detail = (error.get("data") or {}).get("message") or error
            raise TurnFailed(f"opencode: {error.get('name')}: {detail}", "refused")
        if error or not info.get("finish"):  # an abort during a retry leaves neither
            return "cancelled"
        return _STOP_REASONS.get(str(info["finish"]), "end_turn")

    async def _texts(self, info: dict[str, Any]) -> str:
        """What the agent has said in the turn, asked for again because events are missing."""
        path = f"/session/{self._session_id}/message"
        messages = await self._request("GET", f"{path}?limit={_LAST_MESSAGES}")
        return _text([m for m in messages if m["info"].get("parentID") == info.get("parentID")])

    async def _died(self, error: BackendUnavailable) -> Exception:
        server = self._server
        self.mark_lost()
        if server.command is None:
            return error
        server.mark_lost()
        told = TurnFailed(f"the opencode server died: {await server.last_words()}", "died")
        await self._detach()
        return told

    def _answer(self, collector: Collector, request: str, kind: str, title: str) -> None:
        """Answer a permission request by the policy."""
        allowed = self._policy.answer(kind) == "allow"
        collector.permission(title, kind, "allow" if allowed else "deny")
        self._reply(request, "once" if allowed else "reject")

    def _reply(self, request: str, word: str) -> None:
        async def reply() -> None:
            try:
                await self._request("POST", f"/permission/{request}/reply", json={"reply": word})
            except (TurnFailed, BackendUnavailable) as error:
                logger.warning("permission %s of chat %r: %s", request, self.chat, error)

        task = self._asked[request] = asyncio.create_task(reply())
        task.add_done_callback(lambda _: self._asked.pop(request, None))

    async def _cancel(self) -> None:
        """Abort. What still asks for permission is refused: answered later, it would run outside of any turn."""
        await self._refuse_all()
        await self._request("POST", f"/session/{self._session_id}/abort")
        await self._refuse_all()

    async def _refuse_all(self) -> None:
        for asked in await self._request("GET", "/permission") or ():
            if asked.get("sessionID") == self._session_id:
                with contextlib.suppress(TurnFailed):
                    await self._request("POST", f"/permission/{asked['id']}/reply", json={"reply": "reject"})

    async def _abandon(self) -> None:
        """Leave the session to the server; whether that has hung is for its own look to find out."""
        await self._detach()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.agent!r} of {self.chat!r} {self.status}>"


def _text(messages: list[dict[str, Any]]) -> str:
    """What the agent says in messages."""
    return "".join(part["text"] for message in messages for part in message.get("parts", ()) if part["type"] == "text")


def _usage(info: dict[str, Any]) -> dict[str, Any] | None:
    tokens = info.get("tokens")
    if not isinstance(tokens, dict):
        return None
    names = {"total": "total_tokens", "input": "input_tokens", "output": "output_tokens", "reasoning": "thought_tokens"}
    found = {ours: tokens[theirs] for theirs, ours in names.items() if theirs in tokens}
    return {**found, "cost": info["cost"]} if "cost" in info else found


def _message(text: str) -> str:
    """What an error of the server says."""
    import json

    with contextlib.suppress(ValueError, AttributeError, TypeError):
        return str(json.loads(text)["data"]["message"])
    return text[:300]
