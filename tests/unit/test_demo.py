"""What the demo's verdict is made of: a run in which something went wrong must not look well."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from pool.demo.takeover import Build, Takeover

A, B, C, A2 = ("node-a@x", 1), ("node-b@x", 2), ("node-c@x", 3), ("node-a@x", 4)
KILLED, RESTARTED = 10.0, 20.0


def run(*places: tuple[tuple[str, int], float], error: str = "", lost: bool = False) -> Takeover:
    """A run in which node-a was killed under its user, with a build for each (place, start)."""
    demo = Takeover(SimpleNamespace(console=None, folder=Path("none")), users=1)
    demo.killed, demo.killed_at, demo.restarted_at, demo.back_s = "node-a", KILLED, RESTARTED, 1.0
    demo.moved, demo.cut = {"user-01"}, []
    for number, (place, start) in enumerate(places):
        demo.builds[number] = Build("user-01", None, [start], [start + 1], place)
    demo.builds[98] = Build("user-01", None, [30.0], [31.0], None if lost or error else places[-1][0], error)
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


@pytest.mark.parametrize("wrong", [{"error": "user-01: it failed"}, {"lost": True}])
def test_a_build_that_failed_or_never_ended_is_told(wrong) -> None:
    """The rest of the run was fine."""
    report = run((A, 1.0), (B, 15.0), **wrong)._report()
    assert not report.ok
    assert report.failed + report.lost == 1
