"""Bodies of the OpenAI API, as the fake LLM reads and writes them: chat completions and responses."""

import json
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

# The names of agents' shell tools, and the arguments that run a command.
_SHELL_TOOLS: dict[str, Callable[[str], dict[str, Any]]] = {
    # opencode
    "bash": lambda command: {"command": command},
    # codex, which waits that long for the command at the most; its default is 10 s
    "exec_command": lambda command: {"cmd": command, "yield_time_ms": 30_000},
}


class Message(NamedTuple):
    """A message of a conversation; *role* is ``user``, ``assistant``, ``tool``, ``system`` or ``developer``."""

    role: str
    text: str


@dataclass(frozen=True)
class Answer:
    """The LLM says *text*, or calls the agent's shell tool with *command*, or fails with the HTTP *status*.

    The text comes a word at a time, all of it within *seconds*; None: the first word, then no more.
    """

    text: str = ""
    command: str | None = None
    seconds: float | None = 0.0
    status: int = 200


_CHAT = {"id": "chat", "created": 0, "model": "fake"}

Event = tuple[float | None, dict[str, Any]]  # the seconds to wait before it (None: for ever), and what is sent


def conversation_of(body: Mapping[str, Any]) -> list[Message]:
    """The messages of a request of either kind, without codex's own in the user's name, which start with ``<``."""
    found = []
    for item in body.get("messages") or body.get("input") or ():
        if "role" in item:
            found.append(Message(item["role"], _text(item.get("content"))))
        elif item["type"].endswith("call_output"):
            found.append(Message("tool", _tool_output(_text(item["output"]))))
    return [m for m in found if not (m.role == "user" and m.text.startswith(("<", "# AGENTS.md")))]


def _text(content: Any) -> str:
    """The text of a message: a string, or parts of which some have text."""
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or "" for part in content or ())


def _tool_output(text: str) -> str:
    """What the command printed, without the numbers and times that codex puts before it."""
    return re.sub(r"\AChunk ID: .*?^Output:\n", "", text, flags=re.DOTALL | re.MULTILINE)


def shell_tool(body: Mapping[str, Any]) -> str | None:
    """The name of the shell tool among those that the agent offers."""
    offered = [(tool.get("function") or tool).get("name") for tool in body.get("tools") or ()]
    return next((name for name in _SHELL_TOOLS if name in offered), None)


def _shell_call(body: Mapping[str, Any], command: str) -> dict[str, str]:
    name = shell_tool(body)
    assert name is not None
    return {"name": name, "arguments": json.dumps(_SHELL_TOOLS[name](command))}


def _words(reply: Answer) -> Iterator[tuple[float | None, str]]:
    """The words of the text, each with the seconds to wait before it."""
    words = re.split(r"(?<=\s)(?=\S)", reply.text)
    for index, word in enumerate(words):
        if reply.seconds is None:
            yield (None if index else 0.0), word
        else:
            yield reply.seconds / len(words), word


def _counts(body: Mapping[str, Any], reply: Answer) -> tuple[int, int]:
    """Tokens in and out; a word is one."""
    return sum(len(text.split()) for _, text in conversation_of(body)), len((reply.command or reply.text).split())


def chat_chunks(body: Mapping[str, Any], reply: Answer) -> Iterator[Event]:
    """The answer to a chat completion that is streamed."""

    def chunk(delta: Mapping[str, Any], finish: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return {**_CHAT, "object": "chat.completion.chunk", "choices": [choice]}

    yield 0.0, chunk({"role": "assistant", "content": ""})
    if reply.command:
        yield 0.0, chunk({"tool_calls": [{"index": 0, **_chat_call(body, reply.command)}]})
    else:
        yield from ((pause, chunk({"content": word})) for pause, word in _words(reply))
    yield 0.0, chunk({}, "tool_calls" if reply.command else "stop")
    yield 0.0, {**chunk({}), "choices": [], "usage": _chat_usage(body, reply)}


def whole_chat(body: Mapping[str, Any], reply: Answer) -> dict[str, Any]:
    """The answer to a chat completion that is not streamed."""
    message: dict[str, Any] = {"role": "assistant", "content": reply.text}
    if reply.command:
        message["tool_calls"] = [_chat_call(body, reply.command)]
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if reply.command else "stop"}
    usage = _chat_usage(body, reply)
    return {**_CHAT, "object": "chat.completion", "choices": [choice], "usage": usage}


def _chat_call(body: Mapping[str, Any], command: str) -> dict[str, Any]:
    return {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": _shell_call(body, command)}


def _chat_usage(body: Mapping[str, Any], reply: Answer) -> dict[str, int]:
    into, out = _counts(body, reply)
    return {"prompt_tokens": into, "completion_tokens": out, "total_tokens": into + out}


def responses_events(body: Mapping[str, Any], reply: Answer) -> Iterator[Event]:
    """The answer to a responses request, which is streamed."""
    number = uuid.uuid4().hex
    yield 0.0, {"type": "response.created", "response": {"id": f"resp_{number}"}}
    item: dict[str, Any]
    if reply.command:
        item = {"type": "function_call", "id": f"fc_{number}", "call_id": f"call_{number}"}
        item |= _shell_call(body, reply.command)
    else:
        item = {"type": "message", "id": f"msg_{number}", "role": "assistant", "content": []}
        yield 0.0, {"type": "response.output_item.added", "output_index": 0, "item": item}
        part = {"item_id": item["id"], "output_index": 0, "content_index": 0}
        for pause, word in _words(reply):
            yield pause, {"type": "response.output_text.delta", **part, "delta": word}
        item = {**item, "content": [{"type": "output_text", "text": reply.text, "annotations": []}]}
    yield 0.0, {"type": "response.output_item.done", "output_index": 0, "item": item}
    into, out = _counts(body, reply)
    usage = {"input_tokens": into, "output_tokens": out, "total_tokens": into + out}
    yield 0.0, {"type": "response.completed", "response": {"id": f"resp_{number}", "usage": usage}}
