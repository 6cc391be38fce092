"""kombu's Redis transport for nodes that consume many queues, and must not lose what they take from them.

*Lean*: a node consumes many queues. Stock kombu packs all their names anew for each BRPOP, computes the set of
consumed queues several times per message, and makes a new client object for each bookkeeping command: with 64 queues a
task costs a tenth more than with one, and a fifth of the worker's time is client objects.

*Claims*: BRPOP takes a message off its list before anyone has written down who has it, and a process that is killed
in between loses it. A channel with the transport option ``claimant`` (and ``namespace``) whose consumers acknowledge
takes by `Claims` instead: at once, on the event loop's thread, so that nothing is ever under way.

What is kept here depends on the insides of kombu 5.7; ``tests/integration`` runs it against real servers. Without a
claimant, anything out of the ordinary (a key prefix, several priorities, Sentinel) goes the stock way.
"""

import logging
from collections import deque
from collections.abc import Collection
from time import monotonic
from typing import Any

from kombu import Connection
from kombu.transport import redis, virtual
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import loads
from redis.exceptions import ConnectionError  # noqa: A004 - kombu's connection errors name this one

from pool.errors import ConfigError
from pool.worker.claims import Claim, Claims, Fenced
from pool.worker.poller import CLAIMS, LOOK_EVERY, LOOK_EVERY_UNTOLD, ShardPoller
from pool.worker.watch import Watch

logger = logging.getLogger(__name__)

UNLIMITED = 64
"""Messages of one claim at most, where the prefetch count sets no limit."""


