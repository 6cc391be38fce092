"""Live output through a real Valkey: written on the pool's loop, read by followers of their own."""

import asyncio
import json
import threading
import uuid
from collections.abc import Iterator
from time import monotonic
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from celery import Celery

from pool.errors import BackendUnavailable, ConfigError
from pool.live import output
from pool.live.follow import Piece, afollow, follow
from pool.live.format import live_key
from pool.live.output import LiveOutput
from pool.live.task import LiveTask
from pool.runtime import loop_thread
from tests.support.proxy import Proxy
from tests.support.redis_servers import EmbeddedServer
from tests.support.waiting import wait_until

TTL = 600.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    server = EmbeddedServer(tmp_path_factory.mktemp("live"))
    yield server
    server.stop()


class Site:
    """One namespace: a writer, and followers in threads."""

    def __init__(self, url: str, keep: int = 4_000_000, ttl: float = TTL) -> None:
        self.url = url
        self.namespace = f"test-{uuid.uuid4().hex[:8]}"
        self.task_id = uuid.uuid4().hex
        self.admin = redis.Redis.from_url(url)
        self.live = LiveOutput(url, self.namespace, keep_bytes=keep, ttl=ttl)
        self.key = live_key(self.namespace, self.task_id)

    def open(self, **facts: Any) -> LiveTask:
        return self.live.open(self.task_id, {"name": "tasks.build", **facts})

    def follow(self, timeout: float | None = 20.0, **options: Any) -> Iterator[Piece]:
        return follow(self.task_id, timeout=timeout, **{"url": self.url, "namespace": self.namespace, **options})

    def written(self, task: LiveTask) -> None:
        """Wait until all that was fed is in Redis, or was dropped."""
        wait_until(lambda: task.wrote and not task.pending and not task.flying and not task.queued, "it is written")

    def close(self) -> None:
        self.live.close()
        self.admin.close()


@pytest.fixture
def site(server: EmbeddedServer) -> Iterator[Site]:
    site = Site(server.url)
    yield site
    site.close()


def feed(task: LiveTask, *pieces: tuple[str, bytes] | bytes) -> None:
    """As commands do it: on the loop's thread, each piece in a turn of its own."""

    async def feed() -> None:
        for piece in pieces:
            task.feed(*(piece if isinstance(piece, tuple) else ("stdout", piece)))
            await asyncio.sleep(0)

    loop_thread().run(feed())


class Follower(threading.Thread):
    """Follows to the end and keeps the pieces."""

    def __init__(self, pieces: Iterator[Piece]) -> None:
        super().__init__(daemon=True)
        self.pieces: list[Piece] = []
        self.error: Exception | None = None
        self._source = pieces
        self.start()

    def run(self) -> None:
        try:
            for piece in self._source:
                self.pieces.append(piece)
        except Exception as error:
            self.error = error

    def result(self) -> list[Piece]:
        self.join(30)
        assert not self.is_alive(), self.pieces[-3:]
        if self.error is not None:
            raise self.error
        return self.pieces

    def until(self, text: bytes) -> None:
        wait_until(lambda: text in data(self.pieces), f"the follower has {text!r}")


def data(pieces: list[Piece], *streams: str) -> bytes:
    return b"".join(piece.data for piece in pieces if not streams or piece.stream in streams)


def kinds(pieces: list[Piece]) -> list[str]:
    return [piece.kind for piece in pieces]


def test_a_follower_sees_what_is_written_in_its_order(site):
    """Before it came and after, both streams, any bytes; with the facts of begin and end."""
    task = site.open(key="user-1", node="a@x")
    everything = bytes(range(256)) * 3
    feed(task, b"first\n", ("stderr", b"\x00\xff\r\n"), everything)
    site.written(task)
    follower = Follower(site.follow())
    follower.until(everything)
    feed(task, ("stderr", b"\xf0\x9f"), ("update", b'{"text": "hm"}'), b"last\n")
    task.close("SUCCESS", 3)
    pieces = follower.result()
    assert (data(pieces, "stdout"), data(pieces, "stderr")) == (
        b"first\n" + everything + b"last\n",
        b"\x00\xff\r\n\xf0\x9f",
    )
    assert data(pieces, "update") == b'{"text": "hm"}'
    assert not any(piece.skipped for piece in pieces)
    streams = [piece.stream for piece in pieces if piece.kind == "output"]
    assert streams == ["stdout", "stderr", "stdout", "stderr", "update", "stdout"]
    assert pieces[0].kind == "begin"
    assert {"name": "tasks.build", "key": "user-1", "node": "a@x"}.items() <= pieces[0].facts.items()
    assert pieces[-1].kind == "end"
    told = {"state": "SUCCESS", "exit_code": 3, "bytes": task.bytes, "lines": 2 + 3 + 1 + 0}
    assert told.items() <= pieces[-1].facts.items()


