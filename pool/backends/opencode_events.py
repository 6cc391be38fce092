"""What an opencode server reports: its stream of events for one project folder, and what they say about a turn."""

import asyncio
import json
import logging
from collections.abc import Callable, Container
from time import monotonic
from typing import Any

from pool.backends.turn import Collector
from pool.errors import BackendUnavailable

logger = logging.getLogger(__name__)

_SILENCE = 60.0
"""Seconds without a line, heartbeats included, until the stream is taken for dead."""
_PAUSE = 0.2
"""Seconds until a stream that broke is asked for again; doubled each time, up to `_LONGEST_PAUSE`."""
_LONGEST_PAUSE = 5.0

KINDS = {
    "bash": "execute",
    "edit": "edit",
    "write": "edit",
    "patch": "edit",
    "multiedit": "edit",
    "read": "read",
    "list": "read",
    "glob": "search",
    "grep": "search",
    "webfetch": "fetch",
    "websearch": "fetch",
    "task": "think",
    "todowrite": "think",
    "todoread": "think",
}
"""Tools and permissions of opencode -> kinds of tool calls."""


_STATUS = {"running": "in_progress", "error": "failed"}


class EventStream:
    """``GET /event`` of one folder, asked for again whenever it breaks. *dispatch* gets each event."""

    def __init__(self, client: Any, directory: str, dispatch: Callable[[dict[str, Any]], None]) -> None:
        self.directory = directory
        self.followers = 0
        self.heard_at = 0.0  # monotonic
        self.breaks = 0
        """How often it broke: events may be missing."""
        self._client = client
        self._dispatch = dispatch
        self._connected = asyncio.Event()
        self._running = asyncio.create_task(self._run())

    async def connected(self, timeout: float) -> None:
        """Wait until events come. Raises `BackendUnavailable`."""
        try:
            async with asyncio.timeout(timeout):
                await self._connected.wait()
        except TimeoutError:
            raise BackendUnavailable(f"no events of the opencode server within {timeout:g} s", "lost", 0.0) from None

    async def close(self) -> None:
        """Follow no longer."""
        self._running.cancel()
        await asyncio.wait({self._running})

    async def _run(self) -> None:
        import httpx

        pause = _PAUSE
        while True:
            try:
                await self._read()
            except (httpx.HTTPError, httpx.StreamError, RuntimeError) as error:  # RuntimeError: the client was closed
                logger.debug("events of %s: %r", self.directory, error)
            pause = _PAUSE if self._connected.is_set() else min(2 * pause, _LONGEST_PAUSE)
            self._connected.clear()
            self.breaks += 1
            await asyncio.sleep(pause)

    async def _read(self) -> None:
        import httpx

        timeout = httpx.Timeout(_SILENCE, connect=5.0)
        params = {"directory": self.directory}
        async with self._client.stream("GET", "/event", params=params, timeout=timeout) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                self.heard_at = monotonic()
                if line.startswith("data:"):
                    self._take(line[5:])

    def _take(self, data: str) -> None:
        try:
            event = json.loads(data)
        except ValueError:
            return
        self._connected.set()
        if isinstance(event, dict):
            try:
                self._dispatch(event)
            except Exception:  # one odd event must not end the stream of all chats
                logger.exception("event %.200r of opencode", data)


class TurnEvents:
    """Reads the events of one turn into *collector*; ``on_permission(id, kind, title)`` is called for each request.

    *earlier*: messages of the turn before, of which something may still come.
    """

    def __init__(
        self,
        collector: Collector,
        on_permission: Callable[[str, str, str], None],
        earlier: Container[str] = (),
    ) -> None:
        self._collector = collector
        self._earlier = earlier
        self._news = asyncio.Event()
        self._on_permission = on_permission
        self._roles: dict[str, str] = {}  # message -> user or assistant
        self._texts: dict[str, str] = {}  # part of a message of the assistant -> how much of it was reported
        self._thoughts: set[str] = set()
        self._idle = False

    @property
    def messages(self) -> frozenset[str]:
        """Ids of the messages of this turn."""
        return frozenset(self._roles)

    async def complete(self, text: str) -> bool:
        """Wait until *text*, the end of the agent's answer, was reported. False: the turn is over, and it was not."""
        while not self._idle and not (text and self._collector.text.endswith(text)):
            self._news.clear()
            await self._news.wait()
        return self._collector.text.endswith(text)

    def __call__(self, event: dict[str, Any]) -> None:
        """Take one event."""
        self._news.set()
        properties = event["properties"]
        kind = event.get("type")
        if kind == "message.updated":
            info = properties["info"]
            if info["id"] in self._earlier:
                return
            self._roles[info["id"]] = info["role"]
        elif kind == "message.part.updated":
            self._part(properties["part"])
        elif kind == "message.part.delta":
            self._delta(properties)
        elif kind == "permission.asked":
            name = str(properties.get("permission", ""))
            self._on_permission(str(properties["id"]), KINDS.get(name, "other"), _about(properties) or name)
        elif kind == "session.idle" and "assistant" in self._roles.values():
            self._idle = True

    def _part(self, part: dict[str, Any]) -> None:
        if self._roles.get(part.get("messageID", "")) != "assistant":
            return  # the user's own words come back, too
        if part["type"] == "tool":
            state = part.get("state") or {}
            status = _STATUS.get(str(state.get("status")), state.get("status"))
            title = state.get("title") or (state.get("input") or {}).get("command") or part.get("tool")
            fields = {"title": title, "kind": KINDS.get(part.get("tool", ""), "other"), "status": status}
            self._collector.tool(part["callID"], fields)
        elif part["type"] == "text":
            self._say(part["id"], str(part.get("text", "")))
        elif part["type"] == "reasoning":
            self._thoughts.add(part["id"])

    def _delta(self, properties: dict[str, Any]) -> None:
        part = properties["partID"]
        if properties.get("field") != "text":
            return
        if part in self._thoughts:
            self._collector.report({"type": "thought", "text": properties["delta"]})
        elif self._roles.get(properties.get("messageID", "")) == "assistant":
            self._say(part, self._texts.get(part, "") + properties["delta"])

    def _say(self, part: str, text: str) -> None:
        """Report what is new of a part's text."""
        known = self._texts.get(part, "")
        if text.startswith(known) and len(text) > len(known):
            self._texts[part] = text
            self._collector.say(text[len(known) :])
        else:
            self._texts.setdefault(part, text)


def _about(request: dict[str, Any]) -> str:
    """What a permission is asked for; "" when that cannot be told, for even then it must be answered."""
    metadata, patterns = request.get("metadata"), request.get("patterns")
    command = metadata.get("command") if isinstance(metadata, dict) else None
    return str(command or " ".join(map(str, patterns if isinstance(patterns, list) else ())))
