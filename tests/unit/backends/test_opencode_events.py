"""What the events of an opencode server say about a turn, in whatever order and shape they come."""

import asyncio
import contextlib
import json

import httpx
import pytest

from pool.backends import opencode_events
from pool.backends.opencode_events import EventStream, TurnEvents
from pool.backends.opencode_server import OpencodeServer
from pool.backends.turn import Collector
from pool.errors import BackendUnavailable

SESSION = "ses_1"


def event(kind, **properties):
    return {"type": kind, "properties": {"sessionID": SESSION, **properties}}


def message(role, id):
    info = {"id": id, "sessionID": SESSION, "role": role, "parentID": "msg_u", "time": {"created": 1}}
    return event("message.updated", info=info)


def part(id, message, text="", kind="text", **fields):
    body = {"id": id, "sessionID": SESSION, "messageID": message, "type": kind, "text": text, "time": {"start": 1}}
    return event("message.part.updated", part={**body, **fields}, time=1)


def delta(id, message, text, field="text"):
    return event("message.part.delta", messageID=message, partID=id, field=field, delta=text)


def tool(status, name="bash", message="msg_a", call="call_1", **state):
    state = {"status": status, "input": {"command": "make all"}, **state}
    body = {"id": "prt_t", "messageID": message, "type": "tool", "tool": name, "callID": call, "state": state}
    return event("message.part.updated", part=body)


def permission(**properties):
    asked = {"id": "per_1", "permission": "bash", "patterns": ["touch once"], "metadata": {"command": "touch once"}}
    return event("permission.asked", **{**asked, **properties})


class Reader:
    """A sink that keeps what is passed on."""

    def __init__(self):
        self.updates = []

    def push(self, stream, data):
        self.updates.append(json.loads(data))

    def full(self, resume):
        return False


class Listener:
    """`TurnEvents`, and all that came of them."""

    def __init__(self, earlier=()):
        self.reader = Reader()
        self.collector = Collector(self.reader)
        self.asked = []
        self.events = TurnEvents(self.collector, lambda *asked: self.asked.append(asked), earlier)

    def hear(self, *events):
        for each in events:
            self.events(each)

    @property
    def idle(self):
        return self.events._idle

    def updates(self, kind):
        return [update for update in self.reader.updates if update["type"] == kind]


@pytest.fixture
def listener():
    return Listener()


@pytest.fixture
def turn(listener):
    """A listener that knows both messages of a turn."""
    listener.hear(message("user", "msg_u"), part("prt_u", "msg_u", "do it"), message("assistant", "msg_a"))
    return listener


# -- text


def test_the_users_own_words_are_not_the_agents(turn):
    """They come back whole and, it may be, in pieces."""
    turn.hear(delta("prt_u", "msg_u", "do it"), part("prt_u", "msg_u", "do it"))
    assert turn.collector.text == ""
    assert turn.reader.updates == []


def test_what_belongs_to_no_known_message_is_nobodys(turn):
    """Of an earlier turn, or of another client."""
    turn.hear(delta("prt_x", "msg_x", "old"), part("prt_x", "msg_x", "old"), tool("running", message="msg_x"))
    assert turn.reader.updates == []


def test_what_trails_from_the_turn_before_is_not_said_again(turn):
    """Its last part comes once more as a whole, and its idle, after the next turn has begun."""
    after = Listener(turn.events.messages)
    after.hear(message("assistant", "msg_a"), part("prt_a", "msg_a", "old"), event("session.idle"))
    assert (after.collector.text, after.idle) == ("", False)
    after.hear(message("assistant", "msg_b"), part("prt_b", "msg_b", "new"))
    assert after.collector.text == "new"


def test_an_answer_is_complete_when_its_text_was_reported(turn):
    """Whether the server says idle by then or not; an idle without the text means that pieces are missing."""

    async def main():
        waiting = asyncio.ensure_future(turn.events.complete("all of it"))
        for text in ("here: all", " of it"):
            assert not waiting.done()
            turn.hear(delta("prt_a", "msg_a", text))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        assert waiting.done() and waiting.result()
        silent = asyncio.ensure_future(turn.events.complete(""))
        await asyncio.sleep(0)
        assert not silent.done()
        turn.hear(event("session.idle"))
        assert await silent
        assert not await turn.events.complete("never said")

    asyncio.run(main())


