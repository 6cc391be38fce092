"""What `install` works out from the app that it is given."""

from types import SimpleNamespace

import pytest
from celery import Celery

from pool import ConfigError, Settings, install

REDIS = "redis://localhost:1/3"


def redis_url(broker: str, settings: Settings) -> str | None:
    app = Celery("test", broker=broker, set_as_current=False)
    return install(app, settings).settings.redis_url


def test_leases_are_kept_in_the_broker_if_that_is_a_redis() -> None:
    """``install(app, Settings())`` of an app that has a Redis is all that it takes; another Redis can be named."""
    assert redis_url(REDIS, Settings()) == REDIS
    assert redis_url(REDIS, Settings(redis_url="redis://other")) == "redis://other"


@pytest.mark.parametrize("broker", ["amqp://localhost", "sentinel://localhost", f"{REDIS};redis://b", "memory://"])
def test_a_broker_that_cannot_keep_leases_is_not_taken_for_their_redis(broker: str) -> None:
    """It must be named then."""
    assert redis_url(broker, Settings()) is None


def test_a_node_without_a_redis_for_its_leases_is_refused_with_the_way_out() -> None:
    """It says both: name a Redis, or do without leases."""
    app = Celery("test", broker="memory://", set_as_current=False)
    extension = install(app, Settings())
    with pytest.raises(ConfigError, match=r"POOL_REDIS_URL is not set.*POOL_NODE_SHARDS"):
        extension.prepare_worker(
            SimpleNamespace(app=app, hostname="node@host", task_events=True, time_limit=None, soft_time_limit=None)
        )
