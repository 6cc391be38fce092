"""What the demo's verdict is made of: a run in which something went wrong must not look well."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from pool.demo.takeover import Build, Takeover
from pool.demo.talks import TOOL, AgentsReport, Talk

A, B, C, A2 = ("node-a@x", 1), ("node-b@x", 2), ("node-c@x", 3), ("node-a@x", 4)
KILLED, RESTARTED = 10.0, 20.0


def build(place: tuple[str, int] | None, start: float, error: str = "") -> Build:
    """One that took a second."""
    return Build("user-01", None, {"1": start}, {"1": start + 1}, place, "1", error)


def run(*places: tuple[tuple[str, int], float], error: str = "", lost: bool = False) -> Takeover:
    """A run in which node-a was killed under its user, with a build for each (place, start)."""
    demo = Takeover(SimpleNamespace(console=None, folder=Path("none")), users=1)
    demo.killed, demo.killed_at, demo.restarted_at, demo.back_s = "node-a", KILLED, RESTARTED, 1.0
    demo.moved, demo.cut = {"user-01"}, []
    for number, (place, start) in enumerate(places):
        demo.builds[number] = build(place, start)
    demo.builds[98] = build(None if lost or error else places[-1][0], 30.0, error)
    return demo


@pytest.mark.parametrize(
    "places",
    [
        [(A, 1.0), (B, 15.0)],
        [(A, 1.0), (A, 2.0), (B, 15.0), (A2, 25.0)],
        [(A, 1.0), (B, 15.0), (B, 21.0), (C, 25.0)],
    ],
)
def test_a_key_that_moves_once_for_the_kill_and_once_for_the_return_is_as_promised(places) -> None:
    """To whichever node the placement chose."""
    report = run(*places)._report()
    assert report.ok
    assert report.strayed == 0
    assert report.first_finished_s == 6.0


@pytest.mark.parametrize(
    "places",
    [
        [(A, 1.0), (B, 2.0), (B, 15.0)],
        [(A, 1.0), (B, 15.0), (C, 16.0)],
        [(A, 1.0), (B, 15.0), (A2, 21.0), (B, 22.0)],
    ],
)
def test_a_key_that_moves_for_no_reason_is_told(places) -> None:
    """Before the kill, twice for it, or to and fro when the node is back."""
    report = run(*places)._report()
    assert not report.ok
    assert report.strayed == 1


def test_a_user_of_a_node_that_lives_does_not_move_for_the_kill() -> None:
    """One move is the dead node's users' alone."""
    demo = run((A, 1.0), (B, 15.0))
    demo.moved = set()
    assert demo._strays("user-01")


@pytest.mark.parametrize("result_of", ["first", "second"])
def test_a_build_that_ended_before_the_kill_and_ran_again_is_where_its_result_is_from(result_of) -> None:
    """Its node died between its end and the acknowledgement; both results are right, and neither is a move."""
    demo = run((A, 1.0), (B, 15.0))
    demo.builds[50] = twice = build(A, 9.0)
    twice.starts["2"], twice.ends["2"] = 16.0, 17.0
    if result_of == "second":
        twice.place, twice.run = B, "2"
    report = demo._report()
    assert report.ok
    assert report.ended_twice == 1
    assert report.first_finished_s == 6.0


@pytest.mark.parametrize("wrong", [{"error": "user-01: it failed"}, {"lost": True}])
def test_a_build_that_failed_or_never_ended_is_told(wrong) -> None:
    """The rest of the run was fine."""
    report = run((A, 1.0), (B, 15.0), **wrong)._report()
    assert not report.ok
    assert report.failed + report.lost == 1


def answer(text: str, session: str = "s1", **fields: object) -> dict[str, object]:
    return {"text": text, "session_id": session, "memory_lost": False, "resumed": False, "node": "node-a@x", **fields}


@pytest.mark.parametrize(
    ("third", "remembers"),
    [
        (answer("turn 3: hello; earlier: [hi, !tool pwd | tee where]", resumed=True, node="node-b@x"), True),
        (answer("turn 1: hello; earlier: []"), False),
        (answer("turn 3: hello; earlier: [hi, !tool pwd | tee where]", "s2"), False),
        (answer("turn 3: hello; earlier: [hi, !tool pwd | tee where]", memory_lost=True), False),
    ],
)
def test_an_agent_remembers_only_what_it_can_tell_in_its_session(third, remembers) -> None:
    """By its text, by its session, and by what it says of itself."""
    talk = Talk("chat-01", "codex", "node-a", "/work/chat-01")
    talk.take("hi", answer("turn 1: hi; earlier: []"), 500.0)
    talk.take(TOOL, answer("tool said: /work/chat-01\n"), 100.0)
    talk.take("hello", third, 100.0)
    assert talk.remembered == 2 + remembers


def test_an_agent_that_works_elsewhere_is_not_as_promised() -> None:
    """What its command printed is no folder of the chat."""
    talk = Talk("chat-01", "codex", "node-a", "/work/chat-01")
    talk.take(TOOL, answer("tool said: /elsewhere\n"), 100.0)
    assert not talk.remembered


FINE = AgentsReport(
    chats=2,
    turns=9,
    failed=0,
    astray=0,
    forgotten=0,
    refused=0,
    cold_ms_p50={"codex": 300.0},
    server_start_ms_p50=0.0,
    warm_ms_p50={"codex": 100.0},
    evicted=2,
    evicted_resumed=2,
    killed="node-a",
    killed_chats=1,
    killed_agents=1,
    gone_s=0.4,
    killed_resumed=1,
    continued_s=7.0,
    closed=2,
)


@pytest.mark.parametrize(
    "wrong",
    [
        {"failed": 1},
        {"astray": 1},
        {"forgotten": 1},
        {"refused": 1},
        {"evicted": 0},
        {"evicted_resumed": 1},
        {"killed_chats": 0, "killed_resumed": 0},
        {"killed_resumed": 0},
        {"killed_agents": 0},
        {"closed": 1},
        {"chats": 0, "evicted_resumed": 0, "closed": 0},
    ],
)
def test_a_chat_that_did_not_go_as_promised_is_told(wrong) -> None:
    """The rest of the run was fine."""
    assert FINE.ok
    assert not replace(FINE, **wrong).ok
