"""Turns to log in: bounded, fair between users, and no cancel or give-up loses one."""

import asyncio
import gc
import weakref

import pytest

from pool.backends.base import Backend
from pool.backends.logins import login_line
from pool.errors import BackendUnavailable

LONG = 60.0


async def settle():
    """Let every task that can go on do so."""
    for _ in range(10):
        await asyncio.sleep(0)


class Host:
    """Logins that last until the test ends them, in the order in which they began."""

    def __init__(self, limit=1, name="host"):
        self.line, self.limit = login_line(name, 22), limit
        self.order, self.turns, self.most = [], [], 0

    async def log_in(self, user, patience=LONG):
        turn = await self.line.take(user, self.limit, patience)
        self.order.append(user)
        self.turns.append(turn)
        self.most = max(self.most, self.line.under_way)

    async def start(self, *users):
        tasks = [asyncio.create_task(self.log_in(user)) for user in users]
        await settle()
        return tasks

    async def end_all(self):
        while self.turns:
            self.turns.pop(0).over(got_in=True)
            await settle()


def test_no_more_logins_than_the_limit():
    """The others wait; each end lets one in; at the end nothing is held."""

    async def main():
        host = Host(limit=3)
        await host.start(*(f"user-{n}" for n in range(20)))
        assert (len(host.order), host.line.waiting) == (3, 17)
        await host.end_all()
        assert (len(host.order), host.most) == (20, 3)
        assert (host.line.under_way, host.line.waiting) == (0, 0)

    asyncio.run(main())


def test_a_user_with_many_logins_does_not_hold_up_another():
    """Users come round robin, whoever came first."""

    async def main():
        host = Host()
        await host.start(*["busy"] * 5, "late", "later")
        await host.end_all()
        assert host.order == ["busy", "busy", "late", "later", "busy", "busy", "busy"]

    asyncio.run(main())


def test_logins_of_one_user_are_first_come_first_served():
    """Nobody overtakes."""

    async def main():
        line, order = login_line("host", 22), []

        async def log_in(name):
            turn = await line.take("user", 1, LONG)
            order.append(name)
            turn.over()

        first = await line.take("user", 1, LONG)
        tasks = [asyncio.create_task(log_in(name)) for name in "abc"]
        await settle()
        first.over()
        await asyncio.gather(*tasks)
        assert order == ["a", "b", "c"]

    asyncio.run(main())


def test_a_user_who_comes_back_goes_to_the_end():
    """Ending a login and asking for the next one does not keep others waiting."""

    async def main():
        host = Host()
        await host.start("greedy", "other")
        await host.start("greedy")
        await host.end_all()
        assert host.order == ["greedy", "other", "greedy"]

    asyncio.run(main())


def test_nobody_overtakes_who_waits_through_a_free_place():
    """A limit that is higher than the others' lets nobody in before them."""

    async def main():
        host = Host()
        await host.start("first", "second")
        generous = asyncio.create_task(host.line.take("third", 5, LONG))
        await settle()
        assert not generous.done()
        host.turns.pop().over()
        await settle()
        assert host.order == ["first", "second"]
        assert generous.done()

    asyncio.run(main())


@pytest.mark.parametrize("cancel_first", [True, False])
def test_a_waiter_cancelled_in_the_moment_of_its_turn(cancel_first):
    """The cancel stays a cancel, and the turn goes to the next in line."""

    async def main():
        host = Host()
        tasks = await host.start("holder", "cancelled", "next")
        steps = [tasks[1].cancel, host.turns.pop().over]
        for step in steps if cancel_first else reversed(steps):
            step()
        await settle()
        assert tasks[1].cancelled()
        assert host.order == ["holder", "next"]
        assert host.line.under_way == 1

    asyncio.run(main())


def test_a_waiter_that_is_cancelled_leaves_the_line():
    """Its user's place is gone with its last login."""

    async def main():
        host = Host()
        tasks = await host.start("holder", "a", "b", "a")
        tasks[1].cancel()
        await settle()
        assert host.line.waiting == 2
        await host.end_all()
        assert host.order == ["holder", "a", "b"]
        assert (host.line.under_way, host.line.waiting) == (0, 0)

    asyncio.run(main())


