"""What the coordinator relies on of RabbitMQ itself: whose turn it is, and in which order messages come back.

Raw AMQP on a shard queue as `ShardRouter` declares it; each consumer on a connection of its own, as a node is.
"""

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from kombu import Connection, Exchange, Producer, Queue

from pool import Settings
from pool.worker.router import ShardRouter
from pool.worker.transport import ShardConnection
from tests.support.rabbitmq import RabbitServer
from tests.support.waiting import wait_until

pytestmark = pytest.mark.rabbitmq


@pytest.fixture(scope="module")
def url(rabbit: RabbitServer) -> str:
    return rabbit.vhost()


class Node:
    """A consumer that acknowledges nothing by itself."""

    def __init__(self, url: str, queue: Queue, prefetch: int = 4) -> None:
        self.connection = Connection(url, transport_options={"confirm_publish": True})
        self.channel = self.connection.channel()
        self.queue = queue(self.channel)
        self.queue.declare()
        self.messages: list[Any] = []
        self.channel.basic_qos(0, prefetch, False)

    def consume(self) -> "Node":
        self.tag = "node"
        self.queue.consume(self.tag, lambda raw: self.messages.append(self.channel.message_to_python(raw)))
        return self

    def send(self, *bodies: object) -> "Node":
        for body in bodies:
            message = self.channel.prepare_message(str(body).encode(), properties={"delivery_mode": 2})
            self.channel.basic_publish(message, self.queue.exchange.name, self.queue.routing_key)
        return self

    def received(self, count: int) -> str:
        """Wait for *count* messages in all; return their bodies."""
        wait_until(lambda: self._drain() or len(self.messages) >= count, f"{count} messages")
        return self.bodies()

    def bodies(self) -> str:
        return "".join(
            str(message.body, "utf-8") if isinstance(message.body, bytes) else message.body for message in self.messages
        )

    def nothing_more(self) -> bool:
        """Whether the server has nothing to say to us once it has answered a question."""
        before = len(self.messages)
        self.queue.queue_declare(passive=True)  # deliveries that are under way come before the answer
        return len(self.messages) == before

    def cancel(self) -> None:
        self.channel.basic_cancel(self.tag)

    def give_back(self) -> None:
        """All that it holds, oldest first."""
        for message in self.messages:
            message.requeue()

    def vanish(self) -> None:
        """End the connection without a word, as a killed process does."""
        self.connection.connection.transport.sock.close()

    def close(self) -> None:
        try:
            self.connection.close()
        except OSError:
            pass  # vanished

    def _drain(self) -> None:
        try:
            self.connection.drain_events(timeout=0.05)
        except TimeoutError:
            pass


@pytest.fixture
def node(url: str, request: pytest.FixtureRequest) -> Iterator[Callable[..., Node]]:
    """Make nodes on a queue of the test's own."""
    nodes: list[Node] = []
    queue = ShardRouter(Settings(broker_url=url, namespace=request.node.name[:60], shards=1)).queues[0]

    def make(**options: Any) -> Node:
        nodes.append(Node(url, queue, **options))
        return nodes[-1]

    yield make
    for made in nodes:
        made.close()


def test_what_is_given_back_oldest_first_keeps_its_place(node) -> None:
    """A handoff: cancel, requeue in order of arrival; the next node gets everything in the order of sending."""
    first = node().send(*"abcdefgh").consume()
    assert first.received(4) == "abcd"
    first.cancel()
    first.give_back()
    assert node(prefetch=8).consume().received(8) == "abcdefgh"


def test_a_cancelled_consumer_keeps_what_it_holds_and_the_next_one_gets_the_rest_at_once(node) -> None:
    """Single active consumer is no guard for what still runs: the lease has to be."""
    first = node().send(*"abcdefgh").consume()
    assert first.received(4) == "abcd"
    second = node(prefetch=8).consume()
    assert second.nothing_more()
    first.cancel()
    assert second.received(4) == "efgh"
    for message in first.messages:
        message.ack()
    assert second.nothing_more()


def test_only_one_of_two_consumers_gets_messages(node) -> None:
    """The second one stands by."""
    first, second = node(prefetch=1).consume(), node().consume()
    first.send(*"abc")
    assert first.received(1) == "a"
    assert second.nothing_more()
    assert second.bodies() == ""


def test_a_lost_connection_gives_its_messages_to_the_next_node_at_once_in_order_and_first(node) -> None:
    """As after kill -9; marked as redelivered."""
    first = node().send(*"abcdefgh").consume()
    assert first.received(4) == "abcd"
    second = node(prefetch=8).consume()
    lost = time.monotonic()
    first.vanish()
    assert second.received(8) == "abcdefgh"
    assert time.monotonic() - lost < 20.0  # not when a heartbeat of 60 s is missed
    assert [m.delivery_info["redelivered"] for m in second.messages] == [True] * 4 + [False] * 4


def test_no_number_of_handoffs_loses_a_message(node) -> None:
    """RabbitMQ 4 drops a message after 20 of them, unless the queue says otherwise."""
    holder = node(prefetch=1).send("a").consume()
    for times in range(1, 31):
        holder.received(times)
        holder.messages[-1].requeue()
    assert holder.received(31) == "a" * 31


def test_a_connection_that_broke_is_let_go_of_before_it_is_replaced(url: str) -> None:
    """What Celery's event dispatcher goes through when a node was frozen for longer than the heartbeat of RabbitMQ."""
    with ShardConnection(url) as connection:
        exchange = Exchange("events", "topic", durable=False)
        producer = Producer(connection, exchange=exchange, auto_declare=False)

        def send() -> None:
            policy = {"max_retries": 3, "interval_start": 0}  # Celery sets no limit
            producer.publish("event", routing_key="any", declare=[producer.exchange], retry=True, retry_policy=policy)

        send()
        broken = connection.connection
        broken.transport.sock.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError):
            broken.drain_events(timeout=10)  # whoever reads it keeps the error to himself
        assert connection.connection is not broken  # a look is enough for another one
        send()
