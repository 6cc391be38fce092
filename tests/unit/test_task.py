"""`PooledTask`: its key, its backend, and that Celery's own machinery works on as before."""

import pickle
from typing import Any

import pytest
from celery import Celery
from celery.exceptions import Ignore, Reject, Retry
from celery.result import AsyncResult

from pool import MemoryBackend, PoolConfig, Settings, install
from pool.errors import (
    AcquireTimeout,
    BackendClosed,
    BackendUnavailable,
    CommandFailed,
    ConfigError,
    InvalidKey,
    NotOwner,
    PoolExhausted,
    TaskCancelled,
)
from pool.sharding.hashing import shard_of
from pool.worker.task import EXHAUSTED_DELAY, MIN_RETRY_DELAY, PooledTask


@pytest.fixture
def app(tmp_path) -> Any:
    app = Celery("task", broker="memory://", backend="cache+memory://", set_as_current=False)
    app.conf.update(task_always_eager=True, task_store_eager_result=True, task_eager_propagates=False)
    pool = PoolConfig(acquire_timeout=5)
    settings = Settings(shards=8, node_shards=tuple(range(8)), data_dir=tmp_path, pool=pool)
    extension = install(app, settings, backend_class=MemoryBackend)
    yield app
    extension.close(grace=0.0)


def make(app: Celery, body: Any, **options: Any) -> Any:
    """A task ``body(self, user)`` with the key ``user``."""

    def task(self: Any, user: str) -> Any:
        return body(self)

    return app.task(shared=False, base=PooledTask, bind=True, **{"key": "user", "name": "t.task", **options})(task)


class Message:
    """A request as a worker makes it, for as long as the block lasts."""

    def __init__(self, task: Any, *args: Any, **fields: Any) -> None:
        self.task = task
        self.fields = {
            "id": "id-1", "args": args, "kwargs": {}, "called_directly": False, "is_eager": False, "retries": 0,
            "delivery_info": {}, **fields,
        }  # fmt: skip

    def __enter__(self) -> Any:
        self.task.push_request(**self.fields)
        return self.task

    def __exit__(self, *_: object) -> None:
        self.task.pop_request()


# -- the backend of the key


def test_backend_borrows_the_keys_backend(app):
    """Two tasks of one key see the same files; another key does not."""

    def append(self: Any) -> str:
        with self.backend() as backend:
            if backend.exists("log"):
                return backend.read("log")
            backend.write("log", "first")
            return ""

    task = make(app, append)
    assert [task.delay(user).get() for user in ("u1", "u1", "u2")] == ["", "first", ""]
    assert app.warm_pool.pool.get_stats().backends_by_key == {"u1": 1, "u2": 1}
    assert app.warm_pool.pool.get_stats().active_backends == 0


def test_backend_takes_agent_and_config(app):
    """As `acquire_backend` of the manager does."""

    def use(self: Any) -> str:
        with self.backend(agent="x", config={"root_dir": "/deep"}) as backend:
            return backend.root

    assert make(app, use).delay("u1").get() == "/deep"
    assert app.warm_pool.pool.peek("u1", "x") is not None


def test_a_backend_is_given_back_when_the_task_fails(app):
    """And the task's own error is what the caller sees."""

    def fail(self: Any) -> None:
        with self.backend():
            raise ZeroDivisionError("in the task")

    with pytest.raises(ZeroDivisionError):
        make(app, fail).delay("u1").get()
    assert app.warm_pool.pool.get_stats().active_backends == 0


def test_acquire_backend_returns_a_handle(app):
    """It tells whether the backend was warm."""

    def use(self: Any) -> bool:
        with self.acquire_backend() as borrowed:
            return borrowed.warm

    task = make(app, use)
    assert [task.delay("u1").get() for _ in range(2)] == [False, True]


