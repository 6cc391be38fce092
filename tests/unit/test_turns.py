"""Turns: who runs, who waits, and when a queue is too full."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool.worker.turns import Job, Turns


class Bench:
    """Turns, and what they have said."""

    def __init__(self, per_key=2, places=4):
        self.started = []
        self.news = []
        self.turns = Turns(per_key, places, self.started.append, lambda queue, full: self.news.append((queue, full)))

    def ask(self, key, number=0, queue=None, limit=None):
        job = Job(key, queue or f"q-{key}", number, limit)
        self.turns.ask(job)
        return job

    def numbers(self):
        return [(job.key, job.work) for job in self.started]


@pytest.fixture
def bench():
    return Bench()


def test_a_key_runs_as_many_tasks_at_once_as_it_may(bench):
    """The third of two waits until one is done."""
    jobs = [bench.ask("a", number) for number in range(3)]
    assert bench.numbers() == [("a", 0), ("a", 1)]
    bench.turns.done(jobs[1])
    assert bench.numbers() == [("a", 0), ("a", 1), ("a", 2)]


def test_a_busy_key_does_not_hold_up_another(bench):
    """Whatever waits for one key, the next key starts at once."""
    for number in range(10):
        bench.ask("a", number)
    bench.ask("b", 7)
    assert bench.numbers()[-1] == ("b", 7)


def test_the_tasks_of_a_key_start_in_order(bench):
    """Also one that comes when its key has just become free, with others waiting."""
    jobs = [bench.ask("a", number) for number in range(6)]
    while len(bench.started) < 6:
        bench.turns.done(jobs[len(bench.started) - 2])
    assert bench.numbers() == [("a", number) for number in range(6)]


def test_all_places_taken_keys_take_turns(bench):
    """No key is served twice while another one waits."""
    first = [bench.ask(key, 0) for key in "abcd"]
    for number in (1, 2):
        for key in "ab":
            bench.ask(key, number)
    for job in first:
        bench.turns.done(job)
    assert bench.numbers()[4:] == [("a", 1), ("b", 1), ("a", 2), ("b", 2)]


def test_tasks_without_a_key_are_limited_by_the_places_only(bench):
    """They have nothing to do with each other."""
    for number in range(5):
        bench.ask(None, number)
    assert len(bench.started) == 4


def test_a_queue_is_full_when_as_much_waits_as_may_run_and_open_when_half_of_it_has_gone(bench):
    """Told once each."""
    jobs = [bench.ask("a", number) for number in range(5)]
    assert bench.news == [("q-a", True)]
    bench.turns.done(jobs[0])
    assert bench.news == [("q-a", True)]
    bench.turns.done(jobs[1])
    assert bench.news == [("q-a", True), ("q-a", False)]


def test_what_waits_can_be_withdrawn_queue_by_queue(bench):
    """In order; what runs stays, and so do other queues. A queue that was full is open again."""
    for number in range(4):
        bench.ask("a", number)
    running = [bench.ask("b", number) for number in range(4)][:2]
    taken = bench.turns.withdraw({"q-a"})
    assert [(job.key, job.work) for job in taken] == [("a", 2), ("a", 3)]
    assert bench.news[-1] == ("q-a", False)
    for job in running:
        bench.turns.done(job)
    assert bench.numbers() == [("a", 0), ("a", 1), *(("b", number) for number in range(4))]
    assert bench.turns.withdraw() == []


def test_nothing_starts_after_close(bench):
    """A worker that shuts down gives it all back."""
    jobs = [bench.ask("a", number) for number in range(3)]
    bench.turns.close()
    bench.turns.done(jobs[0])
    bench.ask("b", 5)
    assert len(bench.started) == 2
    assert [(job.key, job.work) for job in bench.turns.withdraw()] == [("a", 2), ("b", 5)]


# -- lanes: jobs that name how many of them run at once


def test_a_lane_of_one_runs_one_at_a_time_in_order(bench):
    """Whatever other keys may run at once."""
    jobs = [bench.ask("a lane", number, "q", 1) for number in range(3)]
    for number, job in enumerate(jobs):
        assert bench.numbers()[-1] == ("a lane", number)
        assert len(bench.started) == number + 1
        bench.turns.done(job)


def test_a_lane_and_the_ordinary_jobs_of_its_key_do_not_wait_for_each_other(bench):
    """The lane's next one waits for the lane, theirs for them."""
    turn, ordinary = bench.ask("a lane", 0, "q", 1), [bench.ask("a", number, "q") for number in range(2)]
    bench.ask("a lane", 1, "q", 1)
    bench.ask("a", 2, "q")
    assert bench.numbers() == [("a lane", 0), ("a", 0), ("a", 1)]
    bench.turns.done(ordinary[0])
    assert bench.numbers()[3:] == [("a", 2)]
    bench.turns.done(turn)
    assert bench.numbers()[4:] == [("a lane", 1)]


def test_a_lane_may_be_wider_than_a_key():
    """Its own number counts, in both directions."""
    bench = Bench(per_key=1, places=9)
    for number in range(4):
        bench.ask("wide", number, "q", 3)
    assert len(bench.started) == 3


def test_a_lane_that_waits_leaves_its_places_to_others(bench):
    """It holds one of four; the jobs of other keys have the rest."""
    for number in range(3):
        bench.ask("a lane", number, "q", 1)
    for key in "bcd":
        bench.ask(key, 0)
    assert bench.numbers() == [("a lane", 0), ("b", 0), ("c", 0), ("d", 0)]


def test_the_jobs_of_a_lane_are_withdrawn_in_order(bench):
    """With those of their queue; the one that runs stays, and the next one that comes waits for it."""
    turn, *_ = [bench.ask("a lane", number, "q", 1) for number in range(3)]
    bench.ask("a", 0, "q"), bench.ask("a", 1, "q"), bench.ask("a", 2, "q")
    taken = bench.turns.withdraw({"q"})
    assert [(job.key, job.work) for job in taken] == [("a lane", 1), ("a lane", 2), ("a", 2)]
    assert all(job.limit == 1 for job in taken[:2])
    bench.ask("a lane", 3, "q", 1)
    assert len(bench.started) == 3
    bench.turns.done(turn)
    assert bench.numbers()[3:] == [("a lane", 3)]


@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 6))
def test_any_order_of_events_keeps_the_limits_and_starts_everything_once(seed, per_key, places):
    """Random asks and ends: never more than the limits, each key in order, nobody waits beside a free place."""
    rng = random.Random(seed)
    running, asked = [], Counter()
    started = []

    def start(job):
        running.append(job)
        started.append(job)

    turns = Turns(per_key, places, start, lambda queue, full: None)
    limits = {"a": None, "b": None, "b lane": 1, "c": 2, None: None}
    for _ in range(120):
        if running and rng.random() < 0.5:
            turns.done(running.pop(rng.randrange(len(running))))
        else:
            key = rng.choice(list(limits))
            turns.ask(Job(key, str(key)[0], asked[key], limits[key]))
            asked[key] += 1
        count = Counter(job.key for job in running)
        assert len(running) <= places
        assert all(number <= (limits[key] or per_key) for key, number in count.items() if key is not None)
        waiting = {key for key in asked if asked[key] > sum(job.key == key for job in started)}
        idle = [key for key in waiting if key is None or count[key] < (limits[key] or per_key)]
        assert not idle or len(running) == places
    while running:
        turns.done(running.pop())
    for key, number in asked.items():
        assert [job.work for job in started if job.key == key] == list(range(number))
    assert turns.waiting == 0
