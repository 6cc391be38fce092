"""What is kept of a turn, and what is passed on."""

import json

import pytest

from pool.backends.turn import MAX_TEXT, MAX_TOOLS, Collector, Turn, UpdateReader


class Follower:
    """A sink that keeps what it gets, and is full when told so."""

    def __init__(self):
        self.updates = []
        self.is_full = False
        self.waiting = None

    def push(self, stream, data):
        UpdateReader(self.updates.append)(stream, data)

    def full(self, resume):
        self.waiting = resume if self.is_full else None
        return self.is_full


@pytest.fixture
def follower():
    return Follower()


@pytest.fixture
def collector(follower):
    return Collector(follower)


def test_a_turn_is_all_that_was_said(collector, follower):
    """In one piece at the end, piece by piece for the follower."""
    for text in ("a", "ü", "\x00\n"):
        collector.say(text)
    assert collector.turn("end_turn") == Turn("aü\x00\n", "end_turn")
    assert follower.updates == [{"type": "text", "text": text} for text in ("a", "ü", "\x00\n")]


@pytest.mark.parametrize("sizes", [[MAX_TEXT], [MAX_TEXT - 1, 1], [MAX_TEXT, 0, 0]])
def test_as_much_text_as_is_kept_is_not_truncated(collector, sizes):
    """The bound itself is inside."""
    for size in sizes:
        collector.say("x" * size)
    turn = collector.turn("end_turn")
    assert (len(turn.text), turn.truncated) == (MAX_TEXT, False)


@pytest.mark.parametrize("sizes", [[MAX_TEXT + 1], [MAX_TEXT, 1], [MAX_TEXT - 1, 5, 5]])
def test_more_text_than_is_kept_is_cut_and_told(collector, follower, sizes):
    """The beginning stays; the follower gets everything."""
    for size in sizes:
        collector.say("x" * size)
    turn = collector.turn("end_turn")
    assert (len(turn.text), turn.truncated) == (MAX_TEXT, True)
    assert sum(len(update["text"]) for update in follower.updates) == sum(sizes)


def test_a_tool_call_grows_as_it_goes(collector, follower):
    """What an update does not name stays; calls are in the order of their begin."""
    collector.tool("b", {"title": "Build", "kind": "execute", "status": "pending"})
    collector.tool("a", {"title": None, "kind": None, "status": None})
    collector.tool("b", {"title": None, "kind": None, "status": "completed"})
    assert collector.turn("end_turn").tool_calls == [
        {"id": "b", "title": "Build", "kind": "execute", "status": "completed"},
        {"id": "a", "title": "", "kind": "other", "status": "pending"},
    ]
    assert [update["status"] for update in follower.updates] == ["pending", "pending", "completed"]
    assert (collector.kind_of("b"), collector.kind_of("a"), collector.kind_of("c")) == ("execute", "other", None)


def test_tools_and_permissions_are_bounded(collector):
    """An agent without end does not fill the memory, and known calls still change."""
    for number in range(MAX_TOOLS + 5):
        collector.tool(str(number), {"status": "pending"})
        collector.permission("t", "read", "deny")
    collector.tool("0", {"status": "completed"})
    turn = collector.turn("end_turn")
    assert (len(turn.tool_calls), len(turn.permissions)) == (MAX_TOOLS, MAX_TOOLS)
    assert turn.tool_calls[0]["status"] == "completed"


def test_permissions_are_kept_and_passed_on(collector, follower):
    """With their answer."""
    asked = {"title": "rm", "kind": "delete", "answer": "deny"}
    collector.permission(**asked)
    assert collector.turn("end_turn").permissions == [asked]
    assert follower.updates == [{"type": "permission", **asked}]


def test_without_a_follower_everything_is_kept_and_nothing_waits():
    """And what only followers see is counted."""
    collector = Collector()
    collector.say("a")
    collector.report({"type": "plan"})
    assert collector.full(lambda: None) is False
    assert (collector.text, collector.count) == ("a", 2)


def test_who_waits_for_a_follower_that_is_detached_goes_on(collector, follower):
    """Nothing is passed on any more, and nothing is full; what is kept goes on."""
    woken = []
    follower.is_full = True
    assert collector.full(lambda: woken.append(1)) is True
    collector.detach()
    assert woken == [1]
    assert collector.full(lambda: None) is False
    collector.say("a")
    assert follower.updates == []
    assert collector.text == "a"


def test_an_update_is_read_as_it_was_written():
    """Whatever characters it has."""
    seen = []
    UpdateReader(seen.append)("stdout", json.dumps({"type": "text", "text": "\ud800\n"}).encode())
    assert seen == [{"type": "text", "text": "\ud800\n"}]
