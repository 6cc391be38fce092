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

    def ask(self, key, number=0, queue=None):
        job = Job(key, queue or f"q-{key}", number)
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
    for _ in range(120):
        if running and rng.random() < 0.5:
            turns.done(running.pop(rng.randrange(len(running))))
        else:
            key = rng.choice(["a", "b", "c", None])
            turns.ask(Job(key, str(key), asked[key]))
            asked[key] += 1
        count = Counter(job.key for job in running)
        assert len(running) <= places
        assert all(number <= per_key for key, number in count.items() if key is not None)
        waiting = {key for key in asked if asked[key] > sum(job.key == key for job in started)}
        idle = [key for key in waiting if key is None or count[key] < per_key]
        assert not idle or len(running) == places
    while running:
        turns.done(running.pop())
    for key, number in asked.items():
        assert [job.work for job in started if job.key == key] == list(range(number))
    assert turns.waiting == 0
