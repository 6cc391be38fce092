"""Claims on real servers: a message is in its queue or recorded as taken, whatever dies in between."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import pytest
import redis
from kombu import Connection, Consumer, Exchange, Producer, Queue
from kombu.asynchronous import Hub

from pool.errors import ConfigError
from pool.worker import transport
from pool.worker.claims import Claims, Fenced, claimants, restore
from pool.worker.transport import ShardChannel, ShardConnection
from tests.support.processes import is_gone
from tests.support.redis_servers import DebianRedis, EmbeddedServer
from tests.support.services import require_service
from tests.support.waiting import wait_until

NUMBERS = count()
EXCHANGE = Exchange("shards", type="direct")


@pytest.fixture(scope="module", params=["valkey", "redis"])
def broker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if request.param == "redis":
        require_service("/usr/bin/redis-server", DebianRedis.binary)
    kind = EmbeddedServer if request.param == "valkey" else DebianRedis
    server = kind(tmp_path_factory.mktemp("broker"))
    yield server
    server.stop()


@pytest.fixture
def server(broker: Any) -> Iterator[redis.Redis]:
    """Somebody else's client."""
    with redis.Redis.from_url(broker.url, retry=None) as client:
        client.flushall()
        yield client


@pytest.fixture
def claimant() -> str:
    """A name that this process has not used: what it knows of a claimant outlives connections."""
    return f"node-{next(NUMBERS)}"


@pytest.fixture
def connect(broker: Any, server: redis.Redis, claimant: str) -> Iterator[Callable[..., ShardConnection]]:
    opened: list[ShardConnection] = []

    def connect(**options: Any) -> ShardConnection:
        options = {"priority_steps": [0], "namespace": "t", "claimant": claimant, **options}
        url = options.pop("url", broker.url)
        opened.append(ShardConnection(url, transport_options=options))
        return opened[-1]

    yield connect
    for connection in opened:
        connection.close()


def queue(name: str) -> Queue:
    return Queue(name, EXCHANGE, routing_key=name)


def send(server_or_url: Any, name: str, *bodies: str) -> None:
    """Publish by plain kombu."""
    with Connection(server_or_url, transport_options={"priority_steps": [0]}) as connection:
        producer = Producer(connection.default_channel)
        for body in bodies:
            producer.publish(body, exchange="", routing_key=name)


class Receiver:
    """Consumes through a connection, and keeps what comes."""

    def __init__(self, connection: ShardConnection, *names: str, prefetch: int = 0, **options: Any) -> None:
        self.connection = connection
        self.channel: ShardChannel = connection.default_channel
        self.messages: list[Any] = []
        self.channel.basic_qos(0, prefetch, False)
        accept = ["json", "text/plain"]
        self.consumer = Consumer(self.channel, [queue(n) for n in names], accept=accept, **options)
        self.consumer.register_callback(lambda _body, message: self.messages.append(message))
        self.consumer.consume()

    def receive(self, number: int) -> list[str]:
        """Wait until there are *number* messages in all; return their bodies."""
        while len(self.messages) < number:
            self.connection.drain_events(timeout=10)
        return self.bodies

    @property
    def bodies(self) -> list[str]:
        return [message.payload for message in self.messages]

    def nothing_comes(self) -> bool:
        """Look at all queues, and at everything that was heard."""
        known = len(self.messages)
        self.channel.look()
        with pytest.raises(TimeoutError):
            self.connection.drain_events(timeout=0.05)
        return len(self.messages) == known


def never_look(receiver: Receiver) -> None:
    """From here on only what the server tells leads to a claim. Everything so far was looked at."""
    assert receiver.nothing_comes()
    receiver.channel.connection.cycle._every = 3600.0
    assert not receiver.channel._dirty


def held(server: redis.Redis, claimant: str) -> int:
    return server.hlen(f"t.claims.{claimant}")


def waiting(server: redis.Redis, name: str) -> list[str]:
    """Bodies in a queue, the next one out first."""
    with Connection("memory://") as connection:
        channel = connection.channel()
        found = [channel.Message(json.loads(raw), channel=channel) for raw in server.lrange(name, 0, -1)]
    return [message.body.decode() if isinstance(message.body, bytes) else message.body for message in reversed(found)]


