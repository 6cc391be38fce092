"""The fake LLM keeps its contract, and two real agents take it for a real one."""

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import acp
import httpx
import pytest

from pool.demo.llm import Answer, FakeLlm, Message, answer
from tests.support.real_agents import codex_home, opencode_home
from tests.support.waiting import wait_until

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
BASH = {"type": "function", "function": {"name": "bash", "parameters": {}}}
EXEC_COMMAND = {"type": "function", "name": "exec_command", "parameters": {}}


@pytest.fixture
def llm() -> Iterator[FakeLlm]:
    with FakeLlm() as server:
        yield server


@pytest.fixture
def client(llm) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=llm.url, timeout=20) as client:
        yield client


def body(path: str, *texts: str, **more: Any) -> dict[str, Any]:
    """A request of either kind whose user says *texts*, each but the last of them answered."""
    messages = [{"role": "system", "content": "You are an agent."}]
    for text in texts:
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": "fine"}]
    return {"messages" if path == CHAT else "input": messages[:-1], "stream": True, **more}


def events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """What a stream brings, as it comes."""
    for line in response.iter_lines():
        name, _, data = line.partition(": ")
        if name == "data" and data != "[DONE]":
            yield json.loads(data)


def words(path: str, response: httpx.Response) -> Iterator[str]:
    """The pieces of text that a stream brings, as they come."""
    for event in events(response):
        if path == RESPONSES and event["type"] == "response.output_text.delta":
            yield event["delta"]
        elif path == CHAT and event["choices"] and event["choices"][0]["delta"].get("content"):
            yield event["choices"][0]["delta"]["content"]


def say(client: httpx.Client, path: str, *texts: str) -> str:
    with client.stream("POST", path, json=body(path, *texts)) as response:
        assert response.headers["Content-Type"] == "text/event-stream"
        return "".join(words(path, response))


@pytest.mark.parametrize("path", [CHAT, RESPONSES])
def test_the_answer_names_what_was_said_before(llm, client, path):
    """A client that forgot, or that mixed up two conversations, is found out by the text."""
    assert say(client, path, "alpha") == "turn 1: alpha; earlier: []"
    assert say(client, path, "alpha", "beta", "gamma") == "turn 3: gamma; earlier: [alpha, beta]"
    assert [(request.path, request.users, request.kind) for request in llm.requests] == [
        (path, ("alpha",), "turn"),
        (path, ("alpha", "beta", "gamma"), "turn"),
    ]


@pytest.mark.parametrize("path", [CHAT, RESPONSES])
def test_what_codex_says_in_the_users_name_is_not_counted(client, path):
    """Only the user's texts are turns."""
    assert say(client, path, "<environment_context>\n</environment_context>", "alpha") == "turn 1: alpha; earlier: []"


