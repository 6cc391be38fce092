"""Which queue a message goes to, seen in the broker's messages; the broker is in memory."""

from typing import Any

import pytest
from celery import Celery, chain, group, shared_task
from kombu import Queue

from pool import Settings, install
from pool.errors import ConfigError, InvalidKey
from pool.sharding.hashing import queue_name, shard_of
from pool.worker.router import KEY_HEADER
from pool.worker.task import PooledTask

SHARDS = 8


@shared_task(base=PooledTask, key="user", name="tests.router.shared")
def shared_by_all_apps(user: str) -> None: ...


@pytest.fixture
def app(tmp_path) -> Any:
    app = Celery("router", broker="memory://", backend="cache+memory://", set_as_current=False)
    app.conf.update(task_default_queue="celery", task_always_eager=False)
    install(app, Settings(shards=SHARDS, namespace="rt", data_dir=tmp_path))
    yield app
    with app.connection_for_write() as connection:
        connection.transport.state.clear()  # the memory broker is one for the whole process
        connection.default_channel.queues.clear()


def queue_of(key: str) -> str:
    return queue_name(shard_of(key, SHARDS), "rt")


def messages(app: Celery) -> list[tuple[str, Any]]:
    """Take every message out of the broker: ``(queue, message)``."""
    found = []
    with app.connection_for_write() as connection:
        channel = connection.default_channel
        for queue in [*app.warm_pool.router.queues, Queue("celery"), Queue("mine")]:
            bound = queue(channel)
            bound.declare()
            while (message := bound.get(no_ack=True)) is not None:
                found.append((queue.name, message))
    return found


def sent(app: Celery) -> str:
    """The queue of the one message that was sent."""
    ((queue, _),) = messages(app)
    return queue


def keyed(app: Celery, **options: Any) -> Any:
    @app.task(shared=False, base=PooledTask, bind=True, key="user", name="t.keyed", **options)
    def task(self: Any, cmd: str, user: str = "nobody", *, loud: bool = False) -> None: ...

    return task


@pytest.mark.parametrize(
    ("args", "kwargs", "key"),
    [
        (("ls", "u1"), {}, "u1"),
        (("ls",), {"user": "u2"}, "u2"),
        ((), {"user": "u3", "cmd": "ls"}, "u3"),
        (("ls",), {}, "nobody"),
        (("ls",), {"loud": True}, "nobody"),
    ],
)
def test_the_key_is_found_wherever_the_argument_stands(args, kwargs, key, app):
    """By position, by name, or by default."""
    keyed(app).apply_async(args, kwargs)
    assert sent(app) == queue_of(key)


def test_an_unbound_task_counts_its_arguments_from_the_first(app):
    """There is no ``self`` to skip."""

    @app.task(shared=False, base=PooledTask, key="user", name="t.unbound")
    def unbound(user: str, cmd: str) -> None: ...

    unbound.delay("u1", "u2")
    assert sent(app) == queue_of("u1")


def test_a_keyword_only_argument_is_never_taken_from_a_position(app):
    """What stands at its place in the list is part of ``*args``."""

    @app.task(shared=False, base=PooledTask, key="user", name="t.star")
    def star(*parts: str, user: str = "nobody") -> None: ...

    star.delay("a", "b")
    assert sent(app) == queue_of("nobody")
    star.delay("a", user="u1")
    assert sent(app) == queue_of("u1")


def test_a_shared_task_is_routed_alike(app):
    """Declared without an app."""

    app.tasks["tests.router.shared"].delay("u1")
    assert sent(app) == queue_of("u1")


def test_a_signature_a_chain_and_a_group_are_routed_by_their_own_keys(app):
    """Each message for itself."""
    task = keyed(app)
    task.s("ls", "u1").apply_async()
    chain(task.si("ls", "u2"), task.si("ls", "u3")).apply_async()
    group(task.si("ls", "u4"), task.si("ls", "u5")).apply_async()
    assert sorted(queue for queue, _ in messages(app)) == sorted(queue_of(key) for key in ("u1", "u2", "u4", "u5"))


def test_a_task_that_is_sent_by_its_name_is_routed_alike(app):
    """``send_task`` of a task that this producer knows needs no header."""
    app.send_task("tests.router.shared", ("u1",))
    assert sent(app) == queue_of("u1")


def test_a_routing_key_of_ones_own_is_refused(app):
    """As a queue: the key decides."""
    with pytest.raises(ConfigError, match="routing_key='mine' cannot be honoured"):
        keyed(app).apply_async(("ls", "u1"), routing_key="mine")


def test_the_header_is_the_key_of_a_task_that_declares_none(app):
    """And stays in the message."""

    @app.task(shared=False, base=PooledTask, name="t.headed")
    def headed() -> None: ...

    headed.apply_async(headers={KEY_HEADER: "u1"})
    ((queue, message),) = messages(app)
    assert queue == queue_of("u1")
    assert message.headers[KEY_HEADER] == "u1"


def test_a_foreign_producer_routes_by_the_header(app):
    """It knows the task's name only."""
    app.send_task("somewhere.else", (1,), headers={KEY_HEADER: "u1"})
    assert sent(app) == queue_of("u1")


def test_a_header_that_agrees_with_the_argument_is_fine(app):
    """Said twice, meant once."""
    keyed(app).apply_async(("ls", "u1"), headers={KEY_HEADER: "u1"})
    assert sent(app) == queue_of("u1")