def test_the_stream_expires_and_its_memory_is_bounded(server):
    """A flood of 30 MB: at most what was asked for stays, and a late reader is told exactly what is missing."""
    site = Site(server.url, keep=1_000_000)
    try:
        task = site.open()
        block = b"".join(b"%07d\n" % number for number in range(6000))
        for _ in range(25):
            feed(task, *[block] * 25)
            assert task.pending.size <= site.live.pending_limit
            assert (site.admin.memory_usage(site.key) or 0) <= 1_500_000
        task.close("SUCCESS")
        pieces = list(site.follow())
        assert site.admin.memory_usage(site.key) <= 1_500_000
        assert TTL - 30 < site.admin.ttl(site.key) <= TTL
        assert kinds(pieces)[0] == "begin"
        kept, skipped = len(data(pieces)), sum(piece.skipped for piece in pieces)
        assert kept + skipped == len(block) * 625 == task.bytes
        assert kept > 300_000
        assert data(pieces).endswith(block)
    finally:
        site.close()


def test_a_short_silent_task_leaves_nothing(site):
    """And has caused no connection; another one, whose output is fed after its end, neither."""
    site.open().close("SUCCESS")
    late = site.open()
    late.close("SUCCESS")
    feed(late, b"too late")
    assert site.live._client is None
    assert not site.admin.exists(site.key)
    assert list(site.follow(wait=False)) == []


def test_a_silent_task_is_announced_and_ends(site):
    """A follower sees that it runs."""
    task = site.open()
    follower = Follower(site.follow())
    wait_until(lambda: kinds(follower.pieces) == ["begin"], "its begin is there")
    task.close("REVOKED")
    pieces = follower.result()
    assert kinds(pieces) == ["begin", "end"]
    assert pieces[-1].facts["state"] == "REVOKED"


def test_a_silent_task_keeps_its_stream(server):
    """It does not expire while the task runs."""
    site = Site(server.url, ttl=6.0)
    try:
        task = site.open()
        feed(task, b"then nothing for long")
        site.written(task)
        left = site.admin.pttl(site.key)

        def renewed():
            nonlocal left
            before, left = left, site.admin.pttl(site.key)
            return left > before

        for _ in range(2):
            wait_until(renewed, "it was given more time")
        task.close("SUCCESS")
        assert kinds(list(site.follow())) == ["begin", "output", "end"]
    finally:
        site.close()


def test_two_attempts_share_a_stream(site):
    """The second one's output begins at 0 again, and RETRY ends no follower."""
    follower = Follower(site.follow())
    first = site.open(retries=0)
    feed(first, b"one")
    first.close("RETRY")
    follower.until(b"one")
    wait_until(lambda: kinds(follower.pieces)[-1] == "end", "the first attempt has ended")
    second = site.open(retries=1)
    feed(second, b"two")
    second.close("FAILURE")
    pieces = follower.result()
    assert kinds(pieces) == ["begin", "output", "end"] * 2
    assert [piece.facts.get("retries") for piece in pieces if piece.kind == "begin"] == [0, 1]
    assert [(piece.data, piece.offset) for piece in pieces if piece.kind == "output"] == [(b"one", 0), (b"two", 0)]
    assert pieces == list(site.follow(wait=False))


def test_the_bound_is_that_of_all_attempts(server):
    """What earlier ones have left goes first."""
    site = Site(server.url, keep=300_000)
    try:
        for number in range(8):
            task = site.open()
            for _ in range(4):
                feed(task, bytes([number]) * 50_000)
                site.written(task)
            task.close("RETRY" if number < 7 else "SUCCESS")
            assert site.admin.memory_usage(site.key) <= 500_000
        pieces = list(site.follow())
        assert data(pieces)[-1:] == bytes([7])
        assert pieces[-1].facts["state"] == "SUCCESS"
    finally:
        site.close()


def test_two_followers_see_the_same(site):
    """One in a thread, one in an event loop."""
    first = Follower(site.follow())
    task = site.open()

    async def second() -> list[Piece]:
        return [piece async for piece in afollow(site.task_id, url=site.url, namespace=site.namespace, timeout=20)]

    other: list[list[Piece]] = []
    thread = threading.Thread(target=lambda: other.append(asyncio.run(second())), daemon=True)
    thread.start()
    for number in range(20):
        feed(task, b"%d\n" % number)
    task.close("SUCCESS", 0)
    thread.join(30)
    assert other
    assert first.result() == other[0]
    assert data(other[0]) == b"".join(b"%d\n" % number for number in range(20))


