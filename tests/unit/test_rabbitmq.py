"""What is decided for RabbitMQ, without one."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from celery import Celery

from pool import ConfigError, Settings, install
from pool.worker import rabbitmq
from pool.worker.router import ShardRouter

URL = "amqp://pool@localhost"
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def make_app(broker: str = URL, **conf: Any) -> Celery:
    app = Celery("test", broker=broker, set_as_current=False)
    app.conf.update(conf)
    install(app, Settings())
    return app


def test_shard_queues_are_quorum_queues_with_one_active_consumer() -> None:
    """And with a delivery limit, without which what is given back goes to the tail."""
    for queue in ShardRouter(Settings(broker_url=URL)).queues:
        assert queue.queue_arguments["x-queue-type"] == "quorum"
        assert queue.queue_arguments["x-single-active-consumer"] is True
        assert queue.queue_arguments["x-delivery-limit"] > 10**9
        assert queue.exchange.type == "topic"


@pytest.mark.parametrize("url", [None, "redis://localhost", "rediss://localhost", "sentinel://localhost"])
def test_other_brokers_get_plain_queues(url: str | None) -> None:
    """Nothing changes for Redis."""
    queue = ShardRouter(Settings(broker_url=url)).queues[0]
    assert (queue.queue_arguments, queue.exchange.type) == (None, "direct")


def test_the_app_s_own_broker_decides_not_the_settings() -> None:
    """``install(app, Settings())`` of an app that was given its broker as Celery's apps are."""
    assert make_app().warm_pool.router.queues[0].exchange.type == "topic"
    assert make_app("redis://localhost").warm_pool.router.queues[0].exchange.type == "direct"


def test_publishes_are_confirmed_and_heartbeats_short() -> None:
    """What `install` sets, with what the app has set itself left alone."""
    app = make_app()
    assert app.conf.broker_transport_options == {"confirm_publish": True}
    assert app.conf.broker_heartbeat == 2
    app = make_app(broker_heartbeat=1, broker_transport_options={"confirm_publish": False, "read_timeout": 9})
    assert app.conf.broker_transport_options == {"confirm_publish": False, "read_timeout": 9}
    assert app.conf.broker_heartbeat == 1
    assert make_app("redis://localhost").conf.broker_transport_options == {"priority_steps": [0]}


def test_the_app_s_default_queue_stays_classic() -> None:
    """Only shard queues are ours."""
    assert make_app().amqp.queues["celery"].queue_arguments is None


@pytest.mark.parametrize(("ttl", "expected"), [(5.0, 2), (4.0, 2), (2.0, 1), (0.5, 1), (30.0, 15)])
def test_the_heartbeat_is_half_of_the_lease_in_whole_seconds(ttl: float, expected: int) -> None:
    """AMQP knows whole seconds only; 0 would turn heartbeats off."""
    assert rabbitmq.heartbeat(ttl) == expected


def test_a_node_that_is_silent_on_purpose_is_not_dropped() -> None:
    """A soft shutdown sleeps; with solo the event loop waits for each task: Celery's own heartbeat stays."""
    assert make_app(worker_soft_shutdown_timeout=5.0).conf.broker_heartbeat == 4
    solo = Celery("test", broker=URL, set_as_current=False)
    install(solo, Settings(execution="solo"))
    assert solo.conf.broker_heartbeat == 120


@pytest.mark.parametrize(("concurrency", "per_key", "expected"), [(32, 4, 8), (1, 4, 1), (8, 8, 8), (64, 1, 2)])
def test_a_shard_may_hold_what_runs_of_a_key_and_as_much_again(concurrency: int, per_key: int, expected: int) -> None:
    """64 consumers with the node's concurrency each would hold 2048 messages."""
    settings = Settings(concurrency=concurrency, key_concurrency=per_key)
    assert rabbitmq.shard_prefetch(settings) == expected


@pytest.mark.parametrize(
    ("countdown", "expected"), [(0.3, 1), (1, 1), (1.2, 2), (None, None), (0, None), (-3.0, None), (86400.0, 86400)]
)
def test_a_countdown_is_rounded_up_to_seconds(countdown: float | None, expected: int | None) -> None:
    """Celery rounds down, and raises where nothing is left."""
    assert rabbitmq.whole_seconds(countdown, None, NOW) == (expected, None)


@pytest.mark.parametrize(("ahead", "expected"), [(0.3, 1), (5.0, 5), (5.001, 6), (-1.0, None)])
@pytest.mark.parametrize("form", ["aware", "naive", "text"])
def test_an_eta_becomes_a_countdown(form: str, ahead: float, expected: int | None) -> None:
    """In whichever form it is given."""
    eta: Any = NOW + timedelta(seconds=ahead)
    eta = {"aware": eta, "naive": eta.replace(tzinfo=None), "text": eta.isoformat()}[form]
    assert rabbitmq.whole_seconds(None, eta, NOW) == (expected, None)


def test_a_retry_of_a_delayed_message_is_routed_again() -> None:
    """Its routing key carries the delay of the last time, which is no queue of the caller's own."""
    router = ShardRouter(Settings(broker_url=URL))
    delayed = "0." * 26 + "1.0.pool.shard.003"
    assert rabbitmq.without_delay(delayed) == "pool.shard.003"
    assert rabbitmq.without_delay("pool.shard.003") == "pool.shard.003"
    route = router("t", [], {}, {"headers": {"pool_key": "user-2"}, "routing_key": delayed})
    assert route is not None
    assert route["queue"].name == "pool.shard.017"


def limited(**options: Any) -> Celery:
    app = make_app()

    def work() -> None:
        pass

    app.task(work, name="limited", shared=False, **{"acks_late": True, **options})
    return app


@pytest.mark.parametrize("kind", ["time_limit", "soft_time_limit"])
def test_a_time_limit_above_the_consumer_timeout_is_refused(kind: str) -> None:
    """The message names task, limit, timeout and what would happen."""
    with pytest.raises(ConfigError, match=rf"task limited: {kind}=1801 s .* 1800 s: the broker would close"):
        rabbitmq.check_time_limits(limited(**{kind: 1801}), 1800.0)
    rabbitmq.check_time_limits(limited(**{kind: 1800}), 1800.0)


def test_the_app_s_and_the_worker_s_limits_count_for_tasks_without_one() -> None:
    """``task_time_limit``, and ``celery worker --time-limit`` where neither the task nor the app has one."""
    app = limited()
    app.conf.task_time_limit = 4000
    with pytest.raises(ConfigError, match="task limited: time_limit=4000 s"):
        rabbitmq.check_time_limits(app, 1800.0)
    rabbitmq.check_time_limits(app, 7200.0)
    with pytest.raises(ConfigError, match="task limited: time_limit=4001 s"):
        rabbitmq.check_time_limits(limited(), 1800.0, {"time_limit": 4001})


def test_a_task_that_is_acknowledged_before_it_runs_may_take_its_time() -> None:
    """The broker waits for nothing."""
    rabbitmq.check_time_limits(limited(acks_late=False, time_limit=9999), 1800.0)
