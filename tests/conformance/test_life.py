"""From the first use to the end: status, what a backend tracks, destroy."""

import asyncio
import contextlib
import logging
import threading

import anyio
import pytest

from pool.backends.base import BackendStatus
from pool.errors import BackendClosed, PoolError
from pool.runtime import loop_thread

USES = {
    "exec": lambda b: b.exec("true"),
    "read": lambda b: b.read("file"),
    "write": lambda b: b.write("file", "x"),
    "readdir": lambda b: b.readdir(),
    "mkdir": lambda b: b.mkdir("folder"),
    "exists": lambda b: b.exists("file"),
    "stat": lambda b: b.stat("file"),
    "rm": lambda b: b.rm("file"),
    "rename": lambda b: b.rename("file", "other"),
    "touch": lambda b: b.touch("file"),
}


class Closeable:
    def __init__(self, log, name, fail=None):
        self.log, self.name, self.fail = log, name, fail

    def note(self):
        self.log.append(self.name)
        if self.fail is not None:
            raise self.fail


class Plain(Closeable):
    def close(self):
        self.note()


class AsyncClose(Closeable):
    async def close(self):
        self.note()


class AsyncAclose(Closeable):
    def close(self):
        raise AssertionError("aclose wins")

    async def aclose(self):
        self.note()


def test_every_change_of_status_is_reported(rig):
    """A listener sees the whole life, in order."""
    backend = rig.backend()
    seen = []
    backend.on_status_change(seen.append)
    assert backend.status is BackendStatus.NEW
    backend.mkdir(".")
    assert (backend.status, backend.usable) == (BackendStatus.CONNECTED, True)
    backend.destroy()
    assert (backend.status, backend.usable) == (BackendStatus.CLOSED, False)
    assert seen == ["connecting", "connected", "closed"]


def test_a_listener_can_stop_listening_and_a_failing_one_harms_nobody(rig, caplog):
    """The returned function ends it, also when called twice; an exception is logged."""
    backend = rig.backend()
    seen, never = [], []
    backend.on_status_change(lambda _status: 1 / 0)
    backend.on_status_change(seen.append)
    stop = backend.on_status_change(never.append)
    stop()
    stop()
    with caplog.at_level(logging.CRITICAL, "pool.backends.base"):
        backend.mkdir(".")
    assert (seen, never) == (["connecting", "connected"], [])


