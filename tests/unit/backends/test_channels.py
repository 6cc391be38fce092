"""Slots for channels: no interleaving of cancel, refusal and return loses one."""

import asyncio

import pytest

from pool.backends.channels import Channels


def test_slots_go_first_come_first_served():
    """Who waits longest is next."""

    async def main():
        channels, order = Channels(1), []

        async def use(name):
            await channels.take()
            order.append(name)
            channels.give_back()

        await channels.take()
        tasks = [asyncio.create_task(use(name)) for name in "abc"]
        await asyncio.sleep(0)
        channels.give_back()
        await asyncio.gather(*tasks)
        assert (order, channels.open_now) == (["a", "b", "c"], 0)

    asyncio.run(main())


@pytest.mark.parametrize("cancel_first", [True, False])
def test_a_waiter_cancelled_in_the_moment_of_its_turn(cancel_first):
    """The cancel stays a cancel, and the slot goes to the next in line."""

    async def main():
        channels = Channels(1)
        await channels.take()
        first, second = (asyncio.create_task(channels.take()) for _ in range(2))
        await asyncio.sleep(0)
        for step in (first.cancel, channels.give_back) if cancel_first else (channels.give_back, first.cancel):
            step()
        with pytest.raises(asyncio.CancelledError):
            await first
        await asyncio.wait_for(second, 10)
        assert channels.open_now == 1

    asyncio.run(main())


def test_a_refusal_lowers_the_limit_to_what_is_open():
    """The server's word counts more than ours."""

    async def main():
        channels = Channels(8)
        for _ in range(5):
            await channels.take()
        assert channels.refused()
        assert channels.refused()
        assert (channels.limit, channels.open_now) == (3, 3)

    asyncio.run(main())


def test_a_refusal_with_nothing_open_is_final():
    """There is nobody to wait for."""

    async def main():
        channels = Channels(8)
        await channels.take()
        assert not channels.refused()
        assert channels.open_now == 0

    asyncio.run(main())