# -- hearing of messages


def test_a_foreign_push_is_heard_without_looking(connect: Any, server: redis.Redis, broker: Any) -> None:
    """The server tells of the first message for an empty queue, and again after each claim; no timer is involved."""
    receiver = Receiver(connect(), "a", "b", "c")
    never_look(receiver)
    send(broker.url, "b", "1")
    assert receiver.receive(1) == ["1"]
    send(broker.url, "b", "2")
    send(broker.url, "c", "3")
    assert sorted(receiver.receive(3)) == ["1", "2", "3"]


def test_a_queue_with_more_than_a_claim_takes_is_claimed_again(connect: Any, broker: Any) -> None:
    """Many messages, a small prefetch count: each acknowledgement lets the next ones in, in order, without looking."""
    receiver = Receiver(connect(), "a", "b", prefetch=3)
    never_look(receiver)
    bodies = [str(n) for n in range(20)]
    send(broker.url, "a", *bodies)
    for number in range(20):
        assert receiver.receive(number + 1)[number] == str(number)
        assert len(receiver.messages) <= number + 3
        receiver.messages[number].ack()


def test_each_queue_gets_its_turn(connect: Any, broker: Any) -> None:
    """A hot queue takes no more than its share while another has messages."""
    send(broker.url, "hot", *("hot" for _ in range(50)))
    receiver = Receiver(connect(), "hot", "cold", prefetch=1)
    send(broker.url, "cold", *("cold" for _ in range(5)))
    for number in range(10):
        receiver.receive(number + 1)
        receiver.messages[number].ack()
    assert receiver.bodies[:10].count("cold") >= 4


def test_a_worker_without_prefetch_gets_one_at_a_time(connect: Any, broker: Any) -> None:
    """Celery's worker_disable_prefetch puts a question of its own in place of the prefetch count."""
    receiver = Receiver(connect(), "a", prefetch=8)
    send(broker.url, "a", *"123")
    receiver.channel.qos.can_consume = lambda: not any(not message.acknowledged for message in receiver.messages)
    for number in range(3):
        assert receiver.receive(number + 1) == list("123"[: number + 1])
        assert receiver.nothing_comes()
        receiver.messages[number].ack()


