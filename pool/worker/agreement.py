"""Producers and nodes must count the same shards: a key's queue depends on it."""

import logging
import threading
from time import monotonic

from redis import Redis
from redis.exceptions import RedisError

from pool.config import Settings
from pool.errors import ConfigError
from pool.sharding.redis_store import keys_of, plain_url

logger = logging.getLogger(__name__)

AGAIN_AFTER = 60.0
"""Seconds until a producer that found no node to compare with looks again."""
TIMEOUT = 2.0
"""Seconds for the store to answer; a producer does not depend on it."""


class Agreement:
    """Compares this process's number of shards with that of the nodes which are alive, once."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._lock = threading.Lock()
        self._next = 0.0 if settings.redis_url else float("inf")

    def check(self) -> None:
        """Raise `ConfigError` if the nodes count otherwise. Costs nothing once they were found to agree."""
        if monotonic() < self._next:
            return
        with self._lock:
            self._next = monotonic() + AGAIN_AFTER
            try:
                shards = self._shards_of_nodes()
            except (RedisError, OSError) as error:
                logger.debug("cannot compare the number of shards with the nodes': %s", error)
                return
            if shards not in (None, self.settings.shards):
                self._next = 0.0
                raise ConfigError(
                    f"POOL_SHARDS={self.settings.shards} in this producer, but {shards} at the nodes: its tasks would"
                    " go to the wrong queues"
                )
            if shards is not None:
                self._next = float("inf")

    def _shards_of_nodes(self) -> int | None:
        meta, alive = keys_of(self.settings.namespace, "meta", "alive")
        url = plain_url(str(self.settings.redis_url))
        with Redis.from_url(url, socket_timeout=TIMEOUT, socket_connect_timeout=TIMEOUT) as client:
            shards = client.hget(meta, "shards")
            return int(shards) if shards and client.exists(alive) else None
