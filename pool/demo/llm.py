"""A fake LLM on loopback, for real agents without a network: what it answers is a pure function of the conversation.

It speaks the part of OpenAI's API that agents use: ``POST /v1/chat/completions`` (streamed or whole),
``POST /v1/responses`` (streamed) and ``GET /v1/models``. What it says to which user text stands at `answer`.
"""

import json
import re
import select
import socket
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, Self

from pool.demo.llm_wire import (
    Answer,
    Event,
    Message,
    chat_chunks,
    conversation_of,
    responses_events,
    shell_tool,
    whole_chat,
)

__all__ = ["Answer", "FakeLlm", "LlmRequest", "Message", "answer"]

_TITLE_PROMPT = "You are a title generator"  # how opencode's system prompt for titles begins


@dataclass(frozen=True)
class LlmRequest:
    """A request that arrived. *users*: the user texts in it, oldest first. *kind* ``title``: opencode names a session.

    *state*: ``open`` while it is answered (for ever, if the server stops meanwhile), ``done`` after, or
    ``aborted`` when the client went away before.
    """

    path: str
    users: tuple[str, ...]
    kind: Literal["turn", "title"]
    state: Literal["open", "done", "aborted"] = "open"


def answer(conversation: Sequence[Message]) -> Answer:
    """Decide by the last message: after a tool's output ``tool said: <output>``, else by the last user text.

    ========================== =====================================================================
    ``/tool <shell command>``  call the agent's shell tool
    ``/slow <seconds> <text>`` say the text, a word at a time, within about that time
    ``/hang``                  say a word, then nothing
    ``/error [<status>]``      an HTTP error; 500 unless told otherwise
    anything else              ``turn N: <text>; earlier: [<text>, ...]`` with N the count of user texts
    ========================== =====================================================================

    A ``!`` does as well as the slash, which ``opencode acp`` keeps for commands of its own: it swallows all others.
    """
    if conversation and conversation[-1].role == "tool":
        return Answer(f"tool said: {conversation[-1].text}")
    *earlier, last = [message.text for message in conversation if message.role == "user"] or [""]
    if told := re.fullmatch(r"[/!]tool (.+)", last, re.DOTALL):
        return Answer(command=told[1])
    if told := re.fullmatch(r"[/!]slow (\d+(?:\.\d+)?) (.+)", last, re.DOTALL):
        return Answer(told[2], seconds=float(told[1]))
    if last in {"/hang", "!hang"}:
        return Answer("it hangs", seconds=None)
    if told := re.fullmatch(r"[/!]error(?: ([45]\d\d))?", last):
        return Answer("told to fail", status=int(told[1] or 500))
    return Answer(f"turn {len(earlier) + 1}: {last}; earlier: [{', '.join(earlier)}]")


class FakeLlm:
    """The server, in threads of this process, from entry to exit of the context; *api_key*: the bearer token it wants.

    Exit cuts every connection, also those that hang.
    """

    url: str

    def __init__(self, *, api_key: str | None = None) -> None:
        self._api_key = api_key
        self._server: _Server

    def __enter__(self) -> Self:
        self._server = _Server(self._api_key)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="fake-llm")
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.cut()
        self._server.server_close()  # joins the threads of the connections

    @property
    def requests(self) -> list[LlmRequest]:
        """The conversations that arrived so far, oldest first; not those without the right token."""
        with self._server.lock:
            return list(self._server.requests)


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    request_queue_size = 128

    def __init__(self, api_key: str | None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.api_key = api_key
        self.lock = threading.Lock()
        self.requests: list[LlmRequest] = []
        self._connections: set[socket.socket] = set()
        self._stopping = False

    def process_request(self, request: Any, client_address: Any) -> None:
        with self.lock:
            self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self.lock:
            self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # a client that went away is no error
            super().handle_error(request, client_address)

    def cut(self) -> None:
        """End all connections under the hands of their threads."""
        with self.lock:
            self._stopping = True
            for connection in self._connections:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    @contextmanager
    def recorded(self, request: LlmRequest) -> Iterator[None]:
        """Note how the request ends; the client's going away ends the block."""
        with self.lock:
            index = len(self.requests)
            self.requests.append(request)
        try:
            yield
        except OSError:
            self._note(index, "aborted")
            raise
        self._note(index, "done")

    def _note(self, index: int, state: Literal["done", "aborted"]) -> None:
        with self.lock:
            if not self._stopping:
                self.requests[index] = replace(self.requests[index], state=state)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        if not self._authorized():
            return
        if self.path.partition("?")[0] == "/v1/models":
            self._send(200, {"object": "list", "data": [{"id": "fake", "object": "model", "owned_by": "fake"}]})
        else:
            self._fail(404, f"no {self.path}")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._authorized():
            return
        if self.path not in {"/v1/chat/completions", "/v1/responses"}:
            self._fail(404, f"no {self.path}")
            return
        conversation = conversation_of(body)
        users = tuple(message.text for message in conversation if message.role == "user")
        title = any(message.text.startswith(_TITLE_PROMPT) for message in conversation if message.role == "system")
        reply = Answer("A title") if title else answer(conversation)
        if reply.command and not shell_tool(body):
            reply = Answer("no shell tool is offered", status=400)
        with self.server.recorded(LlmRequest(self.path, users, "title" if title else "turn")):
            if reply.status != 200:
                self._fail(reply.status, reply.text)
            elif self.path == "/v1/responses":
                self._stream(responses_events(body, reply))
            elif body.get("stream"):
                self._stream(chat_chunks(body, reply), end=b"data: [DONE]\n\n")
            else:
                self._pause(reply.seconds)
                self._send(200, whole_chat(body, reply))

    def log_message(self, *_arguments: Any) -> None:
        """Say nothing: stderr is the program's."""

    def _authorized(self) -> bool:
        key = self.server.api_key
        if key is None or self.headers["Authorization"] == f"Bearer {key}":
            return True
        self._fail(401, "wrong API key")
        return False

    def _fail(self, status: int, message: str) -> None:
        self._send(status, {"error": {"message": message, "type": "fake_error", "code": str(status)}})

    def _send(self, status: int, body: Mapping[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _stream(self, events: Iterator[Event], end: bytes = b"") -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for pause, event in events:
            self._pause(pause)
            name = f"event: {event['type']}\n" if "type" in event else ""
            self._chunk(f"{name}data: {json.dumps(event)}\n\n".encode())
        self._chunk(end)
        self.wfile.write(b"0\r\n\r\n")

    def _chunk(self, data: bytes) -> None:
        if data:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def _pause(self, seconds: float | None) -> None:
        """Wait; None: for ever. Raises ``ConnectionAbortedError`` when the client hangs up: nothing else is to come."""
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)
        if poll.poll(None if seconds is None else seconds * 1000):
            raise ConnectionAbortedError
