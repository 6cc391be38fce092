"""Slots for channels: no interleaving of cancel, refusal and return loses one."""

import asyncio
from types import SimpleNamespace

import asyncssh
import pytest

from pool.backends import channels as module
from pool.backends.channels import Channels
from pool.errors import BackendUnavailable

ALIVE = SimpleNamespace(is_closed=lambda: False)
DEAD = SimpleNamespace(is_closed=lambda: True)
REFUSAL = asyncssh.ChannelOpenError(asyncssh.OPEN_CONNECT_FAILED, "open failed")


class Server:
    """Grants as many channels at a time as it has."""

    def __init__(self, sessions: int) -> None:
        self.free = sessions
        self.refusals = 0

    async def open(self):
        if not self.free:
            self.refusals += 1
            raise REFUSAL
        self.free -= 1


def test_slots_go_first_come_first_served():
    """Who waits longest is next."""

    async def main():
        channels, server, order = Channels(1), Server(8), []

        async def use(name):
            await channels.granted(ALIVE, server.open)
            order.append(name)
            channels.closed()

        await channels.granted(ALIVE, server.open)
        tasks = [asyncio.create_task(use(name)) for name in "abc"]
        await asyncio.sleep(0)
        channels.closed()
        await asyncio.gather(*tasks)
        assert order == ["a", "b", "c"]

    asyncio.run(main())


@pytest.mark.parametrize("cancel_first", [True, False])
def test_a_waiter_cancelled_in_the_moment_of_its_turn(cancel_first):
    """The cancel stays a cancel, and the slot goes to the next in line."""

    async def main():
        channels, server = Channels(1), Server(8)
        await channels.granted(ALIVE, server.open)
        first, second = (asyncio.create_task(channels.granted(ALIVE, server.open)) for _ in range(2))
        await asyncio.sleep(0)
        for step in (first.cancel, channels.closed) if cancel_first else (channels.closed, first.cancel):
            step()
        with pytest.raises(asyncio.CancelledError):
            await first
        await asyncio.wait_for(second, 10)

    asyncio.run(main())


def test_a_refused_channel_is_asked_for_again_when_another_one_ends():
    """The server has fewer sessions than we have slots; the one that ends makes room, and no limit is learned."""

    async def main():
        channels, server = Channels(8), Server(2)
        for _ in range(2):
            await channels.granted(ALIVE, server.open)
        waiting = asyncio.create_task(channels.granted(ALIVE, server.open))
        while not server.refusals:
            await asyncio.sleep(0)
        server.free += 1
        channels.closed()
        await asyncio.wait_for(waiting, 10)
        server.free += 6
        for _ in range(6):
            await asyncio.wait_for(channels.granted(ALIVE, server.open), 10)

    asyncio.run(main())


@pytest.mark.parametrize("turns", range(6))
def test_a_cancel_in_the_moment_a_refused_channel_may_be_asked_for_again(turns):
    """However many turns of the loop lie between the two: the cancel stays a cancel, and the slot is free again."""

    async def main():
        channels, server = Channels(2), Server(1)
        await channels.granted(ALIVE, server.open)
        refused = asyncio.create_task(channels.granted(ALIVE, server.open))
        while not server.refusals:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        channels.closed()
        for _ in range(turns):
            await asyncio.sleep(0)
        refused.cancel()
        with pytest.raises(asyncio.CancelledError):
            await refused
        server.free += 2
        for _ in range(2):
            await asyncio.wait_for(channels.granted(ALIVE, server.open), 10)

    asyncio.run(main())


def test_a_server_that_takes_long_to_refuse_is_asked_again(monkeypatch):
    """The time for which it may refuse begins with its first refusal."""
    monkeypatch.setattr(module, "_REFUSED_PATIENCE", 0.01)
    answers = iter([REFUSAL, None])

    async def open_late():
        await asyncio.sleep(0.05)
        if (answer := next(answers)) is not None:
            raise answer

    asyncio.run(Channels(8).granted(ALIVE, open_late))


@pytest.mark.parametrize("lasting", [False, True])
def test_a_server_that_refuses_although_nothing_can_end_is_an_error(lasting, monkeypatch):
    """Nothing is open, or only what lasts as long as the connection: waiting cannot help."""
    monkeypatch.setattr(module, "_REFUSED_PATIENCE", 0.0)

    async def main():
        channels, server = Channels(8), Server(int(lasting))
        if lasting:
            await channels.granted(ALIVE, server.open, lasting=True)
        with pytest.raises(BackendUnavailable, match="refuses every channel") as caught:
            await channels.granted(ALIVE, server.open)
        assert caught.value.reason == "sessions"
        server.free = 8
        for _ in range(8 - lasting):  # the slot of the refused one is free again
            await asyncio.wait_for(channels.granted(ALIVE, server.open), 10)

    asyncio.run(main())


def test_a_start_that_is_cancelled_twice_leaves_no_command(monkeypatch):
    """The channel opens when everybody has gone: it is closed."""

    async def main():
        answer, closed = asyncio.get_running_loop().create_future(), []
        connection = SimpleNamespace(is_closed=lambda: False, create_session=lambda *_, **__: answer)
        session = SimpleNamespace(started=False)
        starting = asyncio.create_task(Channels(1).start(connection, session, "true", b""))
        for _ in range(2):
            await asyncio.sleep(0.01)
            starting.cancel()
        await asyncio.wait({starting})
        answer.set_result((SimpleNamespace(close=lambda: closed.append(True)), session))
        await asyncio.sleep(0.01)
        assert closed == [True]

    asyncio.run(main())


def test_a_refusal_of_a_dead_connection_is_told_at_once():
    """It is the connection that ended, not the server that refuses."""

    async def main():
        channels = Channels(1)
        with pytest.raises(asyncssh.ChannelOpenError):
            await channels.granted(DEAD, Server(0).open)
        await asyncio.wait_for(channels.granted(ALIVE, Server(1).open), 10)

    asyncio.run(main())


@pytest.mark.parametrize(
    "shown",
    [AttributeError("'NoneType' object has no attribute 'session_started'"), BrokenPipeError(32, "Broken pipe")],
)
def test_a_connection_that_ends_while_a_channel_is_opened_is_lost(shown):
    """asyncssh stumbles, or shows what its socket told; of a connection that lives it would be a bug, and is shown."""

    async def stumble():
        raise shown

    async def main():
        for connection, error in ((DEAD, asyncssh.ConnectionLost), (ALIVE, type(shown))):
            channels = Channels(1)
            with pytest.raises(error):
                await channels.granted(connection, stumble)
            with pytest.raises(error):
                await channels.open_extra(connection, stumble)
            await channels.granted(ALIVE, Server(1).open)

    asyncio.run(main())