def test_an_event_loop_never_waits_while_there_is_something_to_do(
    connect: Any, broker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a delivered message asks for (its acknowledgement, the next claim) is not left for after the wait."""
    hub, waits = Hub(), []
    poll = hub.poller.poll

    def noted_poll(timeout: float) -> Any:
        events = poll(timeout)
        waits.extend([] if events else [timeout])
        return events

    monkeypatch.setattr(hub.poller, "poll", noted_poll)
    send(broker.url, "a", *(str(n) for n in range(10)))
    receiver = Receiver(connect(), "a", prefetch=1)
    receiver.consumer.register_callback(lambda _body, message: hub.call_soon(message.ack))
    receiver.connection.register_with_event_loop(hub)
    while len(receiver.messages) < 10:
        hub.run_once()
    assert waits == []
    hub.run_once()
    hub.run_once()
    assert all(message.acknowledged for message in receiver.messages)
    receiver.connection.close()
    hub.close()


def test_a_server_that_tells_nothing_is_looked_at_often(
    connect: Any, server: redis.Redis, broker: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """CLIENT TRACKING is refused: one warning, and messages arrive all the same."""
    server.acl_setuser(
        "deaf", enabled=True, nopass=True, commands=["+@all", "-client|tracking"], keys=["*"], channels=["*"]
    )
    transport.Watch.__init__.__globals__["_warn"].cache_clear()
    address = broker.url.split("@")[-1].removeprefix("redis://")
    for _ in range(2):
        receiver = Receiver(connect(url=f"redis://deaf:x@{address}"), "a")
        assert receiver.nothing_comes()
        send(broker.url, "a", "1")
        assert receiver.receive(1) == ["1"]
        assert receiver.channel.watch is not None
        assert receiver.channel.watch.refused
        assert receiver.channel.connection.cycle._every == transport.LOOK_EVERY_UNTOLD
        receiver.messages[0].ack()
        receiver.connection.close()
    assert caplog.text.count("does not tell when a queue is filled") == 1


# -- which channels claim, and what


def test_an_acknowledged_message_is_gone(connect: Any, server: redis.Redis, broker: Any, claimant: str) -> None:
    """Recorded while in hand, nowhere afterwards; kombu's own bookkeeping is not used."""
    receiver = Receiver(connect(), "a")
    send(broker.url, "a", "1")
    receiver.receive(1)
    assert held(server, claimant) == 1
    assert claimants(server, "t") == {claimant: "alive"}
    assert not server.exists("unacked", "unacked_index")
    receiver.messages[0].ack()
    assert held(server, claimant) == 0
    assert receiver.nothing_comes()


def test_consumers_without_acknowledgement_go_the_stock_way(connect: Any, server: redis.Redis, broker: Any) -> None:
    """Replies and events: no claims, a BRPOP."""
    receiver = Receiver(connect(), "a", no_ack=True)
    send(broker.url, "a", "1")
    assert receiver.receive(1) == ["1"]
    assert not receiver.channel.claiming
    assert not server.exists("t.claimants")


def test_paused_and_cancelled_queues_are_left_alone(connect: Any, server: redis.Redis, broker: Any) -> None:
    """A paused queue keeps its messages until it is resumed, a cancelled one for ever."""
    receiver = Receiver(connect(), "a", "b", "c")
    never_look(receiver)
    receiver.channel.pause("a")
    receiver.consumer.cancel_by_queue("b")
    for name in "abc":
        send(broker.url, name, name)
    assert receiver.receive(1) == ["c"]
    assert receiver.nothing_comes()
    receiver.channel.resume("a")
    assert receiver.receive(2) == ["c", "a"]
    assert server.llen("b") == 1


@pytest.mark.parametrize(
    ("option", "value"), [("priority_steps", [0, 5]), ("global_keyprefix", "x:"), ("ack_emulation", False)]
)
def test_options_that_claims_cannot_honour_are_refused(connect: Any, option: str, value: Any) -> None:
    """By name, rather than ignored."""
    with pytest.raises(ConfigError, match=option):
        Receiver(connect(**{option: value}), "a")


def test_an_unreadable_message_is_dropped_and_told(
    connect: Any, server: redis.Redis, broker: Any, claimant: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It would come back for ever; the next one arrives."""
    receiver = Receiver(connect(), "a")
    server.lpush("a", b"\xff not JSON", b'{"no": "properties"}')
    send(broker.url, "a", "1")
    assert receiver.receive(1) == ["1"]
    assert caplog.text.count("unreadable message in a dropped") == 2
    assert held(server, claimant) == 1


# -- giving back


def test_a_closed_channel_gives_back_in_order(connect: Any, server: redis.Redis, broker: Any, claimant: str) -> None:
    """In front of what has come since, marked as redelivered, with empty lists as they were."""
    receiver = Receiver(connect(), "a", "b")
    send(broker.url, "a", *"1234")
    receiver.receive(4)
    receiver.messages[1].ack()
    send(broker.url, "a", "5")
    receiver.connection.close()
    assert held(server, claimant) == 0
    assert waiting(server, "a") == ["1", "3", "4", "5"]
    first = json.loads(server.lindex("a", -1))
    assert first["headers"] == {"redelivered": True}
    assert first["properties"]["delivery_info"]["redelivered"] is True


def test_a_rejected_message_goes_to_the_front(connect: Any, server: redis.Redis, broker: Any, claimant: str) -> None:
    """As on RabbitMQ: with requeue it is the next one out, so that order is kept; without it is gone."""
    receiver = Receiver(connect(), "a", prefetch=2)
    send(broker.url, "a", *"123")
    receiver.receive(2)
    receiver.messages[0].reject(requeue=True)
    receiver.messages[1].reject()
    assert waiting(server, "a") == ["1", "3"]
    assert held(server, claimant) == 0


def test_payloads_keep_empty_lists(server: redis.Redis) -> None:
    """Lua's JSON would turn them into objects."""
    payload = {"body": "[[], {}, null]", "headers": {"args": []}, "properties": {"delivery_info": {}, "empty": []}}
    server.lpush("a", json.dumps(payload))
    claims = Claims("t", "node")
    claims.register(server)
    [claim], _ = claims.take(server, ["a"], 1)
    assert claims.give_back(server, [(claim.id, claim.payload)]) == 1
    assert claims.give_back(server, [(claim.id, claim.payload)]) == 0
    found = json.loads(server.lindex("a", 0))
    assert found["headers"] == {"args": [], "redelivered": True}
    assert found["properties"] == {"delivery_info": {"redelivered": True}, "empty": []}


# -- takeover


def taken(server: redis.Redis, claimant: str, number: int) -> Claims:
    """A claimant that holds messages of two queues; each queue holds one more."""
    for name in "ab":
        server.lpush(name, *(json.dumps(n) for n in range(number + 1)))
    claims = Claims("t", claimant)
    claims.register(server)
    claims.take(server, ["a", "b"], 2 * number, number)
    assert (held(server, claimant), server.llen("a"), server.llen("b")) == (2 * number, 1, 1)
    return claims


def test_restore_gives_all_back_in_order(server: redis.Redis) -> None:
    """The dead claimant's messages come out first, as they would have; nothing of it is left."""
    taken(server, "dead", 20)
    assert restore(server, "t", "dead") == 40
    for name in "ab":
        assert server.lrange(name, 0, -1) == [str(n).encode() for n in reversed(range(21))]
    assert server.keys("t.*") == []


def test_two_restores_at_once_move_each_message_once(server: redis.Redis, broker: Any) -> None:
    """Many nodes notice a death at the same time."""
    for _ in range(5):
        server.flushall()
        taken(server, "dead", 300)
        barrier, moved = threading.Barrier(4), []

        def take_over(barrier: Any = barrier, moved: Any = moved) -> None:
            with redis.Redis.from_url(broker.url) as client:
                client.ping()
                barrier.wait()
                moved.append(restore(client, "t", "dead"))

        threads = [threading.Thread(target=take_over) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(moved) == 600
        assert server.lrange("a", 0, -1) == [str(n).encode() for n in reversed(range(301))]
        assert server.keys("t.*") == []


def test_a_restore_that_dies_under_way_is_finished_by_another(server: redis.Redis, broker: Any) -> None:
    """It had fenced the claimant and read what it held."""
    taken(server, "dead", 3)

    class Dies(redis.Redis):
        def evalsha(self, *_: Any, **__: Any) -> Any:
            raise SystemExit

    with Dies.from_url(broker.url) as dying, pytest.raises(SystemExit):
        restore(dying, "t", "dead")
    assert claimants(server, "t") == {"dead": "fenced"}
    assert restore(server, "t", "dead") == 6
    assert claimants(server, "t") == {}


def test_a_fenced_claimant_takes_nothing(server: redis.Redis) -> None:
    """Nor does one that is not registered any more, or registers again while it is fenced."""
    claims = taken(server, "slow", 2)
    server.hset("t.claimants", "slow", "fenced")
    with pytest.raises(Fenced):
        claims.register(server)
    with pytest.raises(Fenced):
        claims.take(server, ["a"], 1)
    restore(server, "t", "slow")
    with pytest.raises(Fenced):
        claims.take(server, ["a"], 1)
    assert server.llen("a") == 3


def test_a_fenced_consumer_sees_a_lost_connection(
    connect: Any, server: redis.Redis, broker: Any, claimant: str
) -> None:
    """The worker knows how to go on after that: with the claimant of its options."""
    receiver = Receiver(connect(), "a")
    assert receiver.nothing_comes()
    restore(server, "t", claimant)
    send(broker.url, "a", "1")
    with pytest.raises(Fenced) as caught:
        receiver.receive(1)
    assert isinstance(caught.value, receiver.connection.connection_errors)
    assert server.llen("a") == 1


def test_leaving(server: redis.Redis) -> None:
    """With nothing in hand it is gone; else it is fenced, for others to restore."""
    claims = taken(server, "leaver", 1)
    assert claims.leave(server) == 2
    assert claimants(server, "t") == {"leaver": "fenced"}
    restore(server, "t", "leaver")
    claims.register(server)
    assert claims.leave(server) == 0
    assert claimants(server, "t") == {}


def test_a_restarted_node_starts_with_what_its_predecessor_had(
    connect: Any, server: redis.Redis, claimant: str
) -> None:
    """Same name, another process: at once and in order."""
    taken(server, claimant, 3)
    server.delete("b")
    receiver = Receiver(connect(), "a")
    assert claimant not in claimants(server, "t") or held(server, claimant) == 6
    receiver.channel.claims.catch_up()  # type: ignore[union-attr]
    assert server.lrange("a", 0, -1) == [b"3", b"2", b"1", b"0"]


# -- lost connections


def kill(server: redis.Redis, connection: Any) -> None:
    """Have the server cut a connection of ours."""
    name = connection._sock.getsockname()
    server.execute_command("CLIENT", "KILL", "ADDR", f"{name[0]}:{name[1]}")


def test_a_lost_listener_is_replaced_quietly(connect: Any, server: redis.Redis, broker: Any, claimant: str) -> None:
    """What came meanwhile is found, and what comes later is heard; what is in hand stays there."""
    receiver = Receiver(connect(), "a", "b")
    send(broker.url, "a", "1")
    receiver.receive(1)
    never_look(receiver)
    kill(server, receiver.channel.watch.listener.connection)  # type: ignore[union-attr]
    send(broker.url, "a", "2")
    assert receiver.receive(2) == ["1", "2"]
    never_look(receiver)
    send(broker.url, "b", "3")
    assert receiver.receive(3) == ["1", "2", "3"]
    assert held(server, claimant) == 3


def test_a_lost_claimer_is_a_lost_connection(connect: Any, server: redis.Redis, broker: Any, claimant: str) -> None:
    """The next connection gets everything that was not acknowledged, in order."""
    receiver = Receiver(connect(), "a")
    send(broker.url, "a", *"12")
    receiver.receive(2)
    kill(server, receiver.channel.watch.claimer.connection)  # type: ignore[union-attr]
    send(broker.url, "a", "3")
    with pytest.raises(receiver.connection.connection_errors):
        receiver.receive(3)
    receiver.connection.close()
    assert Receiver(connect(), "a").receive(3) == ["1", "2", "3"]
    assert held(server, claimant) == 3


def test_a_claim_whose_answer_was_lost_is_given_back(connect: Any, server: redis.Redis, broker: Any) -> None:
    """The server has recorded it, this process never heard of it."""
    receiver = Receiver(connect(), "a")
    assert receiver.nothing_comes()
    send(broker.url, "a", *"12")
    claims = receiver.channel.claims
    assert claims is not None
    claims.take(server, ["a"], 1)
    claims.delivered.clear()  # as if the answer had not come
    receiver.connection.close()
    assert Receiver(connect(), "a").receive(2) == ["1", "2"]


def test_a_task_that_runs_across_a_reconnect_is_acknowledged(
    connect: Any, server: redis.Redis, broker: Any, claimant: str
) -> None:
    """By the message of the closed channel, from another thread; it is not run twice. What did not run comes again."""
    receiver = Receiver(connect(), "a")
    send(broker.url, "a", *"123")
    receiver.receive(3)
    running, rejected, _ = receiver.messages
    Claims.of("t", claimant).running = lambda: {running.delivery_tag, rejected.delivery_tag}
    receiver.connection.close()
    again = Receiver(connect(), "a")
    assert again.receive(1) == ["3"]
    thread = threading.Thread(target=running.ack)
    thread.start()
    thread.join()
    assert held(server, claimant) == 2
    rejected.reject(requeue=True)
    assert again.receive(2) == ["3", "2"]
    assert again.nothing_comes()
    again.connection.close()
    assert waiting(server, "a") == ["3", "2"]


def test_an_acknowledgement_during_an_outage_reaches_the_server_later(
    connect: Any, server: redis.Redis, broker: Any, claimant: str
) -> None:
    """The task has ended while the server was down: it is not run again; what was in hand otherwise is."""
    receiver = Receiver(connect(), "a")
    send(broker.url, "a", *"123")
    receiver.receive(3)
    wait_until(lambda: durable(server), "the server has written it down")
    broker.stop()
    running = receiver.messages[1]
    Claims.of("t", claimant).running = lambda: {running.delivery_tag}
    receiver.messages[0].ack()
    receiver.connection.close()
    running.ack()
    broker.start()
    again = Receiver(connect(), "a")
    assert again.receive(1) == ["3"]
    assert again.nothing_comes()
    assert held(server, claimant) == 1


@pytest.fixture
def full(server: redis.Redis) -> Iterator[Callable[[int], None]]:
    """``full(1)``: the server has no room for anything more; ``full(0)``: it has again."""
    before = server.config_get("maxmemory-policy")["maxmemory-policy"]
    server.config_set("maxmemory-policy", "noeviction")
    yield lambda on: server.config_set("maxmemory", on)
    server.config_set("maxmemory", 0)
    server.config_set("maxmemory-policy", before)


def test_what_a_server_refuses_to_take_back_goes_back_later(
    connect: Any, server: redis.Redis, broker: Any, claimant: str, full: Callable[[int], None]
) -> None:
    """It is in hand no more, so nobody else would think of it."""
    receiver = Receiver(connect(), "a")
    send(broker.url, "a", *"12")
    receiver.receive(2)
    full(1)
    receiver.channel.give_back([message.delivery_tag for message in receiver.messages])
    claims = Claims.of("t", claimant)
    assert (claims.delivered, claims.behind, held(server, claimant)) == ({}, True, 2)
    full(0)
    assert claims.catch_up() == 2
    assert waiting(server, "a") == ["1", "2"]


def test_a_server_that_refuses_is_a_lost_connection(
    connect: Any, server: redis.Redis, broker: Any, full: Callable[[int], None]
) -> None:
    """Celery connects again, and goes on when there is room."""
    receiver = Receiver(connect(), "a")
    assert receiver.nothing_comes()
    send(broker.url, "a", "1")
    full(1)
    with pytest.raises(receiver.connection.connection_errors, match="Redis refuses"):
        receiver.receive(1)
    full(0)
    receiver.connection.close()
    assert Receiver(connect(), "a").receive(1) == ["1"]


def durable(server: redis.Redis) -> bool:
    info = server.info("persistence")
    return not info["aof_rewrite_in_progress"] and not info["aof_pending_bio_fsync"] and not info["aof_buffer_length"]


# -- death


def test_nothing_is_lost_by_25_kills(server: redis.Redis, broker: Any, claimant: str) -> None:
    """Kill -9 at any moment, under a flood: each of thousands of messages is done, at least once."""
    number, kills = 4000, 25
    names = [f"q{n}" for n in range(4)]
    moments = random.Random(7)
    ran = flood(server, broker.url, claimant, names, number, kills, moments)
    assert server.scard("done") == number
    assert ran["left"] > 0, "no kill has hit a consumer with a message in hand: the test shows nothing"


def flood(
    server: redis.Redis, url: str, claimant: str, names: list[str], number: int, kills: int, moments: random.Random
) -> dict[str, int]:
    """Send while consumers are killed; then have one finish. ``left``: how many claims were left by the killed."""
    template = json.dumps({"body": "BODY", "content-type": "text/plain", "content-encoding": "utf-8", "headers": {},
        "properties": {"delivery_info": {}, "delivery_tag": "x", "body_encoding": "utf-8"}})  # fmt: skip
    args = [sys.executable, "-m", "tests.integration.claims_child", url, claimant, *names]
    left = 0
    with subprocess.Popen(args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as nursery:
        assert nursery.stdin is not None
        assert nursery.stdout is not None

        def start() -> int:
            print(file=nursery.stdin, flush=True)
            return int(nursery.stdout.readline())  # type: ignore[union-attr]

        def stop(pid: int) -> None:
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: is_gone(pid), "the consumer is gone")

        sent = 0
        for run in range(kills):
            pid, before = start(), server.scard("done")
            until = before + moments.randrange(1, number // kills)
            share = range(sent, number * (run + 1) // kills)
            for n in share:
                server.lpush(names[n % len(names)], template.replace("BODY", f"m{n}"))
            sent = share.stop
            wait_until(lambda until=until: server.scard("done") >= min(until, sent), "the consumer works")
            stop(pid)
            left += server.hlen(f"t.claims.{claimant}")
        pid = start()
        keys = [*names, f"t.claims.{claimant}", "unacked"]
        wait_until(lambda: server.exists(*keys) == 0, "everything is done", 30.0)
        stop(pid)
        nursery.stdin.close()
    return {"left": left}
