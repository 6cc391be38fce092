"""The checker of the real-process tests sees what it is there for: made-up ledgers, most of them bad."""

import subprocess
from dataclasses import replace

import pytest

from tests.support.ledger import COMMAND, Build, Ledger, check, environment, read
from tests.support.processes import wait_group_gone

A, B = "one@x:10", "two@y:20"


def build(id: str, began: int, ended: int | None, *, worker: str = A, epoch: int = 5, **more: object) -> Build:
    made = Build(id, "user-1", epoch, f"task-{id}", worker, 0.1, 77, began, ended)
    return replace(made, **more)


GOOD = [
    build("a", 0, 10),
    build("b", 5, 15, beside=((A, "a"),)),
    build("c", 20, 30, worker=B, epoch=7),
    build("d", 40, None, worker=B, epoch=7),
    build("e", 50, 60, worker=A, epoch=9, task="task-d"),
]
SENT = ["task-a", "task-b", "task-c", "task-d"]


def wrong(builds: list[Build], sent: list[str] = SENT, **more: object) -> set[str]:
    return set(check(builds, sent, 2, **more).wrong)


def test_a_good_ledger_has_nothing_wrong_and_tells_what_was_killed():
    """Two at once in one process, a handoff, a kill and its repetition."""
    account = check(GOOD, SENT, 2)
    assert not account.wrong
    assert account.duplicates == {}
    assert [build.id for build in account.killed] == ["d"]


def test_a_task_that_only_began_is_lost():
    """A start without an end is no work done."""
    assert wrong(GOOD[:4]) == {"lost"}


def test_a_task_without_a_build_is_lost():
    assert wrong(GOOD, [*SENT, "task-f"]) == {"lost"}


def test_a_task_that_ran_to_the_end_twice_is_counted():
    assert check([*GOOD, build("f", 70, 80, worker=A, epoch=9, task="task-a")], SENT, 2).duplicates == {"task-a": 2}


def test_two_workers_at_once_are_seen_by_their_times():
    """Even if the builds did not notice each other."""
    assert wrong([*GOOD, build("f", 25, 70, worker=A, epoch=9, task="task-a")]) == {"overlaps"}


def test_two_workers_at_once_are_seen_though_the_first_was_killed():
    """The start line of the second one says that it was not alone."""
    beside = [*GOOD[:4], replace(GOOD[4], beside=((B, "d"),))]
    assert wrong(beside) == {"overlaps"}


def test_two_processes_of_one_node_are_two_workers():
    assert wrong([*GOOD[:3], build("d", 25, 60, worker="two@y:21", epoch=7, task="task-d")]) == {"overlaps"}


def test_an_epoch_that_goes_back_between_processes_is_seen():
    """The old owner goes on after the new one has begun."""
    assert wrong([*GOOD, build("f", 70, 80, worker=B, epoch=7, task="task-a")]) == {"backwards"}


def test_two_nodes_under_one_epoch_are_seen():
    assert wrong([*GOOD[:3], build("d", 40, 60, worker=A, epoch=7, task="task-d")]) == {"backwards"}


def test_a_build_without_a_lease_is_seen():
    assert wrong([replace(GOOD[0], epoch=0), *GOOD[1:]]) == {"unowned"}


def test_one_build_too_many_of_a_key_is_seen():
    """Three at once where two are allowed; one that had just ended does not count."""
    crowd = [*GOOD, build("f", 8, 12, beside=((A, "a"), (A, "b")), task="task-a")]
    assert wrong(crowd) == {"crowded"}
    assert not wrong([*GOOD, build("f", 12, 14, beside=((A, "a"), (A, "b")), task="task-a")])


def test_a_task_that_nobody_sent_is_seen_and_a_doubtful_one_is_not_held_against_anyone():
    assert wrong(GOOD, SENT[:3]) == {"strangers"}
    assert not wrong(GOOD, SENT[:3], doubtful=["task-d"])


def test_a_line_that_no_build_has_written_is_refused():
    with pytest.raises(ValueError, match="not a line"):
        read("start 12 abc\n")


def run(ledger: Ledger, worker: str, key: str, seconds: float) -> subprocess.Popen[bytes]:
    node, _, pid = worker.partition(":")
    env = environment(str(ledger.folder), key, 5, f"task-{worker}", node, int(pid), seconds)
    return subprocess.Popen(["/bin/sh", "-c", COMMAND], env=env, start_new_session=True)


def test_the_command_keeps_the_ledger(tmp_path):
    """Start, end, and who else was there: another worker of the key, not one of another key, not one that ended."""
    ledger = Ledger(tmp_path / "ledger")
    assert run(ledger, A, "user-1", 0).wait(10) == 0
    assert run(ledger, A, "user-1", 0).wait(10) == 0
    running = [run(ledger, A, "user-1", 30), run(ledger, B, "user-10", 30)]
    while len(ledger.builds()) < 4:
        running[0].poll()
    assert run(ledger, B, "user-1", 0).wait(10) == 0
    for process in running:
        subprocess.run(["kill", "-9", "--", f"-{process.pid}"], check=True)
        process.wait(10)
        wait_group_gone(process.pid)  # with it the lock, which its sleep holds too
    assert run(ledger, B, "user-1", 0).wait(10) == 0
    first, second, *both, disturbing, last = ledger.builds()
    (long,) = (build for build in both if build.key == "user-1")  # either may have written first
    assert first.ended and first.began < first.ended < second.began
    assert (long.ended, long.group) == (None, running[0].pid)
    assert disturbing.beside == ((A, long.id),)
    assert (second.beside, last.beside) == ((), ())
    assert [overlap.other for overlap in check(ledger.builds(), [], 4).overlaps] == [A]