def test_a_follower_that_stops_reading_holds_nobody_up(server):
    """It is told what it has missed when it goes on; one that is given up is forgotten."""
    site = Site(server.url, keep=200_000)
    try:
        task = site.open()
        slow, gone = site.follow(), site.follow()
        feed(task, b"first")
        assert [next(slow).kind, next(slow).data] == ["begin", b"first"]
        assert next(gone).kind == "begin"
        gone.close()
        for _ in range(20):
            feed(task, b"x" * 40_000)
            site.written(task)
        task.close("SUCCESS")
        pieces = list(slow)
        assert pieces[0].offset == 5 + pieces[0].skipped
        assert pieces[0].skipped >= 500_000
        assert len(data(pieces)) + sum(piece.skipped for piece in pieces) == 800_000
        assert pieces[-1].kind == "end"
    finally:
        site.close()


def test_a_stream_that_is_deleted_is_begun_again(site):
    """A follower misses what was deleted before it had read it, at most; a new one sees what the task is."""
    task = site.open()
    feed(task, b"before")
    follower = Follower(site.follow())
    follower.until(b"before")
    site.admin.delete(site.key)
    feed(task, b"after")
    follower.until(b"after")
    assert TTL - 30 < site.admin.ttl(site.key) <= TTL
    task.close("SUCCESS")
    assert kinds(follower.result()) == ["begin", "output", "output", "end"]
    late = list(site.follow())
    assert kinds(late) == ["begin", "output", "end"]
    assert late[0].facts["name"] == "tasks.build"
    assert late[1] == Piece("stdout", b"after", 6, 6)


def test_ids_that_went_back_are_no_end(site):
    """A server whose clock is behind has the stream anew: a follower of the old one finds it."""
    task = site.open()
    feed(task, b"before")
    follower = Follower(site.follow())
    follower.until(b"before")
    entry = {"kind": "output", "attempt": task.tape.attempt, "stream": "stdout", "offset": 6, "data": "after"}
    site.admin.delete(site.key)
    site.admin.xadd(site.key, entry, id="5-0")
    follower.until(b"after")
    task.close("SUCCESS")


def test_a_server_that_is_restarted_loses_only_what_there_was_no_room_for(tmp_path):
    """The writer says so once, and goes on; so does a follower."""
    server = EmbeddedServer(tmp_path)
    site = Site(server.url)
    try:
        task = site.open()
        follower = Follower(site.follow(timeout=60))
        feed(task, b"before\n")
        follower.until(b"before")
        server.stop()
        feed(task, *[b"x" * 100_000] * 30)
        wait_until(lambda: site.live._failures > 1, "the writer has noticed")
        assert task.pending.size <= site.live.pending_limit
        server.start()
        feed(task, b"after\n")
        follower.until(b"after")
        task.close("SUCCESS")
        pieces = follower.result()
        assert kinds(pieces).count("begin") == kinds(pieces).count("end") == 1
        assert len(data(pieces)) + sum(piece.skipped for piece in pieces) == task.bytes
        assert len(data(pieces)) >= 900_000
    finally:
        site.close()
        server.stop()


def test_an_outage_is_logged_once_and_forgets_the_oldest_tasks_output(server, caplog):
    """What waits of tasks that have ended is bounded; all of it that is left is written in the end."""
    parts = redis.connection.parse_url(server.url)
    caplog.set_level("INFO", "pool.live.output")
    with Proxy((parts["host"], parts["port"])) as proxy:
        site = Site(server.url.replace(f":{parts['port']}/", f":{proxy.port}/"))
        try:
            first = site.open()
            feed(first, b"there")
            site.written(first)
            proxy.cut()
            tasks = [site.live.open(f"ended-{number}", {}) for number in range(15)]
            for task in tasks:
                feed(task, b"y" * 900_000)
                task.close("SUCCESS")
            wait_until(lambda: site.live._failures > 2, "it has failed again and again")
            held = sum(task.pending.size + sum(chunk.size for chunk in task.flying) for task in tasks)
            assert held <= output.ENDED_BYTES
            proxy.mend()
            wait_until(lambda: all(task.done for task in tasks), "their ends are written", 20.0)
            assert site.live._held == 0
            assert not site.live._ended
        finally:
            site.close()
    said = [record.getMessage() for record in caplog.records if record.name == "pool.live.output"]
    assert len(said) == 2
    assert "cannot be written" in said[0]
    assert "written again" in said[1]


def test_a_stream_that_redis_refuses_to_write_does_not_stop_the_others(site):
    """Its key holds something else."""
    site.admin.set(site.key, "not a stream")
    task, other = site.open(), site.live.open("other", {})
    feed(task, b"refused")
    feed(other, b"written")
    task.close("SUCCESS")
    other.close("SUCCESS")
    pieces = list(follow("other", url=site.url, namespace=site.namespace, timeout=20))
    assert kinds(pieces) == ["begin", "output", "end"]
    assert site.admin.get(site.key) == b"not a stream"
    wait_until(lambda: not site.live._ready and not site.live._ended, "it is given up")