def test_first_uses_at_once_connect_once(rig):
    """However many threads come first, there is one connection."""
    backend = rig.backend()
    seen = []
    backend.on_status_change(seen.append)
    before = rig.logins()
    start = threading.Barrier(10)

    def use():
        start.wait(30)
        backend.mkdir("folder")

    threads = [threading.Thread(target=use) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert seen == ["connecting", "connected"]
    assert rig.logins() - before == (1 if rig.info else 0)


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_no_use_after_destroy(backend, use):
    """Whatever is tried, the answer is BackendClosed."""
    backend.write("file", "x")
    backend.destroy()
    with pytest.raises(BackendClosed):
        use(backend)


def test_destroy_can_be_repeated(backend):
    """Used or never used, once or often."""
    backend.write("file", "x")
    backend.destroy()
    backend.destroy()


def test_destroy_of_a_backend_that_was_never_used(backend):
    """It connects nothing, and cannot be used afterwards."""
    backend.destroy()
    with pytest.raises(BackendClosed):
        backend.read("file")


def test_destroy_while_it_connects_leaves_no_connection(rig):
    """A connection that comes too late is closed again (the leak guard would see it), and its caller is told."""
    for turns in range(0, 40, 2):
        backend = rig.backend()

        async def both(backend=backend, turns=turns):
            use = asyncio.create_task(backend.amkdir("folder"))
            for _ in range(turns):
                await asyncio.sleep(0.001)
            await backend.adestroy()
            return (await asyncio.gather(use, return_exceptions=True))[0]

        assert isinstance(loop_thread().run(both()), BackendClosed | None)
        assert backend.status is BackendStatus.CLOSED


def test_tracked_resources_are_closed_last_first_before_the_backend(backend):
    """Plain, async and aclose; those that still need the backend can use it no more, but they come first."""
    log = []
    backend.mkdir(".")
    backend.on_status_change(lambda status: log.append(str(status)))
    for resource in (Plain(log, 1), AsyncClose(log, 2), AsyncAclose(log, 3)):
        assert backend.track_closeable(resource) is resource
    backend.destroy()
    backend.destroy()
    assert log == ["closed", 3, 2, 1]


def test_a_resource_that_fails_to_close_does_not_stop_the_others(backend, caplog):
    """It is logged, and everything else is closed."""
    log = []
    backend.track_closeable(Plain(log, 1))
    backend.track_closeable(Plain(log, 2, ValueError("no")))
    backend.track_closeable(AsyncAclose(log, 3, ValueError("no")))
    with caplog.at_level(logging.CRITICAL, "pool.backends.base"):
        backend.destroy()
    assert log == [3, 2, 1]


def test_a_resource_that_hangs_does_not_stop_the_others(rig, monkeypatch, caplog):
    """Each gets a bounded time."""
    monkeypatch.setattr("pool.backends.base.CLOSE_TIMEOUT", 0.2)
    backend, log = rig.backend(), []

    class Hangs:
        async def aclose(self):
            log.append("hangs")
            await asyncio.Event().wait()

    backend.track_closeable(AsyncAclose(log, 1))  # one that needs no thread, in so short a time
    backend.track_closeable(Hangs())
    with caplog.at_level(logging.CRITICAL, "pool.backends.base"):
        backend.destroy()
    assert log == ["hangs", 1]


def test_only_what_can_be_closed_is_tracked(backend):
    """Refused at once, not found out at the end."""
    with pytest.raises(TypeError, match="close"):
        backend.track_closeable(object())


def test_nothing_is_tracked_by_a_closed_backend(backend):
    """Nobody would ever close it."""
    backend.destroy()
    log = []
    with pytest.raises(BackendClosed):
        backend.track_closeable(Plain(log, 1))
    with pytest.raises(BackendClosed):
        backend.enter_context(scoped(log))
    assert "entered" not in log or log[-1] == "left"


@contextlib.asynccontextmanager
async def scoped(log):
    """A context manager that only the task that entered it can leave."""
    task = asyncio.current_task()
    async with anyio.create_task_group() as group:
        group.start_soon(anyio.sleep_forever)
        log.append("entered")
        yield "value"
        assert asyncio.current_task() is task
        group.cancel_scope.cancel()
        log.append("left")


def test_a_context_is_left_by_the_task_that_entered_it(backend):
    """anyio's cancel scopes, and so the MCP client, need that."""
    log = []
    assert backend.enter_context(scoped(log)) == "value"
    backend.track_closeable(Plain(log, "later"))
    assert log == ["entered"]
    backend.destroy()
    assert log == ["entered", "later", "left"]


def test_a_context_can_be_entered_from_any_loop(rig, run):
    """And destroyed from it."""
    log = []
    backend = rig.backend()

    async def main():
        assert await backend.aenter_context(scoped(log)) == "value"
        await backend.adestroy()

    run(main())
    assert log == ["entered", "left"]


def test_a_context_that_fails_to_enter_is_not_tracked(backend):
    """Its exception comes back."""

    @contextlib.asynccontextmanager
    async def broken():
        raise ValueError("no")
        yield

    with pytest.raises(ValueError, match="no"):
        backend.enter_context(broken())
    backend.destroy()


def test_blocking_doors_refuse_the_pools_own_loop(backend):
    """A call that would wait for itself for ever is an error that says what to do."""

    async def main():
        with pytest.raises(PoolError, match="await"):
            backend.read("file")

    loop_thread().run(main())