def test_text_that_comes_in_pieces_is_passed_on_in_pieces(turn):
    """The whole part at the end says nothing new."""
    turn.hear(
        part("p", "msg_a"), delta("p", "msg_a", "turn "), delta("p", "msg_a", "one"), part("p", "msg_a", "turn one")
    )
    assert turn.updates("text") == [{"type": "text", "text": "turn "}, {"type": "text", "text": "one"}]
    assert turn.collector.text == "turn one"


def test_text_that_comes_whole_is_passed_on_whole(turn):
    """Once, however often it is told."""
    for _ in range(3):
        turn.hear(part("p", "msg_a", "all of it"))
    assert turn.updates("text") == [{"type": "text", "text": "all of it"}]


def test_a_part_that_grows_is_passed_on_as_it_grows(turn):
    """Each time what is new; pieces may follow, and another growth."""
    turn.hear(part("p", "msg_a", "one"), part("p", "msg_a", "one two"), delta("p", "msg_a", " three"))
    turn.hear(part("p", "msg_a", "one two three four"))
    assert [update["text"] for update in turn.updates("text")] == ["one", " two", " three", " four"]


def test_an_older_state_of_a_part_takes_nothing_back(turn):
    """Nor is it said again, and what follows is still only what is new."""
    turn.hear(part("p", "msg_a", "one two"), part("p", "msg_a", "one"), part("p", "msg_a", ""))
    turn.hear(delta("p", "msg_a", "!"), part("p", "msg_a", "one two!"))
    assert turn.collector.text == "one two!"
    turn.hear(part("p", "msg_a", "one"), part("p", "msg_a", "one two! three"))
    assert turn.collector.text == "one two! three"


def test_words_that_were_changed_afterwards_are_not_said_again(turn):
    """What was passed on cannot be taken back; a rest of other words would be nonsense."""
    turn.hear(part("p", "msg_a", "one two"), part("p", "msg_a", "ONE AND two"))
    assert turn.collector.text == "one two"


def test_the_same_words_twice_are_two_pieces(turn):
    """A piece is no state."""
    turn.hear(delta("p", "msg_a", "ha"), delta("p", "msg_a", "ha"), part("p", "msg_a", "haha"))
    assert turn.collector.text == "haha"


def test_two_parts_do_not_mix(turn):
    """Text before and after a tool."""
    turn.hear(delta("p", "msg_a", "first "), delta("q", "msg_a", "second "), delta("p", "msg_a", "more "))
    turn.hear(part("p", "msg_a", "first more "), part("q", "msg_a", "second "))
    assert turn.collector.text == "first second more "


def test_a_turn_may_have_several_messages(turn):
    """One for each step."""
    turn.hear(message("assistant", "msg_b"), delta("p", "msg_a", "a"), delta("q", "msg_b", "b"))
    assert turn.collector.text == "ab"


def test_a_piece_of_another_field_is_no_text(turn):
    """Such as a tool's output."""
    turn.hear(delta("p", "msg_a", "x", field="output"))
    assert turn.reader.updates == []


# -- thoughts and tools


def test_thoughts_are_passed_on_and_are_no_text(turn):
    """The turn's text is what was said."""
    turn.hear(
        part("r", "msg_a", kind="reasoning"), delta("r", "msg_a", "hm"), part("r", "msg_a", "hm", kind="reasoning")
    )
    assert turn.updates("thought") == [{"type": "thought", "text": "hm"}]
    assert turn.collector.text == ""


def test_a_tool_is_told_with_each_change(turn):
    """In the words that all agents have."""
    turn.hear(tool("pending", input={}), tool("running"), tool("completed", title="Build all"))
    first = {"type": "tool", "id": "call_1", "title": "bash", "kind": "execute", "status": "pending"}
    assert turn.updates("tool") == [
        first,
        {**first, "title": "make all", "status": "in_progress"},
        {**first, "title": "Build all", "status": "completed"},
    ]
    assert turn.collector.turn("end_turn").tool_calls == [
        {"id": "call_1", "title": "Build all", "kind": "execute", "status": "completed"}
    ]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("read", "read"), ("write", "edit"), ("grep", "search"), ("webfetch", "fetch"), ("mcp_x", "other")],
)
def test_a_tool_has_the_kind_that_the_policy_knows(name, kind, turn):
    """One that nobody knows is another one."""
    turn.hear(tool("error", name))
    assert turn.updates("tool")[0]["kind"] == kind
    assert turn.updates("tool")[0]["status"] == "failed"