def test_closing_writes_what_waits(site):
    """And takes nothing any more; it does not wait long for a Redis that is away."""
    task = site.open()
    feed(task, b"one", b"two")
    task.close("FAILURE")
    site.live.close()
    assert data(list(site.follow(wait=False))) == b"onetwo"
    late = site.open()
    feed(late, b"no")
    late.close("SUCCESS")
    assert data(list(site.follow(wait=False))) == b"onetwo"


def test_closing_does_not_wait_for_a_redis_that_is_away():
    """Two seconds at most."""
    site = Site("redis://127.0.0.1:1/0")
    feed(site.open(), b"lost")
    started = monotonic()
    site.live.close()
    assert monotonic() - started < 10


class App:
    """What a follower asks of an app."""

    def __init__(
        self, url: str | None, namespace: str = "pool", state: str = "PENDING", megabytes: float = 4.0
    ) -> None:
        settings = SimpleNamespace(redis_url=url, namespace=namespace, live_output_mb=megabytes)
        self.warm_pool = SimpleNamespace(settings=settings)
        self.state = state
        self.backend = object()

    def AsyncResult(self, _task_id: str, backend: object) -> Any:
        assert backend is self.backend
        return SimpleNamespace(state=self.state)


def test_an_end_that_was_not_written_is_told_by_the_state(site):
    """The worker was killed; and a task without output, whose worker has written nothing."""
    app = App(site.url, site.namespace, "STARTED")
    task = site.open()
    feed(task, b"half of it")
    follower = Follower(site.follow(app=app, url=None, namespace=None))
    follower.until(b"half of it")
    app.state = "FAILURE"
    pieces = follower.result()
    assert kinds(pieces) == ["begin", "output", "end"]
    assert pieces[-1].facts == {"state": "FAILURE", "exit_code": None}
    silent = list(follow("silent", app=app, timeout=20))
    assert [(piece.kind, piece.facts["state"]) for piece in silent] == [("end", "FAILURE")]
    assert silent == list(follow("silent", app=app, wait=False))


def test_the_state_is_that_of_a_real_app(server):
    """From its result backend."""
    app = Celery("live", broker=server.url, backend=server.url, set_as_current=False)
    app.warm_pool = App(server.url).warm_pool
    with redis.Redis.from_url(server.url) as client:
        result = {"task_id": "done-task", "status": "SUCCESS", "result": None}
        client.set(app.backend.get_key_for_task("done-task"), json.dumps(result))
    assert [piece.facts["state"] for piece in follow("done-task", app=app, timeout=20)] == ["SUCCESS"]
    assert list(follow("no-such-task", app=app, wait=False)) == []


def test_a_result_backend_that_hangs_does_not_hold_up_a_follower(site):
    """It is asked in a thread."""
    hangs = threading.Event()
    app = SimpleNamespace(backend=object(), AsyncResult=lambda *_, **__: hangs.wait(60))
    try:
        task = site.open()
        follower = Follower(site.follow(app=app))
        feed(task, b"one")
        follower.until(b"one")
        task.close("SUCCESS")
        assert kinds(follower.result()) == ["begin", "output", "end"]
        with pytest.raises(TimeoutError):
            list(follow("other", app=app, url=site.url, timeout=0.5))
    finally:
        hangs.set()


def test_a_timeout_says_what_was_waited_for(site):
    """Without news; not while there is some."""
    with pytest.raises(TimeoutError, match=r"no news of task no-such-task for 0.3 s: it waits for a worker"):
        list(follow("no-such-task", url=site.url, timeout=0.3))
    task = site.open()
    feed(task, b"x")
    site.written(task)
    pieces = []
    with pytest.raises(TimeoutError, match="it runs and is silent"):
        pieces.extend(site.follow(timeout=0.3))
    task.close("SUCCESS")
    with pytest.raises(TimeoutError, match="Redis cannot be reached"):
        list(follow("a", url="redis://127.0.0.1:1", timeout=0.3))
    with pytest.raises(BackendUnavailable, match="live output"):
        list(follow("a", url="redis://127.0.0.1:1", wait=False))


def test_where_there_is_no_live_output_it_is_said(server):
    """Each with its setting."""
    with pytest.raises(ConfigError, match="POOL_LIVE_OUTPUT_MB"):
        follow("a", app=App(server.url, megabytes=0.0))
    with pytest.raises(ConfigError, match="POOL_REDIS_URL"):
        follow("a", app=App(None))
    host, _, rest = server.url.partition("@")
    assert rest, host
    with pytest.raises(ConfigError, match="POOL_REDIS_URL"):
        list(follow("a", url=f"redis://:wrong@{rest}", timeout=5))
