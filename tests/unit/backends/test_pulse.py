"""What a host is told, and when: on a clock of the tests' own."""

import asyncio

import pytest

from pool.backends import pulse as pulses
from pool.backends.pulse import Pulse
from pool.errors import BackendUnavailable


class Timer:
    """A call that the loop will make."""

    def __init__(self, when, call):
        self.when, self.call, self.cancelled = when, call, False

    def cancel(self):
        self.cancelled = True


class World:
    """A clock, a loop that moves it to its next timer, and a host that hears of moments."""

    def __init__(self):
        self.now = 50.0
        self.ahead = 1000.0  # seconds of the host's clock before ours
        self.left = 8.0
        self.told = []
        self.timer = None
        self.pulse = Pulse(self.trust, self.tell)
        self.failure = None

    def trust(self):
        return self.left

    def tell(self, moment):
        if self.failure:
            raise self.failure
        self.told.append(moment)

    def sample(self, late=0.0):
        self.pulse.sample(round(100 * (self.now + self.ahead - late)))

    def call_later(self, pause, call):
        self.timer = Timer(self.now + pause, call)
        return self.timer

    def step(self):
        """Let the next beat come; return after how many seconds."""
        timer, self.timer, before = self.timer, None, self.now
        assert not timer.cancelled
        self.now = timer.when
        timer.call()
        return pytest.approx(self.now - before)


@pytest.fixture
def world(monkeypatch):
    world = World()
    monkeypatch.setattr(pulses, "monotonic", lambda: world.now)
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: world)
    world.sample()
    return world


def test_the_moment_is_told_in_the_host_s_time(world):
    """In hundredths of seconds."""
    world.pulse.start()
    assert world.told == [105_800]


@pytest.mark.parametrize(("left", "pause"), [(8.0, 2.0), (400.0, 10.0), (0.1, 0.05), (None, 1.0)])
def test_the_next_beat_comes_in_time(world, left, pause):
    """After a quarter of what is left, within bounds; soon, when a limit may come."""
    world.left = left
    world.pulse.start()
    assert world.step() == pause
    assert len(world.told) == 2


def test_without_a_limit_the_host_is_told_of_none(world):
    """Until there is one."""
    world.left = None
    world.pulse.start()
    world.left = 3.0
    world.step()
    assert world.told == [None, 105_400]


def test_a_sample_that_was_late_makes_the_moment_too_early_never_too_late(world):
    """The best of the last ones counts, not the last."""
    for late in (3.0, 0.5, 2.0):
        world.sample(late)
    world.pulse.start()
    assert world.told == [105_800]
    for _ in range(8):
        world.sample(0.5)
    world.step()
    assert world.told[1] == 105_950


def test_who_may_not_work_is_refused(world):
    """And the host is told nothing."""
    world.left = 0.0
    with pytest.raises(BackendUnavailable, match="may not work"):
        world.pulse.start()
    assert (world.told, world.timer, world.pulse.beating) == ([], None, False)


@pytest.mark.parametrize("before", [8.0, None])
def test_it_ends_with_the_trust(world, before):
    """The host is told a moment that is past: it may know of none so far."""
    world.left = before
    world.pulse.start()
    world.left = -1.0
    world.step()
    assert (world.told[1:], world.timer) == ([0], None)


@pytest.mark.parametrize("failure", [OSError("closed"), RuntimeError("a bug")])
def test_a_failure_ends_it(world, failure, caplog):
    """A closed channel is nothing special; anything else is said, and taken for the end of the trust."""
    world.pulse.start()
    world.failure = failure
    world.step()
    assert world.timer is None
    assert bool(caplog.records) == isinstance(failure, RuntimeError)


def test_a_stop_is_the_last_of_it(world):
    """Also the second one."""
    world.pulse.start()
    assert world.pulse.beating
    world.pulse.stop()
    world.pulse.stop()
    assert world.timer.cancelled
    assert not world.pulse.beating