def test_pool_key_is_the_argument_or_the_header(app):
    """Whichever the task declares."""
    task = make(app, lambda self: self.pool_key)
    assert task.delay("u1").get() == "u1"
    headed = make(app, lambda self: None, key=None, name="t.headed")
    with Message(headed, pool_key="u2"):
        assert headed.pool_key == "u2"
    with Message(headed), pytest.raises(InvalidKey):
        _ = headed.pool_key


def test_a_key_of_a_shard_that_the_node_does_not_own_is_refused(tmp_path):
    """The message reached the wrong node; the error names the right queue."""
    app = Celery("other", broker="memory://", backend="cache+memory://", set_as_current=False)
    away = next(f"u{number}" for number in range(99) if shard_of(f"u{number}", 8) != 3)
    home = next(f"u{number}" for number in range(99) if shard_of(f"u{number}", 8) == 3)
    extension = install(app, Settings(shards=8, node_shards=(3,), data_dir=tmp_path), backend_class=MemoryBackend)
    task = make(app, lambda self: None)
    with Message(task, away), pytest.raises(NotOwner, match=rf"pool\.shard\.00{shard_of(away, 8)}"):
        task.acquire_backend()
    with Message(task, home):
        task.acquire_backend().release()
    with Message(task, away, is_eager=True):
        task.acquire_backend().release()
    extension.close(0.0)


def test_without_install_the_error_says_so():
    """It names the task and what to call."""
    app = Celery("bare", broker="memory://", set_as_current=False)
    task = make(app, lambda self: None)
    with Message(task, "u1"), pytest.raises(ConfigError, match=r"task t\.task: call pool\.install"):
        task.acquire_backend()


# -- Celery's result backend, under the same name


def test_backend_still_serves_celery(app):
    """``task.backend`` is Celery's result backend for everything but the call."""
    task = make(app, lambda self: None)
    task.backend.mark_as_done("id-7", {"a": 1})
    result = task.AsyncResult("id-7")
    assert result.get(timeout=5) == {"a": 1}
    assert task.backend.get_state("id-7") == "SUCCESS"
    assert task.backend.as_uri() == app.backend.as_uri()


def test_a_result_comes_back_through_the_result_backend(app):
    """Stored by the tracer, read by somebody else."""
    task = make(app, lambda self: {"n": 5})
    sent = task.delay("u1")
    assert AsyncResult(sent.id, app=app).get(timeout=5) == {"n": 5}
    failing = make(app, lambda self: 1 / 0, name="t.failing").apply_async(("u1",), task_id="id-8")
    assert AsyncResult(failing.id, app=app).state == "FAILURE"


def test_a_state_can_be_updated(app):
    """``self.update_state`` as in any task."""
    task = make(app, lambda self: self.update_state("id-9", "PROGRESS", {"done": 3}))
    task.delay("u1")
    assert AsyncResult("id-9", app=app).info == {"done": 3}


def test_an_async_result_pickles(app):
    """As those of other tasks do; it holds the result backend itself."""
    task = make(app, lambda self: None)
    task.backend.mark_as_done("id-10", 5)
    result = task.AsyncResult("id-10")
    assert result.backend is app.backend
    app.set_current()
    try:
        copy = pickle.loads(pickle.dumps(result))
        assert copy.id == "id-10"
    finally:
        app.set_default()


def test_a_result_backend_can_be_set(app):
    """Celery's attribute can be assigned, on one task."""
    task = make(app, lambda self: None)
    other = Celery("x", backend="cache+memory://", set_as_current=False).backend
    task.backend = other
    assert task.backend.as_uri() == other.as_uri()
    assert task.AsyncResult("x").backend is other


def test_a_pooled_task_is_acknowledged_late(app):
    """A task whose worker dies runs again."""
    task = make(app, lambda self: None)
    assert task.acks_late
    assert task.reject_on_worker_lost


# -- what an unavailable backend means for the message


