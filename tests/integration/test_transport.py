"""The leaner Redis transport on a real Valkey: the same messages, in the same order, through every change."""

from collections.abc import Iterator
from typing import Any

import pytest
import redis
from kombu import Connection, Consumer, Exchange, Producer, Queue
from kombu.transport import redis as kombu_redis

from pool import embedded
from pool.worker.transport import ShardChannel, ShardConnection, ShardTransport

OPTIONS = {"priority_steps": [0]}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("valkey") / "data"
    yield embedded.embedded_url(folder)
    embedded.stop(folder)


@pytest.fixture
def server(url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(url, decode_responses=True) as client:
        client.flushall()
        yield client


@pytest.fixture
def connection(url: str, server: redis.Redis) -> Iterator[ShardConnection]:
    with ShardConnection(url, transport_options=OPTIONS) as connection:
        yield connection


def queues(number: int, name: str = "q") -> list[Queue]:
    exchange = Exchange("shards", type="direct")
    return [Queue(f"{name}.{n:03d}", exchange, routing_key=f"{name}.{n:03d}") for n in range(number)]


def send(connection: Connection, queue: Queue, *bodies: str) -> None:
    producer = Producer(connection.default_channel)
    for body in bodies:
        producer.publish(body, routing_key=queue.name, exchange=queue.exchange, declare=[queue])


def receive(connection: Connection, number: int, ack: bool = True) -> list[tuple[str, Any]]:
    """Take *number* messages through the consumers that are there: ``(queue, body)`` in order."""
    found = []
    while len(found) < number:
        RECEIVED.clear()
        connection.drain_events(timeout=10)
        for body, message in RECEIVED:
            found.append((message.delivery_info["routing_key"], body))
            if ack:
                message.ack()
    return found


RECEIVED: list[tuple[Any, Any]] = []


def consumer(connection: Connection, *consumed: Queue) -> Consumer:
    made = Consumer(connection.default_channel, list(consumed), on_message=None, accept=["json", "text/plain"])
    made.register_callback(lambda body, message: RECEIVED.append((body, message)))
    made.consume()
    return made


def test_a_plain_redis_gets_the_lean_channel(connection: ShardConnection) -> None:
    """And it is the one that is at work in these tests."""
    assert isinstance(connection.transport, ShardTransport)
    assert isinstance(connection.default_channel, ShardChannel)


def test_other_brokers_are_left_to_kombu() -> None:
    """Memory, AMQP, a Redis behind Sentinel."""
    for other in ("memory://", "amqp://", "sentinel://h"):
        assert ShardConnection(other).get_transport_cls() is Connection(other).get_transport_cls()


def test_messages_of_many_queues_all_arrive_in_order(connection: ShardConnection) -> None:
    """64 queues, five messages each: per queue first in, first out, nothing twice."""
    consumed = queues(64)
    for queue in consumed:
        send(connection, queue, *(f"{n}" for n in range(5)))
    with consumer(connection, *consumed):
        found = receive(connection, 64 * 5)
    for queue in consumed:
        assert [body for name, body in found if name == queue.name] == ["0", "1", "2", "3", "4"]


def test_queues_are_added_and_cancelled_while_it_consumes(connection: ShardConnection, server: redis.Redis) -> None:
    """A cancelled queue keeps its messages, a new one is heard at once."""
    first, second, third = queues(3)
    with consumer(connection, first, second) as consumes:
        send(connection, first, "a")
        assert receive(connection, 1) == [(first.name, "a")]
        consumes.cancel_by_queue(first.name)
        consumes.add_queue(third)
        consumes.consume()
        for queue in (first, second, third):
            send(connection, queue, queue.name)
        assert sorted(receive(connection, 2)) == [(second.name, second.name), (third.name, third.name)]
        # The one request that was on its way at the cancel may still take a message; it is delivered then, never lost.
        assert server.llen(first.name) + len(RECEIVED) >= 1


def test_what_is_not_acknowledged_is_given_back_at_the_end(url: str, server: redis.Redis) -> None:
    """The kept client does the bookkeeping of unacknowledged messages as kombu's own do."""
    [queue] = queues(1)
    with ShardConnection(url, transport_options=OPTIONS) as connection:
        send(connection, queue, "mine", "later")
        with consumer(connection, queue):
            receive(connection, 1, ack=False)
            assert server.hlen("unacked") >= 1
    assert server.hlen("unacked") == 0
    assert server.llen(queue.name) == 2


def test_it_goes_on_after_the_server_cut_every_connection(connection: ShardConnection, server: redis.Redis) -> None:
    """kombu's way to revive, with a new connection pool: no stale client is used."""
    consumed = queues(16)
    send(connection, consumed[3], "before")
    with consumer(connection, *consumed):
        assert receive(connection, 1) == [(consumed[3].name, "before")]
    before = connection.default_channel
    server.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    with pytest.raises(connection.connection_errors):
        with consumer(connection, *consumed):
            connection.drain_events(timeout=5)
            connection.drain_events(timeout=5)
    connection.close()
    revived = ShardConnection(connection.as_uri(include_password=True), transport_options=OPTIONS)
    with revived:
        send(revived, consumed[5], "after")
        with consumer(revived, *consumed):
            assert receive(revived, 1) == [(consumed[5].name, "after")]
        assert revived.default_channel is not before


def test_a_client_of_a_replaced_pool_is_not_kept(connection: ShardConnection) -> None:
    """kombu replaces a channel's connection pool when it reconnects."""
    channel = connection.default_channel
    kept = channel._create_client()
    assert channel._create_client() is kept
    channel._disconnect_pools()
    fresh = channel._create_client()
    assert fresh is not kept
    assert fresh.ping()


@pytest.mark.parametrize("options", [{"priority_steps": [0, 5]}, {"priority_steps": [0], "global_keyprefix": "here:"}])
def test_priorities_and_prefixes_go_the_stock_way(options: dict[str, Any], url: str, server: redis.Redis) -> None:
    """They change the names on the wire; messages arrive all the same."""
    [queue] = queues(1, "stock")
    with ShardConnection(url, transport_options=options) as connection:
        send(connection, queue, "x")
        with consumer(connection, queue):
            assert receive(connection, 1) == [(queue.name, "x")]


def test_the_command_on_the_wire_is_kombus_own(connection: ShardConnection, monkeypatch: pytest.MonkeyPatch) -> None:
    """Byte for byte what stock kombu and redis-py send, also for names that are not ASCII."""
    consumed = [*queues(3), Queue("Zoë", Exchange("shards"), routing_key="Zoë")]
    wires: dict[type, bytes] = {}
    with consumer(connection, *consumed):
        channel = connection.default_channel
        wire = channel.pool.get_connection()
        monkeypatch.setattr(channel.client, "connection", wire)
        monkeypatch.setattr(wire, "send_packed_command", lambda command, **_: wires.update({kind: b"".join(command)}))
        for kind in (ShardChannel, kombu_redis.Channel):
            kind._brpop_start(channel, timeout=1)
        channel._in_poll = None
        monkeypatch.undo()
        channel.pool.release(wire)
    assert wires[ShardChannel] == wires[kombu_redis.Channel]
    assert wires[ShardChannel].startswith(b"*6\r\n$5\r\nBRPOP\r\n")


def test_a_closed_channel_says_so_as_a_lost_connection(url: str, server: redis.Redis) -> None:
    """The worker knows how to go on after that, and not after an AttributeError."""
    with ShardConnection(url, transport_options=OPTIONS) as connection:
        channel = connection.default_channel
        errors = connection.connection_errors
    with pytest.raises(errors, match="the channel is closed"):
        channel._create_client()
