"""How a node hears at once that a queue was filled, without blocking a connection on it.

Claims go over one connection, on which the server tracks what they read (``CLIENT TRACKING``). The first change of such
a queue, by whomever, is told to the other connection, which the event loop listens to. It is told once: the claim that
follows looks at the queue again.
"""

import logging
from collections.abc import Mapping
from functools import cache
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.exceptions import ResponseError
from redis.retry import Retry

from pool.worker.claims import with_timeouts

logger = logging.getLogger(__name__)

_TOPIC = "__redis__:invalidate"


class Watch:
    """The two connections: the listener hears, the claimer claims. The event loop opens the listener's."""

    def __init__(self, listening: Mapping[str, Any], claiming: Mapping[str, Any]) -> None:
        # RESP2: there such a message comes as one of a subscription, and reading is kombu's usual business.
        self.listener: Any = redis.Redis(connection_pool=redis.ConnectionPool(**{**listening, "protocol": 2}))
        # No retry: who connects again has to ask for the tracking again, and must know that a claim's answer was lost.
        own = {**with_timeouts(claiming), "protocol": 2, "retry": Retry(NoBackoff(), 0)}
        self._claiming = redis.ConnectionPool(**own)
        self.claimer: Any = None
        self.refused = False
        """Whether the server tells nothing, so that the queues have to be looked at all the time."""
        self._number = (None, 0)  # socket and client id of the listener
        self._armed: Any = None

    @property
    def armed(self) -> bool:
        """Whether both connections are still those between which `arm` has arranged it."""
        return self._armed is not None and self._armed == self._sockets()

    def _sockets(self) -> Any:
        pair = tuple(getattr(client.connection, "_sock", None) for client in (self.listener, self.claimer) if client)
        return pair if len(pair) == 2 and None not in pair else None

    def arm(self) -> None:
        """Have the server tell the listener about what the claimer reads from here on. The listener is connected."""
        self._armed = None
        if self.claimer is None:
            self.claimer = redis.Redis(connection_pool=self._claiming, single_connection_client=True)
        self.claimer.ping()
        try:
            self.claimer.execute_command("CLIENT", "TRACKING", "ON", "REDIRECT", self._subscribe(), "NOLOOP")
            self.refused = False
        except ResponseError as error:
            self.refused = True
            _warn(str(error))
        self._armed = self._sockets()

    def _subscribe(self) -> int:
        connection = self.listener.connection
        if self._number[0] is not connection._sock:
            connection.send_command("CLIENT", "ID")
            number = connection.read_response()
            connection.send_command("SUBSCRIBE", _TOPIC)
            connection.read_response()
            self._number = (connection._sock, number)
        return self._number[1]

    def heard(self) -> set[str] | None:
        """Read what has come: names of keys that were changed; None: any may have been."""
        connection = self.listener.connection
        names: set[str] = set()
        everything = False
        while True:
            message = connection.read_response()
            if isinstance(message, list) and message[0] == b"message":
                everything |= message[2] is None
                names.update(key.decode() for key in message[2] or ())
            if not connection.can_read(timeout=0):
                return None if everything else names

    def close(self) -> None:
        for client in (self.listener, self.claimer):
            connection = getattr(client, "connection", None)
            if connection is not None:
                connection.disconnect()


@cache
def _warn(refusal: str) -> None:
    logger.warning("the broker does not tell when a queue is filled (%s): queues are looked at all the time", refusal)