def unavailable(retry_after: float | None) -> Any:
    def body(self: Any) -> None:
        raise BackendUnavailable("down", "refused", retry_after)

    return body


@pytest.mark.parametrize(("retry_after", "countdown"), [(0.0, MIN_RETRY_DELAY), (7.5, 7.5)])
def test_an_unavailable_backend_is_retried_after_its_time(retry_after, countdown, app, monkeypatch):
    """``retry_after``, but not at once."""
    task = make(app, unavailable(retry_after))
    asked: list[Any] = []

    def retry(**options: Any) -> Exception:
        asked.append(options)
        return Retry()

    monkeypatch.setattr(task, "retry", retry)
    with Message(task, "u1"), pytest.raises(Retry):
        task("u1")
    assert asked[0]["countdown"] == countdown
    assert isinstance(asked[0]["exc"], BackendUnavailable)


@pytest.mark.parametrize("error", [AcquireTimeout("it connects", "connect"), PoolExhausted("no room", "room")])
def test_who_got_no_backend_in_time_tries_again_if_the_task_wants_that(error, app, monkeypatch):
    """Whether it still waited for room, or had got in too late for its backend to be ready; else it fails."""

    def body(self: Any) -> None:
        raise error

    task = make(app, body, retry_exhausted=True)
    monkeypatch.setattr(task, "retry", lambda **options: Retry(when=options["countdown"]))
    with Message(task, "u1"), pytest.raises(Retry) as asked:
        task("u1")
    assert asked.value.when == EXHAUSTED_DELAY
    task.retry_exhausted = False
    with Message(task, "u1"), pytest.raises(type(error)):
        task("u1")


def test_retries_end_after_max_retries_with_the_error_itself(app):
    """The caller sees why."""
    calls: list[int] = []

    def body(self: Any) -> None:
        calls.append(self.request.retries)
        raise BackendUnavailable("down", "refused", 0.0)

    with pytest.raises(BackendUnavailable, match="down"):
        make(app, body, max_retries=2).delay("u1").get()
    assert calls == [0, 1, 2]


@pytest.mark.parametrize("options", [{}, {"retry_unavailable": False}])
def test_what_only_a_person_can_mend_is_not_retried(options, app):
    """Nor is anything when the task turned retries off."""
    task = make(app, unavailable(3.0 if options else None), **options)
    with Message(task, "u1"), pytest.raises(BackendUnavailable):
        task("u1")


def test_called_as_a_function_a_task_raises_what_it_raises(app):
    """No message, no retry."""
    with pytest.raises(BackendUnavailable):
        make(app, unavailable(3.0))("u1")


LOST = [BackendClosed("closed"), NotOwner("lost"), BackendUnavailable("cut", "lost", 1.0)]


@pytest.mark.parametrize("error", LOST, ids=lambda error: type(error).__name__)
def test_whatever_ends_a_task_whose_shard_was_lost_sends_the_message_back(error, app):
    """The new owner runs it: no failure is recorded, no second message made by a retry."""

    def body(self: Any) -> None:
        app.warm_pool.ownership.drop(shard_of("u1", app.warm_pool.settings.shards))
        raise error

    task = make(app, body)
    queue = app.warm_pool.queue_for("u1")
    with Message(task, "u1", delivery_info={"routing_key": queue}), pytest.raises(Reject) as caught:
        task("u1")
    assert caught.value.requeue


def test_a_task_that_came_by_another_shard_fails_where_it_is_told(app):
    """Its producer counts other shards: sent back, it would come for ever."""
    settings = app.warm_pool.settings
    queue = app.warm_pool.router.queues[(shard_of("u1", settings.shards) + 1) % settings.shards].name
    task = make(app, lambda self, key: self.acquire_backend())
    with (
        Message(task, "u1", delivery_info={"routing_key": queue}),
        pytest.raises(NotOwner, match=f"count other than {settings.shards}"),
    ):
        task.acquire_backend()