def test_a_tool_that_says_little_is_told_by_its_name(turn):
    """No state, no input."""
    body = {"id": "prt_t", "messageID": "msg_a", "type": "tool", "tool": "bash", "callID": "c"}
    turn.hear(event("message.part.updated", part=body))
    turn.hear(event("message.part.updated", part={**body, "state": {"status": None, "input": None}}))
    assert (
        turn.updates("tool")
        == [{"type": "tool", "id": "c", "title": "bash", "kind": "execute", "status": "pending"}] * 2
    )


@pytest.mark.parametrize("kind", ["step-start", "step-finish", "snapshot", "patch", "file"])
def test_parts_of_other_kinds_say_nothing(kind, turn):
    """They are opencode's own business."""
    turn.hear(part("s", "msg_a", kind=kind))
    assert turn.reader.updates == []


# -- permissions


@pytest.mark.parametrize(
    ("properties", "expected"),
    [
        ({}, ("per_1", "execute", "touch once")),
        ({"metadata": {}}, ("per_1", "execute", "touch once")),
        ({"metadata": None, "patterns": ["a", "b"]}, ("per_1", "execute", "a b")),
        ({"metadata": {"command": "make"}}, ("per_1", "execute", "make")),
        ({"metadata": None, "patterns": None}, ("per_1", "execute", "bash")),
        ({"permission": "edit", "metadata": {}, "patterns": ["f.c"]}, ("per_1", "edit", "f.c")),
        (
            {"permission": "external_directory", "metadata": {}, "patterns": []},
            ("per_1", "other", "external_directory"),
        ),
        ({"metadata": ["odd"], "patterns": [3, "b"]}, ("per_1", "execute", "3 b")),
        ({"metadata": "odd", "patterns": "all"}, ("per_1", "execute", "bash")),
        ({"permission": None, "metadata": None, "patterns": None}, ("per_1", "other", "None")),
    ],
)
def test_each_request_for_a_permission_is_passed_on(properties, expected, turn):
    """With its kind and what it is about; one of odd shape, too: unanswered, the turn would never end."""
    turn.hear(permission(**properties))
    assert turn.asked == [expected]


def test_a_permission_may_be_asked_before_the_message_is_known(listener):
    """It is answered all the same."""
    listener.hear(permission())
    assert len(listener.asked) == 1


# -- the end


def test_a_turn_is_over_when_the_session_is_idle_after_the_agent_spoke(turn):
    """Told twice, it is so still."""
    assert not turn.idle
    turn.hear(event("session.idle"))
    assert turn.idle
    turn.hear(event("session.idle"))
    assert turn.idle


def test_the_end_of_an_earlier_turn_is_not_the_end_of_this_one(listener):
    """It may come late, when this one's agent has not begun to speak."""
    listener.hear(event("session.idle"), message("user", "msg_u"), event("session.idle"))
    assert not listener.idle
    listener.hear(message("assistant", "msg_a"), event("session.idle"))
    assert listener.idle


def test_text_that_comes_after_the_end_is_kept(turn):
    """Events and answers come by different connections."""
    turn.hear(event("session.idle"), part("p", "msg_a", "late"))
    assert turn.collector.text == "late"


@pytest.mark.parametrize("kind", ["server.heartbeat", "session.updated", "session.status", "file.edited", None])
def test_other_events_say_nothing(kind, turn):
    """There are many, and there will be more."""
    turn.hear(event(kind))
    assert (turn.reader.updates, turn.asked, turn.idle) == ([], [], False)


# -- the stream


class Response:
    """What ``GET /event`` answers: lines, then an end, or nothing any more."""

    def __init__(self, lines, stays):
        self.lines, self.stays = lines, stays

    def raise_for_status(self):
        pass

    async def aiter_lines(self):
        for line in self.lines:
            yield line
        if self.stays:
            await asyncio.Event().wait()