def test_a_header_that_contradicts_the_argument_is_refused(app):
    """The error names both; nothing is sent."""
    with pytest.raises(InvalidKey, match="argument 'user' is 'u1', its header 'pool_key' 'u2'"):
        keyed(app).apply_async(("ls", "u1"), headers={KEY_HEADER: "u2"})
    assert messages(app) == []


@pytest.mark.parametrize("key", ["", 5, None, "a\nb", "x" * 257, ["u"]])
def test_a_bad_key_is_refused_where_it_is_sent(key, app):
    """In the producer, not in a worker minutes later."""
    with pytest.raises(InvalidKey):
        keyed(app).delay("ls", key)
    with pytest.raises(InvalidKey):
        app.send_task("x", headers={KEY_HEADER: key if key is not None else 0})
    assert messages(app) == []


def test_a_task_without_key_and_header_is_refused(app):
    """A pooled task has a key."""

    @app.task(shared=False, base=PooledTask, name="t.bare")
    def bare() -> None: ...

    with pytest.raises(InvalidKey, match=r"task t\.bare has no key"):
        bare.delay()


def test_an_ordinary_task_goes_its_own_way(app):
    """The router concerns keyed tasks only."""

    @app.task(shared=False, name="t.plain")
    def plain() -> None: ...

    plain.delay()
    assert sent(app) == "celery"
    plain.apply_async(queue="mine")
    assert sent(app) == "mine"


def test_a_queue_that_is_no_shard_queue_is_refused(app):
    """It is not silently ignored."""
    with pytest.raises(ConfigError, match=r"goes to the queue of its key, rt\.shard\.\d+: queue='mine'"):
        keyed(app).apply_async(("ls", "u1"), queue="mine")
    assert messages(app) == []


@pytest.mark.parametrize("named", ["u1", "u2"])
def test_a_shard_queue_is_replaced_by_the_keys_own(named, app):
    """The key decides; a retry names the queue that it came from."""
    keyed(app).apply_async(("ls", "u1"), queue=queue_of(named))
    assert sent(app) == queue_of("u1")


def retry(task: Any, message_queue: str, args: tuple[Any, ...], **request: Any) -> None:
    """Retry *task* as a worker does that got its message from *message_queue*."""
    info = {"exchange": "rt.shard", "routing_key": message_queue, "priority": 0, "redelivered": False}
    task.push_request(
        id="id-1", args=args, kwargs={}, called_directly=False, is_eager=False, delivery_info=info, retries=0, **request
    )
    try:
        task.retry(throw=False, countdown=0)
    finally:
        task.pop_request()


def test_a_retry_stays_in_the_keys_queue(app):
    """Same key, same shard."""
    retry(keyed(app), queue_of("u1"), ("ls", "u1"))
    ((queue, message),) = messages(app)
    assert queue == queue_of("u1")
    assert message.headers["retries"] == 1


def test_a_retry_decides_anew_after_the_number_of_shards_changed(app):
    """The queue that it remembers is not the key's any more."""
    other = next(name for name in (queue_name(shard, "rt") for shard in range(SHARDS)) if name != queue_of("u1"))
    retry(keyed(app), other, ("ls", "u1"))
    assert sent(app) == queue_of("u1")


def test_a_retry_of_a_header_keyed_task_keeps_its_header(app):
    """Or it would have lost its key."""

    @app.task(shared=False, base=PooledTask, bind=True, name="t.headed")
    def headed(self: Any) -> None: ...

    retry(headed, queue_of("u1"), (), headers={KEY_HEADER: "u1"}, pool_key="u1")
    ((queue, message),) = messages(app)
    assert queue == queue_of("u1")
    assert message.headers[KEY_HEADER] == "u1"


@pytest.mark.parametrize("shard", [0, 7])
def test_a_shard_task_goes_to_the_shard_that_it_names(shard, app):
    """Maintenance reaches every owner."""
    app.tasks["pool.sweep_shard"].delay(shard)
    assert sent(app) == queue_name(shard, "rt")


@pytest.mark.parametrize("shard", [-1, 8, "3", None, 1.0, True])
def test_a_shard_that_there_is_not_is_refused(shard, app):
    """Whole numbers of this system's range."""
    with pytest.raises(InvalidKey, match="must be a whole number from 0 to 7"):
        app.tasks["pool.sweep_shard"].delay(shard)


@pytest.mark.parametrize("field", ["key", "shard"])
def test_an_argument_that_the_task_does_not_have_is_refused_at_start(field, app):
    """The error names the task, the argument and those that there are."""

    @app.task(shared=False, base=PooledTask, bind=True, name="t.typo", **{field: "usr"})
    def typo(self: Any, user: str, cmd: str) -> None: ...

    with pytest.raises(ConfigError, match=rf"task t\.typo: {field}='usr' is not one of its arguments \(user, cmd\)"):
        app.finalize()
        _ = app.tasks["t.typo"]
        typo.delay("u1", "ls")


def test_every_shard_has_a_durable_queue_of_its_own(app):
    """Bound by its own name to one direct exchange."""
    queues = app.warm_pool.router.queues
    assert [queue.name for queue in queues] == [f"rt.shard.{number:03d}" for number in range(SHARDS)]
    for queue in queues:
        assert queue.durable
        assert queue.routing_key == queue.name
        assert (queue.exchange.name, queue.exchange.type) == ("rt.shard", "direct")