@pytest.mark.parametrize(
    ("args", "kwargs", "key"),
    [((1, "u1"), {}, "u1"), ((1,), {"user": "u2"}, "u2"), ((1,), {}, "u3"), ((), {}, "u3")],
)
def test_the_key_is_found_however_its_argument_is_passed(args, kwargs, key, app):
    """By position, by name or by default."""

    def task(self: Any, n: int = 0, user: str = "u3") -> None:
        """Its key is its second argument."""

    keyed = app.task(shared=False, base=PooledTask, bind=True, key="user", name="t.second")(task)
    assert keyed.key_argument(args, kwargs) == key


def test_what_is_left_over_for_an_argument_by_name_is_no_key(app):
    """What ``*rest`` takes is not the argument after it."""

    def task(self: Any, n: int, *rest: str, user: str) -> None:
        """Its key is given by name only."""

    keyed = app.task(shared=False, base=PooledTask, bind=True, key="user", name="t.named")(task)
    assert keyed.key_argument((1, "u1", "u2"), {"user": "u3"}) == "u3"
    with pytest.raises(InvalidKey, match="needs its argument 'user'"):
        keyed.key_argument((1, "u1", "u2"), {})


def test_a_backend_is_given_back_if_the_shard_was_lost_meanwhile(app, monkeypatch):
    """Connecting takes time; nobody would close what is made after the others were."""
    task = make(app, lambda self: None)
    acquire = app.warm_pool.pool.acquire_backend

    def slowly(*args: Any) -> Any:
        app.warm_pool.ownership.drop(shard_of("u1", app.warm_pool.settings.shards))
        return acquire(*args)

    monkeypatch.setattr(app.warm_pool.pool, "acquire_backend", slowly)
    with Message(task, "u1"), pytest.raises(NotOwner):
        task.acquire_backend()
    assert app.warm_pool.pool.get_stats().active_backends == 0


@pytest.mark.parametrize("loss", ["suspend", "drop"])
def test_a_shard_that_was_lost_meanwhile_and_is_owned_again_sends_the_message_back(app, loss):
    """What ran for it was ended, and tells so when the node has the shard again; a command that failed has failed."""
    ownership = app.warm_pool.ownership
    shard = shard_of("u1", app.warm_pool.settings.shards)
    way = {"routing_key": app.warm_pool.queue_for("u1")}
    errors = iter([BackendClosed("closed"), NotOwner("not yours"), CommandFailed("exit code 1", 1, "")])

    def body(self: Any) -> None:
        getattr(ownership, loss)(shard)
        ownership.hold(shard, 7)
        raise next(errors)

    task = make(app, body)
    for _ in range(2):
        with Message(task, "u1", delivery_info=way), pytest.raises(Reject) as caught:
            task("u1")
        assert caught.value.requeue
    with Message(task, "u1", delivery_info=way), pytest.raises(CommandFailed):
        task("u1")


def test_a_cancelled_task_is_told_as_such_when_its_run_has_ended(app, monkeypatch):
    """Whatever is reported of a run comes before."""
    runs, order = app.warm_pool.running.runs, []

    def body(self: Any) -> None:
        raise TaskCancelled("enough")

    task = make(app, body)
    monkeypatch.setattr(PooledTask, "_revoked", lambda self, reason: order.append((reason, runs())))
    with Message(task, "u1"), pytest.raises(Ignore):
        task("u1")
    assert order == [("enough", [])]


def test_a_backend_closed_by_a_stopping_node_sends_the_message_back(app):
    """Unharmed; on a node that goes on it is the task's failure."""

    def body(self: Any) -> None:
        raise BackendClosed("closed")

    task = make(app, body)
    with Message(task, "u1"), pytest.raises(BackendClosed):
        task("u1")
    app.warm_pool.closing = True
    with Message(task, "u1"), pytest.raises(Reject) as caught:
        task("u1")
    assert caught.value.requeue
