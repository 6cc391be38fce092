"""A producer compares its number of shards with the nodes'."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import Celery
from redis.asyncio import Redis

from pool import ConfigError, PooledTask, Settings, embedded, install
from pool.sharding.lease import LeaseMachine, Terms
from pool.sharding.redis_store import RedisStore


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("valkey")
    yield embedded.embedded_url(folder)
    embedded.stop(folder)


def join(url: str, namespace: str, shards: int) -> None:
    """A node of so many shards is alive."""

    async def beat() -> None:
        terms = Terms(ttl=60.0)
        async with Redis.from_url(url, decode_responses=True) as client:
            machine = LeaseMachine("n/1", "n", shards, terms)
            answer = await RedisStore(client, namespace, shards, terms).beat(machine.request(0.0))
            assert answer.verdict == "ok"

    asyncio.run(beat())


def route(url: str | None, namespace: str, shards: int) -> object:
    app = Celery("producer", broker="memory://", set_as_current=False)
    install(app, Settings(broker_url="memory://", redis_url=url, namespace=namespace, shards=shards))

    @app.task(shared=False, base=PooledTask, key="key", name="agreement.keyed")
    def keyed(key: str) -> None: ...

    return app.amqp.router.route({}, "agreement.keyed", ("a",), {}, task_type=keyed)["queue"]


def test_a_producer_that_agrees_sends(url: str) -> None:
    """It is compared once."""
    join(url, "agree", 16)
    assert route(url, "agree", 16)


def test_another_number_is_refused_with_both(url: str) -> None:
    """Before anything is sent to a queue that another key's node owns."""
    join(url, "differ", 16)
    with pytest.raises(ConfigError, match=r"POOL_SHARDS=8 in this producer, but 16 at the nodes"):
        route(url, "differ", 8)


@pytest.mark.parametrize("where", ["nobody", "nowhere", None])
def test_a_producer_does_not_depend_on_the_store(url: str, where: str | None, tmp_path: Path) -> None:
    """No node yet, no server, no address: it sends."""
    address = {"nobody": url, "nowhere": f"unix://{tmp_path}/none.sock", None: None}[where]
    assert route(address, "none", 8)
