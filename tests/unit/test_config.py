"""Every rule of the settings, and every environment variable."""

import dataclasses
import math
import re
from pathlib import Path

import pytest

from pool.config import GroupLimit, PoolConfig, Settings
from pool.errors import ConfigError

NAN = math.nan
POSITIVE = ("idle_timeout", "cleanup_interval", "acquire_timeout", "connect_timeout", "close_timeout", "max_lifetime")
NOT_NEGATIVE = ("check_after", "backoff_base", "backoff_max")


def test_the_defaults_are_sound_and_as_documented():
    """The numbers that the design names."""
    config, settings = PoolConfig(), Settings()
    assert (config.idle_timeout, config.max_backends, config.cleanup_interval) == (300.0, 200, 60.0)
    assert (settings.namespace, settings.shards, settings.execution) == ("pool", 64, "threads")
    assert settings.tasks_at_once == 32
    assert settings.leased
    assert (settings.lease_ttl, settings.lease_heartbeat, settings.handoff_timeout) == (5.0, 1.0, 300.0)
    assert settings.lease_grace == 120.0
    assert settings.key_concurrency == 4


@pytest.mark.parametrize("name", ["count", "starting"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "5", True])
def test_a_groups_numbers_must_be_whole_and_one_or_more(name, value):
    """The error names field, value, unit and rule."""
    with pytest.raises(ConfigError, match=f"^{name}={re.escape(repr(value))} backends: must be a whole number"):
        GroupLimit(**{"count": 1, name: value})


@pytest.mark.parametrize("value", [0, -1, "5", True, NAN])
def test_a_groups_weight_must_be_more_than_zero(value):
    """Bytes; None stands for no limit."""
    with pytest.raises(ConfigError, match=f"^weight={re.escape(repr(value))} bytes: must be more than 0"):
        GroupLimit(1, weight=value)
    assert GroupLimit(1).weight is None
    assert GroupLimit(1).starting is None


@pytest.mark.parametrize("groups", [{"g": 5}, {"": GroupLimit(1)}, {3: GroupLimit(1)}, [GroupLimit(1)], None])
def test_groups_are_names_with_limits(groups):
    """Anything else is told at start."""
    with pytest.raises(ConfigError, match=r"^groups.*GroupLimit"):
        PoolConfig(groups=groups)


def test_a_config_keeps_its_groups():
    """A mapping that its maker changes afterwards changes no pool."""
    given = {"g": GroupLimit(1)}
    config = PoolConfig(groups=given)
    given.clear()
    assert config.groups == {"g": GroupLimit(1)}
    assert config.changed(max_backends=3).groups == config.groups


@pytest.mark.parametrize("name", POSITIVE)
@pytest.mark.parametrize("value", [0, -1, -0.001, "5", True, NAN])
def test_a_time_must_be_more_than_zero(name, value):
    """The error names field, value, unit and rule."""
    with pytest.raises(ConfigError, match=f"^{name}={re.escape(repr(value))} s: must be more than 0"):
        PoolConfig(**{name: value})


@pytest.mark.parametrize("name", NOT_NEGATIVE)
@pytest.mark.parametrize("value", [-1, -0.001, "5", None, NAN])
def test_a_time_that_may_be_zero_must_not_be_less(name, value):
    """Zero has a meaning there."""
    PoolConfig(**{"backoff_base": 0, name: 0} if name != "backoff_max" else {"backoff_base": 0, "backoff_max": 0})
    with pytest.raises(ConfigError, match=f"^{name}={re.escape(repr(value))} s: must be 0 or more"):
        PoolConfig(**{name: value})


@pytest.mark.parametrize("value", [0, -1, 1.5, 0.5, "3", True, None])
def test_max_backends_is_a_whole_number(value):
    """One or more, counted in backends."""
    with pytest.raises(ConfigError, match=f"^max_backends={re.escape(repr(value))} backends: must be a whole number"):
        PoolConfig(max_backends=value)


@pytest.mark.parametrize("value", [1, -0.1, NAN, "0.5", None])
def test_lifetime_jitter_is_a_share_below_one(value):
    """Or a lifetime could end at its start."""
    with pytest.raises(ConfigError, match=r"^lifetime_jitter="):
        PoolConfig(lifetime_jitter=value)


def test_the_backoff_cannot_end_below_its_start():
    """A relation between two settings names both."""
    with pytest.raises(ConfigError, match=r"backoff_max=1 s: must not be below backoff_base=2 s"):
        PoolConfig(backoff_base=2, backoff_max=1)


def test_changed_returns_a_checked_copy():
    """The original stays as it is."""
    config = PoolConfig()
    assert config.changed(max_backends=3) == PoolConfig(max_backends=3)
    assert config == PoolConfig()
    with pytest.raises(ConfigError, match="max_backends"):
        config.changed(max_backends=0)
    with pytest.raises(ConfigError, match=r"unknown pool setting 'max_backend': known are .*max_backends"):
        config.changed(max_backend=3)