class Client:
    """An httpx client whose requests end as a test has it: an error, or the lines of a `Response`."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = []

    @contextlib.asynccontextmanager
    async def stream(self, method, path, params, timeout):
        self.asked.append((method, path, params))
        answer = self.answers.pop(0) if self.answers else []
        if isinstance(answer, Exception):
            raise answer
        yield Response(answer, not self.answers)


def data(event):
    return "data: " + json.dumps(event)


def follow(client, dispatch, check):
    """Run *check* (a coroutine function) on a stream."""

    async def main():
        stream = EventStream(client, "/srv/c1", dispatch)
        try:
            return await check(stream)
        finally:
            await stream.close()

    return asyncio.run(asyncio.wait_for(main(), 10))


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(opencode_events, "_PAUSE", 0.001)
    monkeypatch.setattr(opencode_events, "_LONGEST_PAUSE", 0.002)


ODD = [
    "",
    "no json",
    "3",
    "null",
    "[]",
    '"text"',
    "{}",
    '{"type": "message.updated"}',
    '{"type": "message.updated", "properties": null}',
    '{"type": "message.updated", "properties": []}',
    '{"type": "message.updated", "properties": {"sessionID": "ses_1"}}',
    '{"type": "message.updated", "properties": {"sessionID": "ses_1", "info": 3}}',
    '{"type": "message.updated", "properties": {"sessionID": "ses_1", "info": {"id": [], "role": "user"}}}',
    '{"type": "message.part.updated", "properties": {"sessionID": "ses_1", "part": null}}',
    '{"type": "message.part.updated", "properties": {"sessionID": "ses_1", "part": {"messageID": []}}}',
    '{"type": "message.part.updated", "properties": {"sessionID": "ses_1", "part": {"messageID": "msg_a"}}}',
    '{"type": "message.part.delta", "properties": {"sessionID": "ses_1"}}',
    json.dumps(delta("p", "msg_a", 3)),
    '{"type": "permission.asked", "properties": {"sessionID": "ses_1"}}',
    '{"type": ["session.idle"], "properties": {"sessionID": {"a": 1}}}',
]


@pytest.mark.parametrize("odd", ODD)
def test_an_event_of_odd_shape_does_not_end_the_stream(odd, turn):
    """All chats of a folder hang on it; the events after it are heard."""

    async def check(stream):
        stream._take(odd)
        stream._take(json.dumps(part("p", "msg_a", "heard")))
        stream._take(json.dumps(event("session.idle")))

    server = OpencodeServer(url="http://127.0.0.1:1")
    with server.turn(SESSION, turn.events):
        follow(Client(), server._dispatch, check)
    assert turn.collector.text == "heard"
    assert turn.idle


def test_each_session_hears_its_own_events(turn):
    """And nobody hears those of a session without a turn."""
    server, other = OpencodeServer(url="http://127.0.0.1:1"), Listener()
    with server.turn("ses_2", other.events):
        with server.turn(SESSION, turn.events):
            assert server.is_busy()
            server._dispatch(part("p", "msg_a", "mine"))
        server._dispatch(part("p", "msg_a", "mine and more"))
    assert turn.collector.text == "mine"
    assert other.reader.updates == []
    assert not server.is_busy()


def test_a_stream_passes_on_what_is_data():
    """Of one folder; comments and empty lines are none."""
    heard = []
    client = Client([": hello", "event: message", data({"type": "a"}), "", 'data:{"type": "b"}', "data: [1]"])

    async def check(stream):
        await stream.connected(5)
        while len(heard) < 2:
            await asyncio.sleep(0)
        assert stream.breaks == 0
        assert stream.heard_at > 0

    follow(client, heard.append, check)
    assert heard == [{"type": "a"}, {"type": "b"}]
    assert client.asked == [("GET", "/event", {"directory": "/srv/c1"})]


@pytest.mark.parametrize(
    "broken", [httpx.ConnectError("refused"), httpx.ReadTimeout("silent"), RuntimeError("client was closed"), [data({"a": 1})]]
)  # fmt: skip
def test_a_stream_that_breaks_is_asked_for_again(broken, quick):
    """And the break is counted: events may be missing."""
    heard = []
    client = Client(broken, httpx.ConnectError("refused"), [data({"type": "again"})])

    async def check(stream):
        while {"type": "again"} not in heard:
            await asyncio.sleep(0.001)
        assert stream.breaks == 2
        await stream.connected(5)

    follow(client, heard.append, check)
    assert len(client.asked) == 3


def test_a_stream_without_an_event_is_not_connected():
    """A turn that began now would not be heard."""

    async def check(stream):
        with pytest.raises(BackendUnavailable, match=r"no events of the opencode server within 0\.01 s") as caught:
            await stream.connected(0.01)
        assert caught.value.retry_after == 0.0

    follow(Client([": nothing yet"]), lambda event: None, check)


def test_a_stream_that_broke_is_not_connected_until_it_is_back(monkeypatch):
    """Whoever follows it waits for the next event."""
    monkeypatch.setattr(opencode_events, "_PAUSE", 1000.0)
    heard = []

    async def check(stream):
        while not stream.breaks:
            await asyncio.sleep(0)
        assert heard == [{"type": "a"}]
        with pytest.raises(BackendUnavailable):
            await stream.connected(0.01)

    follow(Client([data({"type": "a"})], []), heard.append, check)
