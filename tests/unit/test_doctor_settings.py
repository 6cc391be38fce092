"""Settings that bite: each is found, and a good app is not blamed."""

from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery

from pool import PooledTask, Settings, install
from pool.doctor.broker import check_broker
from pool.doctor.deployment import Deployment
from pool.doctor.redis import RESULTS, SKEW, Server, memory, response, version
from pool.doctor.settings import check_results, check_settings

GOOD = {
    "accept_content": ["json"],
    "result_expires": 3600,
    "worker_send_task_events": True,
    "result_backend": "cache+memory://",
}


def deployed(
    conf: dict[str, Any] | None = None, broker: str = "memory://", after: Any = None, **settings: Any
) -> Deployment:
    app = Celery("test", set_as_current=False)
    app.conf.update({**GOOD, "broker_url": broker, **(conf or {})})
    install(app, Settings(broker_url=broker, **settings))
    app.conf.update(after or {})
    return Deployment(app, fix=False, timeout=2.0)


def codes(found: Any) -> dict[str, str]:
    return {finding.code: finding.level for finding in found}


def test_a_good_app_is_not_blamed():
    """One ok, and nothing else."""
    assert codes(check_settings(deployed())) == {"settings": "ok"}
    assert codes(check_results(deployed())) == {}


@pytest.mark.parametrize(
    ("after", "code", "level"),
    [
        ({"worker_prefetch_multiplier": 4}, "prefetch", "warning"),
        ({"worker_prefetch_multiplier": 0}, "prefetch", "warning"),
        ({"worker_pool": "prefork", "worker_concurrency": 4}, "prefork-concurrency", "error"),
        ({"worker_pool": "prefork", "worker_concurrency": None}, "prefork-concurrency", "error"),
        ({"task_always_eager": True}, "always-eager", "error"),
        ({"worker_send_task_events": False}, "task-events", "info"),
        ({"enable_utc": False}, "utc-off", "warning"),
        ({"accept_content": ["json", "pickle"]}, "pickle-accepted", "warning"),
        ({"result_accept_content": ["application/x-python-serialize"]}, "pickle-accepted", "warning"),
        ({"task_serializer": "yaml"}, "task-serializer", "error"),
        ({"task_time_limit": 60, "task_soft_time_limit": 60}, "soft-limit", "warning"),
        ({"task_time_limit": 301}, "handoff-timeout", "info"),
        ({"task_ignore_result": True}, "ignore-result", "warning"),
    ],
)
def test_a_setting_that_bites_is_found(after, code, level):
    """With what was seen and what to do."""
    found = [finding for finding in check_settings(deployed(after=after)) if finding.level != "ok"]
    assert codes(found) == {code: level}
    [finding] = found
    assert finding.what
    assert finding.why
    assert finding.fix
    (name, value), *_ = after.items()
    assert any(str(each) in finding.what for each in (value, name))


def test_install_s_own_values_are_good():
    """With every execution pool."""
    for execution in ("threads", "prefork", "solo"):
        assert codes(check_settings(deployed(execution=execution))) == {"settings": "ok"}


def test_a_task_that_acknowledges_early_is_named():
    """Only those with a key: others may do as they like."""
    deployment = deployed()

    @deployment.app.task(base=PooledTask, key="key", acks_late=False, name="mine.early", shared=False)
    def early(key): ...

    @deployment.app.task(acks_late=False, name="mine.plain", shared=False)
    def plain(): ...

    [finding] = check_settings(deployment)
    assert (finding.code, finding.level) == ("acks-early", "warning")
    assert "mine.early" in finding.what
    assert "mine.plain" not in finding.what


def test_a_time_limit_of_one_task_counts():
    """It is named, with its value."""
    deployment = deployed()

    @deployment.app.task(base=PooledTask, key="key", time_limit=999, name="mine.long", shared=False)
    def long(key): ...

    [finding, _ok] = check_settings(deployment)
    assert finding.code == "handoff-timeout"
    assert "time_limit of task mine.long=999 s" in finding.what


# -- results


@pytest.mark.parametrize(
    ("conf", "code"),
    [
        ({"result_backend": None}, "result-backend"),
        ({"result_backend": "disabled://"}, "result-backend"),
        ({"result_expires": None}, "result-expiry"),
        ({"result_expires": 0}, "result-expiry"),
        ({"result_serializer": "yaml"}, "result-serializer"),
        ({"result_serializer": "pickle"}, "result-serializer"),
    ],
)
def test_results_that_get_lost_are_found(conf, code):
    """No backend, no end, no way for a failure."""
    assert list(codes(check_results(deployed(conf)))) == [code]