class ShardQoS(redis.QoS):
    """Knows claimed messages, which are recorded already, from others, which kombu records."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._claimed: set[str] = set()
        super().__init__(*args, **kwargs)

    def append(self, message: Any, delivery_tag: str) -> None:
        if self.channel.claims is None or delivery_tag not in self.channel.claims.delivered:
            super().append(message, delivery_tag)
        else:
            self._claimed.add(delivery_tag)
            virtual.QoS.append(self, message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        """From any thread, also when the channel is closed."""
        if delivery_tag not in self._claimed:
            super().ack(delivery_tag)
            return
        self.channel.claims.done(delivery_tag)
        self._forget(delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """From any thread, also when the channel is closed. Back goes to the front, as on RabbitMQ: order is kept."""
        if delivery_tag not in self._claimed:
            super().reject(delivery_tag, requeue=requeue)
            return
        if requeue:
            self.channel.claims.requeue([delivery_tag])
        else:
            self.channel.claims.done(delivery_tag)
        self._forget(delivery_tag)

    def _forget(self, delivery_tag: str) -> None:
        virtual.QoS.ack(self, delivery_tag)
        self._claimed.discard(delivery_tag)

    def restore_unacked(self, client: Any = None) -> None:
        """Give everything back, except messages whose tasks run on."""
        claimed = self._claimed.intersection(self._delivered)
        for tag in claimed:
            del self._delivered[tag]
        if claimed:
            self.channel.claims.requeue(claimed.difference(self.channel.claims.running()))
        if self._delivered:
            super().restore_unacked(client)

    def restore_visible(self, *args: Any, **kwargs: Any) -> None:
        """Claims know no visibility timeout."""
        if not self.channel.claiming:
            super().restore_visible(*args, **kwargs)


class ShardChannel(redis.Channel):
    """A Redis channel that keeps its client, its consumed queues and their packed names; or that claims."""

    QoS = ShardQoS
    from_transport_options = (*redis.Channel.from_transport_options, "claimant", "namespace", "claim_limit")
    claimant: str | None = None
    claim_limit = 4
    """Messages of one queue in one claim, at most: a full queue must not use up the credit of the others."""
    namespace = "pool"
    claims: Claims | None = None
    claiming = False

    _kept_client: Any = None
    _kept_queues: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._packed: dict[str, bytes] = {}
        self._no_ack: set[str] = set()  # consumer tags
        self._consumed: set[str] = set()
        self._paused: set[str] = set()
        self._dirty: set[str] = set()  # queues that may have messages
        self._undelivered: deque[Claim] = deque()
        self._renounced = False
        self.watch: Watch | None = None
        super().__init__(*args, **kwargs)
        self.handlers[CLAIMS] = self._listen

    def _create_client(self, asynchronous: bool = False) -> Any:
        """Return one client for all commands; asynchronous ones are tied to a connection and stay apart.

        A closed channel raises what the worker takes for a lost connection. kombu 5.7 raises AttributeError there,
        which ends a worker whose task is done after the broker has gone, or that gives messages back then. Nothing is
        lost: the server keeps what is unacknowledged, and delivers it again.
        """
        if self.connection is None or self.connection.client is None:
            raise ConnectionError("the channel is closed")
        if asynchronous:
            return super()._create_client(asynchronous=True)
        client = self._kept_client
        if client is None or client.connection_pool is not self.pool:  # a reconnect replaces the connection pool
            client = self._kept_client = super()._create_client()
        return client

    @property
    def active_queues(self) -> Any:
        """The queues that are consumed, fanout ones excepted."""
        if self._kept_queues is None:
            self._kept_queues = super().active_queues
        return self._kept_queues

    def basic_consume(self, queue: str, no_ack: bool, callback: Any, consumer_tag: str, **kwargs: Any) -> Any:
        if no_ack:
            self._no_ack.add(consumer_tag)
        return super().basic_consume(queue, no_ack, callback, consumer_tag, **kwargs)

    def _update_queue_cycle(self) -> None:
        """Forget the queues: kombu calls this last whenever one is added or cancelled."""
        self._kept_queues = None
        super()._update_queue_cycle()
        active = set(self.active_queues)
        self.claiming = bool(self.claimant and active and self._consumers.isdisjoint(self._no_ack))
        if self.claiming and self.claims is None:
            self._start_claims()
        self._dirty = (self._dirty & active) | (active - self._consumed)
        self._paused &= active
        self._consumed = active

    def _brpop_start(self, timeout: float | None = None) -> None:
        if self.global_keyprefix or len(self.priority_steps) > 1:
            super()._brpop_start(timeout)
            return
        names = self._queue_cycle.consume(len(self.active_queues))
        if not names:
            return
        try:
            packed = b"".join([self._packed[name] for name in names])
        except KeyError:
            self._packed = {name: _packed(self._q_for_pri(name, self.priority_steps[0])) for name in names}
            packed = b"".join(self._packed.values())
        wait = self.brpop_timeout if timeout is None else timeout
        connection = self.client.connection
        self._in_poll = connection
        self._brpop_sent_at = monotonic()
        command = b"*%d\r\n$5\r\nBRPOP\r\n%b%b" % (len(names) + 2, packed, _packed(str(wait or 0)))
        connection.send_packed_command([command])

    # -- claims; all on the thread of the event loop

    def _start_claims(self) -> None:
        check_options({name: getattr(self, name) for name in ("priority_steps", "global_keyprefix", "ack_emulation")})
        assert self.claimant is not None
        self.claims = Claims.of(self.namespace, self.claimant)
        self.claims.connect(self._connparams())
        self.watch = Watch(self._connparams(asynchronous=True), self._connparams())

    def pause(self, queue: str) -> None:
        """Take nothing from a consumed queue until `resume`."""
        self._paused.add(queue)

    def give_back(self, tags: Collection[str]) -> None:
        """Put messages that have not been worked on into their queues again, in order."""
        assert self.claims is not None
        self.claims.requeue(tags)
        for tag in tags:
            self.qos._forget(tag)

    def renounce(self) -> None:
        """Claim nothing any more: the next attempt ends the connection, and with it this channel."""
        self._renounced = True

    def resume(self, queue: str) -> None:
        self._paused.discard(queue)
        self.look([queue])

    def look(self, queues: Any = None) -> None:
        """Have the next `claim` look at these queues; None: at all of them."""
        self._dirty |= self._consumed if queues is None else self._consumed.intersection(queues)

    def _listen(self) -> None:
        """Note which queues were filled."""
        assert self.watch is not None
        try:
            self.look(self.watch.heard())
        except self.connection_errors:
            self.watch.listener.connection.disconnect()  # the next claim opens another, or finds the server gone
            self.look()

    def claim(self) -> int:
        """Take what there is, as far as the prefetch count allows, and deliver it. Returns how many were delivered."""
        assert self.claims is not None
        assert self.watch is not None
        if self._renounced:
            raise Fenced(f"claimant {self.claimant} has begun a new life")
        if not self.watch.armed:
            self.watch.arm()
            self.connection.cycle.look_every(LOOK_EVERY_UNTOLD if self.watch.refused else LOOK_EVERY)
            self.look()
        if self.claims.behind and self.claims.catch_up():
            self.look()
        credit = self._credit()
        if credit and not self._dirty <= self._paused:
            order = self._queue_cycle.consume(len(self.active_queues))
            queues = [name for name in order if name in self._dirty and name not in self._paused]
            limit = min(self.claim_limit, max(1, credit // len(queues)))
            found, more = self.claims.take(self.watch.claimer, queues, credit, limit)
            self._dirty.difference_update(set(queues) - more)
            self._undelivered.extend(found)
        return self._deliver_claims()

    def _credit(self) -> int:
        if not self.qos.can_consume():
            return 0
        if "can_consume" in vars(self.qos):  # Celery's worker_disable_prefetch put its own there: it counts by one
            return 1
        credit = self.qos.can_consume_max_estimate()
        return UNLIMITED if credit is None else int(credit)

    def _deliver_claims(self) -> int:
        number = 0
        while self._undelivered:
            claim = self._undelivered.popleft()
            self._queue_cycle.rotate(claim.queue)
            number += 1
            try:
                message = loads(bytes_to_str(claim.payload))
                message["properties"]["delivery_tag"] = claim.id
                self.connection._deliver(message, claim.queue)
            except (ValueError, KeyError, TypeError, AttributeError):
                if claim.id in self.qos._delivered:
                    raise
                logger.critical("unreadable message in %s dropped: %r", claim.queue, claim.payload[:500], exc_info=True)
                self.claims.done(claim.id)  # type: ignore[union-attr]
        return number

    def _poll_error(self, type: str, **options: Any) -> None:
        if type == CLAIMS:
            self._listen()
        else:
            super()._poll_error(type, **options)

    def close(self) -> None:
        if not self.closed and self._undelivered:
            self.claims.requeue([claim.id for claim in self._undelivered])  # type: ignore[union-attr]
            self._undelivered.clear()
        super().close()

    def _close_clients(self) -> None:
        super()._close_clients()
        if self.watch is not None:
            self.watch.close()


class ShardTransport(redis.Transport):
    """The transport of these channels."""

    Channel = ShardChannel

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cycle = ShardPoller()

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        super().register_with_event_loop(connection, loop)
        self.cycle.look_every(loop=loop)


class ShardConnection(Connection):
    """Connections of one app; brokers other than a Redis server (with or without TLS) are left to kombu."""

    def get_transport_cls(self) -> Any:
        found = super().get_transport_cls()
        return ShardTransport if found is redis.Transport else found

    def _establish_connection(self) -> Any:
        """Let go of a connection (RabbitMQ) that broke, which kombu replaces and forgets.

        Whoever had a channel of it would send on that for ever: Celery's event dispatcher did, on the hub's thread.
        """
        if self._connection is not None and hasattr(self.transport, "_collect"):
            self.transport._collect(self._connection)
        return super()._establish_connection()


def check_options(options: Any) -> None:
    """Raise `ConfigError` for transport options that claims do not know how to honour."""
    for name, wanted in (("priority_steps", [0]), ("global_keyprefix", ""), ("ack_emulation", True)):
        value = options.get(name, wanted)
        if (list(value) if isinstance(value, tuple | list) else value) != wanted:
            raise ConfigError(f"broker_transport_options: {name}={value!r}: must be {wanted!r} for nodes of the pool")


def _packed(text: str) -> bytes:
    """One argument of a command, as it goes over the wire (RESP bulk string)."""
    data = text.encode()
    return b"$%d\r\n%b\r\n" % (len(data), data)
