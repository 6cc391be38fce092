"""What a dead node had taken from the broker and not finished: how the others get it back."""

from typing import Any

import redis

from pool.worker.claims import Claims, restore, with_timeouts


class RedisTakeover:
    """Redis keeps what a node has taken in the hash of its claimant, which is its incarnation; see `claims`."""

    def __init__(self, app: Any, namespace: str) -> None:
        self.app = app
        self.namespace = namespace
        self._client: Any = None

    def adopt(self, incarnation: str) -> None:
        """Take messages under this name from the next connection on."""
        options = {"claimant": incarnation, "namespace": self.namespace}
        self.app.conf.broker_transport_options = {**self.app.conf.broker_transport_options, **options}

    def restore(self, incarnation: str) -> int:
        """Put its messages back into their queues, once, however many nodes do this; returns how many it were.

        Raises what redis-py raises.
        """
        return restore(self._redis(), self.namespace, incarnation)

    def _redis(self) -> Any:
        if self._client is None:
            with self.app.connection_for_write() as connection:
                params = connection.default_channel._connparams()
            self._client = redis.Redis(connection_pool=redis.ConnectionPool(**with_timeouts(params)))
        return self._client

    def claims(self, incarnation: str) -> Claims:
        """What this process holds under that name."""
        return Claims.of(self.namespace, incarnation)

    def leave(self, incarnation: str) -> None:
        """The node has ended and holds nothing."""


class BrokerTakeover:
    """RabbitMQ sees a dead node's connection close, and delivers its messages again by itself."""

    def adopt(self, incarnation: str) -> None:
        """Nothing to do."""

    def restore(self, incarnation: str) -> int:  # noqa: ARG002
        """Nothing to do."""
        return 0