@pytest.mark.parametrize("config", [PoolConfig(), Settings()])
def test_settings_cannot_be_changed_in_place(config):
    """They are frozen."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.idle_timeout = 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"namespace": ""}, "namespace='': must be 1 to 64 letters"),
        ({"namespace": "a.b"}, "namespace='a.b'"),
        ({"namespace": "a\n"}, "namespace="),
        ({"namespace": "x" * 65}, "namespace="),
        ({"shards": 0}, "shards=0: must be a whole number from 1 to 65536"),
        ({"shards": 65_537}, "shards=65537"),
        ({"shards": 1.5}, "shards=1.5"),
        ({"node_shards": ()}, "node_shards is empty"),
        ({"node_shards": (64,)}, "node_shards names shard 64: must be from 0 to 63"),
        ({"node_shards": (-1,)}, "node_shards names shard -1"),
        ({"execution": "gevent"}, "execution='gevent': must be one of threads, prefork, solo"),
        ({"concurrency": 0}, "concurrency=0 tasks: must be 1 or more"),
        ({"concurrency": 2, "execution": "prefork"}, "concurrency=2 with execution='prefork': must be 1"),
        ({"concurrency": 2, "execution": "solo"}, "concurrency=2 with execution='solo': must be 1"),
        ({"sweep_interval": 0}, "sweep_interval=0 s: must be more than 0"),
        ({"close_interval": -1}, "close_interval=-1 s"),
        ({"chat_ttl": NAN}, "chat_ttl=nan s"),
        ({"max_agents": 0}, "max_agents=0 agents: must be a whole number, 1 or more"),
        ({"max_agents": 2.5}, "max_agents=2.5 agents: must be a whole number"),
        ({"max_agents": True}, "max_agents=True agents: must be a whole number"),
        ({"max_agents": None}, "max_agents=None agents: must be a whole number"),
        ({"agent_starts": 0}, "agent_starts=0 agents: must be a whole number, 1 or more"),
        ({"agent_starts": "2"}, "agent_starts='2' agents: must be a whole number"),
        ({"max_agents_mb": 0}, "max_agents_mb=0 MB: must be more than 0, or None for no limit"),
        ({"max_agents_mb": -1.5}, "max_agents_mb=-1.5 MB"),
        ({"max_agents_mb": NAN}, "max_agents_mb=nan MB"),
        ({"max_agents_mb": "many"}, "max_agents_mb='many' MB"),
    ],
)
def test_settings_that_break_a_rule_are_refused(values, message):
    """At start, with a message that says what to change."""
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        Settings(**values)


def test_tasks_at_once_depends_on_the_execution_pool():
    """Threads share; the others run one at a time."""
    assert Settings(execution="prefork").tasks_at_once == 1
    assert Settings(execution="solo", concurrency=1).tasks_at_once == 1
    assert Settings(concurrency=7).tasks_at_once == 7


def test_the_limit_of_agents_is_what_the_settings_say():
    """20 at most and two starting at once, whatever memory they hold, unless told otherwise; a MB is 10^6 bytes."""
    assert Settings().agent_limit == GroupLimit(20, None, 2)
    assert Settings(max_agents=3, max_agents_mb=1.5, agent_starts=1).agent_limit == GroupLimit(3, 1_500_000, 1)


@pytest.mark.parametrize(
    ("variable", "text", "field", "value"),
    [
        ("POOL_BROKER_URL", "redis://b/0", "broker_url", "redis://b/0"),
        ("POOL_REDIS_URL", "redis://r/1", "redis_url", "redis://r/1"),
        ("POOL_RESULT_URL", "redis://x/2", "result_url", "redis://x/2"),
        ("POOL_NAMESPACE", "acme", "namespace", "acme"),
        ("POOL_SHARDS", " 128 ", "shards", 128),
        ("POOL_NODE_SHARDS", "0-3, 7,5 - 6", "node_shards", (0, 1, 2, 3, 5, 6, 7)),
        ("POOL_NODE_SHARDS", "3,3,1-2,2-3", "node_shards", (1, 2, 3)),
        ("POOL_EXECUTION", "solo", "execution", "solo"),
        ("POOL_CONCURRENCY", "8", "concurrency", 8),
        ("POOL_HOSTS_FILE", "/etc/hosts.toml", "hosts_file", Path("/etc/hosts.toml")),
        ("POOL_DATA_DIR", "/srv/data", "data_dir", Path("/srv/data")),
        ("POOL_CHAT_TTL", "12.5", "chat_ttl", 12.5),
        ("POOL_MAX_AGENTS", "3", "max_agents", 3),
        ("POOL_MAX_AGENTS_MB", "1500.5", "max_agents_mb", 1500.5),
        ("POOL_AGENT_STARTS", "1", "agent_starts", 1),
        ("POOL_IDLE_TIMEOUT", "60", "pool.idle_timeout", 60.0),
        ("POOL_MAX_BACKENDS", "5", "pool.max_backends", 5),
        ("POOL_ACQUIRE_TIMEOUT", "1.5", "pool.acquire_timeout", 1.5),
    ],
)
def test_each_variable_sets_its_field(variable, text, field, value):
    """And only that one."""
    settings = Settings.from_env({variable: text})
    found = settings
    for part in field.split("."):
        found = getattr(found, part)
    assert found == value
    name = field.split(".")[0]
    assert dataclasses.replace(settings, **{name: getattr(Settings(), name)}) == Settings()


@pytest.mark.parametrize("text", ["", "   "])
def test_an_empty_variable_is_an_unset_one(text):
    """As compose files leave them."""
    variables = "BROKER_URL SHARDS NODE_SHARDS EXECUTION CONCURRENCY IDLE_TIMEOUT NAMESPACE DATA_DIR HOSTS_FILE".split()
    variables += "MAX_AGENTS MAX_AGENTS_MB AGENT_STARTS".split()
    assert Settings.from_env({f"POOL_{name}": text for name in variables}) == Settings()


def test_the_process_environment_is_read_without_an_argument(monkeypatch):
    """At the call, not at import."""
    monkeypatch.setenv("POOL_SHARDS", "7")
    assert Settings.from_env().shards == 7


@pytest.mark.parametrize(
    ("variable", "text", "rule"),
    [
        ("POOL_NAMESPACE", "a b", "must be 1 to 64 letters"),
        ("POOL_SHARDS", "many", "must be a whole number"),
        ("POOL_SHARDS", "1e3", "must be a whole number"),
        ("POOL_SHARDS", "0", "must be a whole number from 1 to 65536"),
        ("POOL_NODE_SHARDS", "0-", "must be shards and ranges such as 0-31,40"),
        ("POOL_NODE_SHARDS", "5-3", "must be shards and ranges"),
        ("POOL_NODE_SHARDS", "-1", "must be shards and ranges"),
        ("POOL_NODE_SHARDS", "1,,2", "must be shards and ranges"),
        ("POOL_NODE_SHARDS", "60-64", "must be from 0 to 63"),
        ("POOL_NODE_SHARDS", "0-99999999999999", "must be from 0 to 65535"),
        ("POOL_EXECUTION", "gevent", "must be one of threads, prefork, solo"),
        ("POOL_CONCURRENCY", "two", "must be a whole number"),
        ("POOL_CONCURRENCY", "0", "must be 1 or more"),
        ("POOL_CHAT_TTL", "soon", "must be a number of seconds"),
        ("POOL_CHAT_TTL", "0", "must be more than 0"),
        ("POOL_MAX_AGENTS", "some", "must be a whole number"),
        ("POOL_MAX_AGENTS", "2.5", "must be a whole number"),
        ("POOL_MAX_AGENTS", "0", "must be a whole number, 1 or more"),
        ("POOL_AGENT_STARTS", "two", "must be a whole number"),
        ("POOL_AGENT_STARTS", "-1", "must be a whole number, 1 or more"),
        ("POOL_MAX_AGENTS_MB", "4G", "must be a number of megabytes"),
        ("POOL_MAX_AGENTS_MB", "0", "must be more than 0, or None for no limit"),
        ("POOL_MAX_AGENTS_MB", "nan", "must be more than 0"),
        ("POOL_IDLE_TIMEOUT", "5m", "must be a number of seconds"),
        ("POOL_LEASE_GRACE", "-1", "must be 0 or more"),
        ("POOL_LEASE_GRACE", "nan", "must be 0 or more"),
        ("POOL_IDLE_TIMEOUT", "-1", "must be more than 0"),
        ("POOL_IDLE_TIMEOUT", "nan", "must be more than 0"),
        ("POOL_MAX_BACKENDS", "1.5", "must be a whole number"),
        ("POOL_MAX_BACKENDS", "0", "must be a whole number, 1 or more"),
        ("POOL_ACQUIRE_TIMEOUT", "-3", "must be more than 0"),
    ],
)
def test_a_bad_variable_is_named_with_its_value_and_the_rule(variable, text, rule):
    """Whoever starts the worker knows what to change."""
    with pytest.raises(ConfigError) as caught:
        Settings.from_env({variable: text})
    message = str(caught.value)
    assert message.startswith(variable)
    assert rule in message
    shown = {"60-64": "shard 64", "0-99999999999999": text}.get(text, text)
    assert shown in message or str(float(text)) in message


def test_a_rule_between_two_variables_names_what_to_do():
    """prefork with several children would scatter a key."""
    with pytest.raises(ConfigError, match=r"^POOL_CONCURRENCY: concurrency=4 with execution='prefork'.*Use execution="):
        Settings.from_env({"POOL_CONCURRENCY": "4", "POOL_EXECUTION": "prefork"})