def test_a_chat_completion_need_not_be_streamed(client):
    """The same text in one piece, with the tokens counted."""
    done = client.post(CHAT, json=body(CHAT, "alpha beta", stream=False)).json()
    choice = done["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "turn 1: alpha beta; earlier: []"}
    assert choice["finish_reason"] == "stop"
    assert done["usage"] == {"prompt_tokens": 6, "completion_tokens": 6, "total_tokens": 12}


def test_a_chat_stream_ends_with_its_usage(client):
    """As clients ask for with ``include_usage``."""
    with client.stream("POST", CHAT, json=body(CHAT, "alpha")) as response:
        *_, last, usage = events(response)
    assert last["choices"][0]["finish_reason"] == "stop"
    assert usage["choices"] == []
    assert usage["usage"] == {"prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10}


def test_a_responses_stream_ends_with_its_usage(client):
    """And begins with the response's creation, as codex wants it."""
    with client.stream("POST", RESPONSES, json=body(RESPONSES, "alpha")) as response:
        first, *_, item, last = events(response)
    assert first["type"] == "response.created"
    assert item["item"]["content"][0]["text"] == "turn 1: alpha; earlier: []"
    assert last["type"] == "response.completed"
    assert last["response"]["usage"] == {"input_tokens": 5, "output_tokens": 5, "total_tokens": 10}


@pytest.mark.parametrize("stream", [True, False])
def test_opencodes_shell_tool_is_called(client, stream):
    """And what it brought back is told."""
    asked = body(CHAT, "/tool echo hi", tools=[BASH], stream=stream)
    response = client.post(CHAT, json=asked)
    if stream:
        calls = [event["choices"][0]["delta"].get("tool_calls") for event in events(response) if event["choices"]]
        (call,) = next(filter(None, calls))
    else:
        (call,) = response.json()["choices"][0]["message"]["tool_calls"]
    assert call["function"] == {"name": "bash", "arguments": '{"command": "echo hi"}'}
    output = [
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": "hi\n"},
    ]
    again = client.post(CHAT, json={**asked, "messages": asked["messages"] + output, "stream": False})
    assert again.json()["choices"][0]["message"]["content"] == "tool said: hi\n"


def test_codexs_shell_tool_is_called(client):
    """And what it printed is told, without the time it took."""
    asked = body(RESPONSES, "!tool echo hi", tools=[EXEC_COMMAND])
    items = [event.get("item") for event in events(client.post(RESPONSES, json=asked))]
    (call,) = filter(None, items)
    assert (call["type"], call["name"], json.loads(call["arguments"])["cmd"]) == (
        "function_call",
        "exec_command",
        "echo hi",
    )
    text = "Chunk ID: ab12\nWall time: 0.1 seconds\nProcess exited with code 0\nOutput:\nhi\n"
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": text}
    again = client.post(RESPONSES, json={**asked, "input": [*asked["input"], call, output]})
    assert "".join(words(RESPONSES, again)) == "tool said: hi\n"


def test_an_agent_without_a_shell_tool_is_told_so(client):
    """Instead of a call that it does not know."""
    response = client.post(CHAT, json=body(CHAT, "/tool echo hi"))
    assert (response.status_code, response.json()["error"]["message"]) == (400, "no shell tool is offered")


@pytest.mark.parametrize("path", [CHAT, RESPONSES])
def test_slow_comes_word_by_word(llm, client, path):
    """Spread over the time it was told."""
    began = time.monotonic()
    with client.stream("POST", path, json=body(path, "/slow 3 one two three")) as response:
        arrived = [(word, llm.requests[-1].state) for word in words(path, response)]
    assert [word for word, _ in arrived] == ["one ", "two ", "three"]
    assert arrived[0][1] == "open"
    assert time.monotonic() - began > 2.9


@pytest.mark.parametrize("path", [CHAT, RESPONSES])
@pytest.mark.parametrize("text", ["/hang", "/slow 60 one two"])
def test_a_client_that_hangs_up_is_noticed(llm, path, text):
    """At once, not with the next word."""
    with httpx.Client(base_url=llm.url) as client, client.stream("POST", path, json=body(path, text)) as response:
        stream = events(response)  # kept: with it the response would be closed
        assert next(stream)
        assert [request.state for request in llm.requests] == ["open"]
    wait_until(lambda: [request.state for request in llm.requests] == ["aborted"], "the abort is noted", timeout=5)


def test_a_client_that_stays_is_not_aborted(llm, client):
    """Though its connection stays open for the next request, and then ends."""
    say(client, CHAT, "alpha")
    say(client, CHAT, "/slow 0.1 one two")
    client.close()
    wait_until(lambda: [request.state for request in llm.requests] == ["done", "done"], "both have ended")


def test_a_hanging_answer_does_not_outlive_the_server():
    """Its client sees the connection end, and no thread is left."""
    with ThreadPoolExecutor() as threads:
        with FakeLlm() as llm:
            task = threads.submit(httpx.post, llm.url + CHAT, json=body(CHAT, "/hang"), timeout=20)
            wait_until(lambda: llm.requests, "the request has arrived")
            began = time.monotonic()
        assert time.monotonic() - began < 15  # not when its client gives up
        with pytest.raises(httpx.RemoteProtocolError):
            task.result()
    assert [request.state for request in llm.requests] == ["open"]


@pytest.mark.parametrize(("text", "status"), [("/error", 500), ("!error 429", 429)])
def test_an_error_is_an_http_error(client, text, status):
    """With a body as OpenAI's."""
    response = client.post(CHAT, json=body(CHAT, text))
    assert (response.status_code, response.json()["error"]["message"]) == (status, "told to fail")


def test_the_wrong_key_is_refused():
    """On every path, and the request is not recorded."""
    with FakeLlm(api_key="right") as llm, httpx.Client(base_url=llm.url) as client:
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            assert client.get("/v1/models", headers=headers).status_code == 401
            for path in (CHAT, RESPONSES):
                assert client.post(path, json=body(path, "alpha"), headers=headers).status_code == 401
        assert llm.requests == []
        client.headers["Authorization"] = "Bearer right"
        assert say(client, CHAT, "alpha").startswith("turn 1")
        assert client.get("/v1/models").json()["data"][0]["id"] == "fake"


def test_other_paths_do_not_exist(client):
    """And the connection goes on after it."""
    assert client.post("/v1/other", json={}).status_code == 404
    assert client.get("/v1/other").status_code == 404
    assert say(client, CHAT, "alpha").startswith("turn 1")


def test_a_title_is_no_turn(llm, client):
    """What opencode asks in passing is answered and told apart."""
    system = {"role": "system", "content": "You are a title generator. You output ONLY a thread title."}
    user = [
        {"role": "user", "content": "Generate a title for this conversation:\n"},
        {"role": "user", "content": "/hang"},
    ]
    done = client.post(CHAT, json={"messages": [system, *user]}).json()
    assert done["choices"][0]["message"]["content"] == "A title"
    assert [request.kind for request in llm.requests] == ["title"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/tool", "turn 1: /tool; earlier: []"),
        ("/slow down", "turn 1: /slow down; earlier: []"),
        ("/hanger", "turn 1: /hanger; earlier: []"),
        ("/error 200", "turn 1: /error 200; earlier: []"),
    ],
)
def test_what_only_looks_like_an_order_is_text(text, expected):
    """No text makes the server fail."""
    assert answer([Message("user", text)]) == Answer(expected)


class _Client(acp.Client):
    """Keeps what the agent says; allows what it asks for."""

    def __init__(self) -> None:
        self.text = ""
        self.asked = 0

    async def session_update(self, session_id: str, update: Any, **_more: Any) -> None:
        if isinstance(update, acp.schema.AgentMessageChunk):
            self.text += update.content.text

    async def request_permission(self, session_id: str, tool_call: Any, options: Any, **_more: Any) -> Any:
        self.asked += 1
        allow = next(option for option in options if option.kind == "allow_once")
        outcome = acp.schema.AllowedOutcome(outcome="selected", option_id=allow.option_id)
        return acp.RequestPermissionResponse(outcome=outcome)

    def on_connect(self, conn: Any) -> None:
        pass


async def _converse(command: list[str], env: dict[str, str], folder: Path, texts: list[str]) -> tuple[list[str], int]:
    """What a new session of an agent answers to *texts*, one after the other; and how often it asked for leave."""
    client = _Client()
    answers = []
    with (folder / "stderr").open("wb") as stderr:
        async with acp.spawn_agent_process(client, *command, env=env, transport_kwargs={"stderr": stderr}) as (
            agent,
            _,
        ):
            await agent.initialize(protocol_version=acp.PROTOCOL_VERSION)
            session = await agent.new_session(cwd=str(folder), mcp_servers=[])
            for text in texts:
                client.text = ""
                done = await agent.prompt(prompt=[acp.text_block(text)], session_id=session.session_id)
                assert done.stop_reason == "end_turn", (folder / "stderr").read_text()
                answers.append(client.text)
    return answers, client.asked


def codex(folder: Path, url: str) -> tuple[list[str], dict[str, str]]:
    home = codex_home(folder, url, api_key="key")
    return home.command, home.env


def opencode(folder: Path, url: str) -> tuple[list[str], dict[str, str]]:
    home = opencode_home(folder, url, api_key="key")
    return home.acp_command, home.env


@pytest.mark.parametrize("make", [codex, opencode])
def test_a_real_agent_remembers_and_uses_its_shell(tmp_path, make: Callable[..., tuple[list[str], dict[str, str]]]):
    """Its second answer names the first text; its third brings what a command printed, after it asked for leave."""
    with FakeLlm(api_key="key") as llm:
        command, env = make(tmp_path / "home", llm.url)
        texts = ["alpha", "beta", "!tool touch made; echo done"]
        answers, asked = asyncio.run(_converse(command, env, tmp_path, texts))
    assert answers == ["turn 1: alpha; earlier: []", "turn 2: beta; earlier: [alpha]", "tool said: done\n"]
    assert asked == 1
    assert (tmp_path / "made").exists()
    turns = [request.users for request in llm.requests if request.kind == "turn"]
    assert turns == [tuple(texts[:1]), tuple(texts[:2]), tuple(texts), tuple(texts)]
