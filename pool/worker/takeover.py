"""What a node has taken from the broker and not finished: under which name, and how others get it back if it dies."""

import logging
from collections.abc import Callable, Collection
from typing import Any

import redis
from celery import bootsteps
from celery.worker import state
from kombu.exceptions import OperationalError

from pool.config import Settings
from pool.worker.claims import OUT_OF_REACH, Claims, claimants, restore, with_timeouts
from pool.worker.transport import ShardTransport, check_options

logger = logging.getLogger(__name__)


class RedisTakeover:
    """On Redis a node claims what it takes (`claims`), under the name of its incarnation."""

    def __init__(self, app: Any, settings: Settings) -> None:
        self.app = app
        self.namespace = settings.namespace
        self._limit = settings.key_concurrency
        self.fenced: Callable[[str], None] = lambda incarnation: None  # noqa: ARG005
        """Called, on any thread, when the broker says that an incarnation of this node was taken for dead."""
        self.running: Callable[[], Collection[str]] = tuple
        self._claims: Claims
        self._client: Any = None
        check_options(app.conf.broker_transport_options or {})

    def adopt(self, incarnation: str) -> None:
        """Take messages under this name, from the next connection on."""
        self._claims = Claims.of(self.namespace, incarnation)
        self._claims.running = self._running
        self._claims.on_fenced = self._on_fenced
        options = {"claimant": incarnation, "namespace": self.namespace, "claim_limit": self._limit}
        self.app.conf.broker_transport_options = {**(self.app.conf.broker_transport_options or {}), **options}

    def restore(self, incarnation: str) -> int:
        """Put a dead incarnation's messages back, once, however many nodes do this; returns how many it were.

        Raises what redis-py raises.
        """
        return restore(self._redis(), self.namespace, incarnation)

    def claimants(self) -> set[str]:
        """Return who may hold messages. Raises what redis-py raises."""
        return set(claimants(self._redis(), self.namespace))

    def _running(self) -> Collection[str]:
        return self.running()

    def _on_fenced(self, incarnation: str) -> None:
        self.fenced(incarnation)

    def leave(self) -> None:
        """Nothing is taken any more: what is still held goes back."""
        claims = self._claims
        if claims.client is None:
            return
        try:
            if claims.leave(claims.client):
                restore(claims.client, claims.namespace, claims.claimant)
        except OUT_OF_REACH as error:
            logger.warning("what %s has not finished goes back when Redis is back: %s", claims.claimant, error)

    def _redis(self) -> Any:
        if self._client is None:
            try:
                with self.app.connection_for_write() as connection:
                    params = connection.default_channel._connparams()
            except OperationalError as error:  # kombu's, which nobody here expects
                raise redis.ConnectionError(str(error)) from error
            self._client = redis.Redis(connection_pool=redis.ConnectionPool(**with_timeouts(params)))
        return self._client


class BrokerTakeover:
    """RabbitMQ sees a dead node's connection end, and delivers its messages again by itself."""

    fenced: Callable[[str], None]
    running: Callable[[], Collection[str]]

    def adopt(self, incarnation: str) -> None:
        """Nothing to do."""

    def restore(self, incarnation: str) -> int:  # noqa: ARG002
        """Nothing to do."""
        return 0

    def claimants(self) -> set[str]:
        """Nobody needs to be looked after."""
        return set()

    def leave(self) -> None:
        """Nothing to do."""


def takeover_for(app: Any, settings: Settings) -> RedisTakeover | BrokerTakeover:
    """Return what the app's broker needs. Raises `ConfigError` for transport options that it cannot honour."""
    if app.connection_for_read().get_transport_cls() is ShardTransport:
        return RedisTakeover(app, settings)
    return BrokerTakeover()


def in_hand(consumer: Any) -> set[str]:
    """Delivery tags of the messages whose tasks outlive the connection: none, if the worker is about to end."""
    if consumer.blueprint.state != bootsteps.RUN:
        return set()
    if not consumer.pool.__module__.endswith(".prefork"):
        found = requests(state.active_requests) | requests(state.reserved_requests)  # threads forget nothing
    elif consumer.app.conf.worker_cancel_long_running_tasks_on_connection_loss:
        found = set()
    else:
        found = requests(state.active_requests)  # what no child has begun is discarded
    return {request.message.delivery_tag for request in found}


def requests(known: Any) -> set[Any]:
    """Copy one of the worker's sets of requests, to which threads add and from which they remove."""
    while True:
        try:
            return set(known)
        except RuntimeError:  # it changed under the copy
            continue