def test_who_waits_with_a_lower_limit_and_goes_away_holds_nobody_up():
    """The next in line has its turn at once."""

    async def main():
        host = Host(limit=2)
        await host.start("holder")
        strict = asyncio.create_task(host.line.take("strict", 1, LONG))
        await settle()
        await host.start("other")
        assert host.order == ["holder"]
        strict.cancel()
        await settle()
        assert host.order == ["holder", "other"]

    asyncio.run(main())


def test_a_turn_that_ends_twice_frees_one_place():
    """Ending it is harmless."""

    async def main():
        host = Host(limit=2)
        await host.start("a", "b", "c", "d")
        turn = host.turns.pop(0)
        turn.over(got_in=True)
        turn.over()
        await settle()
        assert (host.line.under_way, host.line.waiting) == (2, 1)

    asyncio.run(main())


def test_a_wait_without_any_progress_says_what_it_waited_for():
    """The phase, the host, how many were before it; worth another try."""

    async def main():
        host = Host(limit=2)
        await host.start("a", "b", "c", "c", "d")
        with pytest.raises(BackendUnavailable) as caught:
            await host.line.take("d", 2, 0.01)
        assert (caught.value.reason, caught.value.retry_after) == ("timeout", 0.0)
        text = "waiting for its turn to log in to host:22: 3 before it, 2 under way, and nobody got in for 0.01 s"
        assert str(caught.value) == text
        assert host.line.waiting == 3

    asyncio.run(main())


@pytest.mark.parametrize("got_in", [True, False])
def test_a_line_that_moves_is_waited_for(got_in):
    """Each login that ends well gives everybody the full patience again; one that fails does not."""

    async def main():
        host = Host()
        await host.start("a", "b", "c")
        clock = Clock()
        asyncio.get_running_loop().time = clock
        waiting = asyncio.create_task(host.log_in("d", patience=10.0))
        await settle()
        clock.now += 9.0
        host.turns.pop().over(got_in=got_in)
        await settle()
        clock.now += 9.0
        await settle()
        if got_in:
            assert not waiting.done()
            waiting.cancel()
        else:
            assert "nobody got in for 10 s" in str(waiting.exception())

    asyncio.run(main())


class Clock:
    """The time of an event loop, moved by the test."""

    def __init__(self):
        self.now = asyncio.get_running_loop().time()

    def __call__(self):
        return self.now


def test_each_host_has_a_line_of_its_own():
    """And each port: it may be another server."""

    async def main():
        one, other = Host(name="one"), Host(name="other")
        await one.start("a")
        await other.start("a")
        assert (len(one.order), len(other.order)) == (1, 1)
        assert login_line("one", 22) is one.line
        assert login_line("one", 23) is not one.line

    asyncio.run(main())


def test_a_line_that_nobody_needs_is_forgotten():
    """Hosts come and go; their lines do too, and not before."""

    async def main():
        host = Host()
        await host.start("a")
        turn, line, host = host.turns.pop(), weakref.ref(host.line), None
        gc.collect()
        assert login_line("host", 22) is line()
        turn.over()
        gc.collect()
        assert line() is None

    asyncio.run(main())


def test_another_event_loop_has_its_own_lines():
    """What was held on a loop that is gone (a parent's, after a fork) is held no more."""

    async def hold():
        return await login_line("host", 22).take("a", 1, LONG)

    async def take():
        return await login_line("host", 22).take("b", 1, 0.01)

    held = asyncio.run(hold())
    assert asyncio.run(take()) is not held


class Waiting(Backend):
    """Waits for something that is not its host's doing, then for its host."""

    def __init__(self):
        super().__init__()
        self.turn, self.host = (asyncio.get_running_loop().create_future() for _ in range(2))

    async def open(self):
        with self.unhurried():
            await self.turn
        await self.host

    async def close(self):
        """Nothing to close."""


def test_the_pool_does_not_count_the_wait_for_a_turn():
    """Its limit stands still meanwhile, and goes on where it was."""

    async def main():
        backend = Waiting()
        clock = asyncio.get_running_loop().time = Clock()

        async def connect():
            async with asyncio.timeout(10.0) as backend.open_clock:
                await backend.connect()

        connecting = asyncio.create_task(connect())
        await settle()
        clock.now += 100.0
        await settle()
        backend.turn.set_result(None)
        await settle()
        clock.now += 9.0
        await settle()
        assert not connecting.done()
        clock.now += 2.0
        await settle()
        assert isinstance(connecting.exception(), TimeoutError)

    asyncio.run(main())