@pytest.mark.parametrize("kind", ["json", "yaml", "pickle"])
def test_a_serializer_that_is_accepted_carries_a_failure(kind):
    """It is tried, not looked up."""
    assert codes(check_results(deployed({"result_serializer": kind, "accept_content": [kind]}))) == {}


# -- the broker's options; no server is there


def broker_codes(**kwargs: Any) -> dict[str, str]:
    return codes(finding for finding in check_broker(deployed(**kwargs)) if finding.code != "broker-unreachable")


NOWHERE = "redis://127.0.0.1:1/0"


def test_options_that_nodes_refuse_are_found():
    """By the same rule as theirs."""
    options = {"broker_transport_options": {"priority_steps": [0, 3, 6, 9]}}
    assert broker_codes(broker=NOWHERE, conf=options) == {"broker-options": "error"}


def test_a_visibility_timeout_bites_those_who_have_one():
    """Nodes on Redis have none: only one that was set for others is worth a word."""
    limit = {"task_time_limit": 4000}
    assert broker_codes(broker=NOWHERE, after=limit, handoff_timeout=9999) == {}
    short = {"broker_transport_options": {"visibility_timeout": 600}}
    assert broker_codes(broker=NOWHERE, conf=short, after=limit) == {"visibility-timeout": "warning"}
    assert broker_codes(broker=NOWHERE, conf=short, after={"task_time_limit": 500}) == {}


def test_another_transport_is_told_with_its_visibility_timeout():
    """There nodes take messages as kombu does."""
    found = broker_codes(broker="memory://", after={"task_time_limit": 4000})
    assert found == {"broker": "ok", "broker-kind": "warning", "visibility-timeout": "warning"}


def test_on_rabbitmq_a_time_limit_is_held_against_the_consumer_timeout():
    """By the rule of the nodes; none at all is worth a word."""
    amqp = "amqp://guest@127.0.0.1:1//"
    assert broker_codes(broker=amqp, after={"task_time_limit": 3600}) == {"consumer-timeout": "error"}
    assert broker_codes(broker=amqp, after={"task_time_limit": 600}) == {}
    assert broker_codes(broker=amqp) == {"no-time-limit": "info"}


# -- what a server tells of itself

SERVER = Server("redis://h", "h:6379", [RESULTS])


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({"redis_version": "7.2.4", "role": "master"}, []),
        ({"redis_version": "6.2.0"}, []),
        ({"redis_version": "6.0.16"}, ["redis-version"]),
        ({"redis_version": "7.2.4", "role": "slave"}, ["redis-replica"]),
    ],
)
def test_an_old_server_and_a_replica_are_found(told, expected):
    """Neither will do."""
    assert list(codes(version(SERVER, told))) == expected


def test_a_full_server_is_found():
    """Near its limit; without one there is none."""
    assert list(codes(memory(SERVER, {"used_memory": 95, "maxmemory": 100}))) == ["redis-memory"]
    assert list(codes(memory(SERVER, {"used_memory": 80, "maxmemory": 100}))) == []
    assert list(codes(memory(SERVER, {"used_memory": 80, "maxmemory": 0}))) == []


@pytest.mark.parametrize(
    ("skew", "expected"), [(0.0, []), (SKEW / 2, []), (2.5, ["clock-skew"]), (-2.5, ["clock-skew"])]
)
def test_a_clock_that_differs_is_found(skew, expected, monkeypatch):
    """Either way, not by what the way takes."""
    monkeypatch.setattr("pool.doctor.redis.time", SimpleNamespace(time=lambda: 1000.0, monotonic=lambda: 7.0))
    client = SimpleNamespace(time=lambda: (1000 + int(skew // 1), int(skew % 1 * 1e6)))
    assert list(codes(response(SERVER, client))) == expected


def test_a_slow_server_is_found(monkeypatch):
    """By the median: one slow answer is none."""
    clock = iter([0, 1, *(now for start in range(4) for now in (start, start + 0.01)), *(0, 0.2) * 5])
    monkeypatch.setattr("pool.doctor.redis.time", SimpleNamespace(time=lambda: 1000.0, monotonic=lambda: next(clock)))
    client = SimpleNamespace(time=lambda: (1000, 0))
    assert list(codes(response(SERVER, client))) == []
    assert list(codes(response(SERVER, client))) == ["redis-latency"]
