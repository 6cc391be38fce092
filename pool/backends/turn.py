"""One turn of an agent: what it says and does while it works on a prompt, kept up to a bound. Pure."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pool.backends.output import Sink, Tap

OnUpdate = Callable[[dict[str, Any]], object]
"""Called with each update of a turn as it comes: ``{"type": "text", "text": ...}``, or a tool, a permission, ..."""

MAX_TEXT = 1 << 20
"""Characters of a turn's text that are kept; what comes after is left out."""
MAX_TOOLS = 1000
"""Tool calls, and permission requests, of one turn that are kept."""


@dataclass(frozen=True)
class Session:
    """The agent's session of a chat, as `AgentBackend.ensure_session` found or made it."""

    session_id: str
    resumed: bool = False
    """It existed before, and was brought back into an agent that did not have it."""
    memory_lost: bool = False
    """There was one before that could not be brought back: the agent remembers nothing of the chat."""
    version: str = ""
    """Of the agent."""
    worktree: str = ""
    """Where it works, relative to the root; "": in the root."""
    branch: str = ""


@dataclass(frozen=True)
class Turn:
    """How a turn ended."""

    text: str
    stop_reason: str
    """``end_turn``, ``max_tokens``, ``max_turn_requests``, ``refusal`` or ``cancelled``."""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    """``{"id", "title", "kind", "status"}`` of each, in the order of their begin."""
    permissions: list[dict[str, Any]] = field(default_factory=list)
    """``{"title", "kind", "answer"}`` of each request; the answer is ``allow`` or ``deny``."""
    usage: dict[str, Any] | None = None
    """Tokens, as the agent counts them; None: it does not say."""
    truncated: bool = False


class Collector:
    """Takes what an agent reports during one turn, and passes it on to *sink*.

    *tap*: gets the text as ``stdout``, and everything else as ``update``, encoded as JSON.
    """

    def __init__(self, sink: Sink | None = None, tap: Tap | None = None) -> None:
        self._sink = sink
        self._tap = tap
        self._resume: Callable[[], None] | None = None  # of who waits for room in the sink
        self._text: list[str] = []
        self._size = 0
        self._tools: dict[str, dict[str, Any]] = {}
        self._permissions: list[dict[str, Any]] = []
        self.usage: dict[str, Any] | None = None
        self.count = 0

    def say(self, text: str) -> None:
        """The agent says something to the user."""
        self._size += len(text)
        if self._size - len(text) < MAX_TEXT:
            self._text.append(text[: MAX_TEXT - (self._size - len(text))])
        self.report({"type": "text", "text": text})

    def tool(self, call_id: str, fields: Mapping[str, Any]) -> None:
        """A tool call begins, or something about it has changed; what is None says nothing."""
        known = self._tools.get(call_id)
        if known is None and len(self._tools) >= MAX_TOOLS:
            return
        if known is None:
            known = self._tools[call_id] = {"id": call_id, "title": "", "kind": "other", "status": "pending"}
        known.update({name: value for name, value in fields.items() if value is not None})
        self.report({"type": "tool", **known})

    def kind_of(self, call_id: str) -> str | None:
        """The kind of a tool call that was reported before."""
        known = self._tools.get(call_id)
        return known["kind"] if known else None

    def permission(self, title: str, kind: str, answer: str) -> None:
        """A permission was asked for, and answered."""
        asked = {"title": title, "kind": kind, "answer": answer}
        if len(self._permissions) < MAX_TOOLS:
            self._permissions.append(asked)
        self.report({"type": "permission", **asked})

    def report(self, update: Mapping[str, Any]) -> None:
        """Pass something on to whoever follows the turn."""
        self.count += 1
        encoded = json.dumps(update).encode()
        if self._tap is not None and update["type"] == "text":
            self._tap("stdout", update["text"].encode(errors="replace"), 0)
        elif self._tap is not None:
            self._tap("update", encoded, 0)
        if self._sink is not None:
            self._sink.push("stdout", encoded)

    def replace_text(self, text: str) -> None:
        """Put *text* in place of what was reported: pieces are missing."""
        self._text, self._size = [text[:MAX_TEXT]], len(text)

    def full(self, resume: Callable[[], None]) -> bool:
        """See `Sink.full`."""
        self._resume = resume
        return self._sink is not None and self._sink.full(resume)

    def detach(self) -> None:
        """Pass nothing on any more, and have nobody wait for it."""
        self._sink = None
        if self._resume is not None:
            self._resume()

    @property
    def text(self) -> str:
        """What the agent has said so far."""
        return "".join(self._text)

    def turn(self, stop_reason: str) -> Turn:
        """Everything, at the end."""
        return Turn(
            self.text, stop_reason, list(self._tools.values()), self._permissions, self.usage, self._size > MAX_TEXT
        )


class UpdateReader:
    """Gives a follower of a turn its updates, as `Collector` encodes them."""

    def __init__(self, on_update: OnUpdate) -> None:
        self._on_update = on_update

    def __call__(self, stream: Any, data: bytes) -> None:  # noqa: ARG002 - there is only one
        self._on_update(json.loads(data))

    def finish(self) -> None:
        """Each update came whole."""
