"""kombu's Redis transport without the work that it repeats for every message.

A node consumes many queues. Stock kombu packs all their names anew for each BRPOP, computes the set of consumed queues
several times per message, and makes a new client object for each bookkeeping command: with 64 queues a task costs a
tenth more than with one, and a fifth of the worker's time is client objects. What is kept here instead depends on the
insides of kombu 5.7; `tests/integration/test_transport.py` runs it against a real server, and anything out of the
ordinary (a key prefix, several priorities, Sentinel) goes the stock way.
"""

from time import monotonic
from typing import Any

from kombu import Connection
from kombu.transport import redis
from redis.exceptions import ConnectionError  # noqa: A004 - kombu's connection errors name this one


class ShardChannel(redis.Channel):
    """A Redis channel that keeps its client, its consumed queues and their packed names."""

    _kept_client: Any = None
    _kept_queues: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._packed: dict[str, bytes] = {}
        super().__init__(*args, **kwargs)

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

    def _update_queue_cycle(self) -> None:
        """Forget the queues: kombu calls this last whenever one is added or cancelled."""
        self._kept_queues = None
        super()._update_queue_cycle()

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


class ShardTransport(redis.Transport):
    """The transport of these channels."""

    Channel = ShardChannel


class ShardConnection(Connection):
    """Connections of one app; brokers other than a Redis server (with or without TLS) are left to kombu."""

    def get_transport_cls(self) -> Any:
        found = super().get_transport_cls()
        return ShardTransport if found is redis.Transport else found


def _packed(text: str) -> bytes:
    """One argument of a command, as it goes over the wire (RESP bulk string)."""
    data = text.encode()
    return b"$%d\r\n%b\r\n" % (len(data), data)
