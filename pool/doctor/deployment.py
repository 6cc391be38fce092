"""What the checks look at: the app, its settings, and ways to its servers that come to an end."""

import contextlib
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from kombu.exceptions import KombuError
from kombu.transport import redis as redis_transport
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from pool.config import Settings
from pool.doctor.checks import Unreachable
from pool.doctor.finding import said
from pool.errors import ConfigError
from pool.sharding.redis_store import keys_of, plain_url
from pool.sharding.table import KEYS, LOOK, Table


class Deployment:
    """One app as the doctor sees it. *timeout*: seconds that each check has."""

    def __init__(self, app: Any, *, fix: bool, timeout: float) -> None:
        self.app = app
        self.settings: Settings = app.warm_pool.settings
        self.fix = fix
        self.timeout = timeout
        self._known: dict[str, Callable[[], Any]] = {}
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    @property
    def patience(self) -> float:
        """Seconds for one answer: two fit into a check."""
        return 0.4 * self.timeout

    @property
    def tasks(self) -> Mapping[str, Any]:
        """All tasks of the app, those of the modules that its workers import included. Raises what these raise."""

        def load() -> Any:
            self.app.loader.import_default_modules()
            return self.app.tasks

        tasks: Mapping[str, Any] = self._shared("tasks", load)
        return tasks

    @contextlib.contextmanager
    def broker(self) -> Iterator[Any]:
        """An open connection to the broker. Raises `Unreachable`."""
        options = {}
        if issubclass(self.app.connection_for_read().get_transport_cls(), redis_transport.Transport):
            options = {"socket_connect_timeout": self.patience, "socket_timeout": self.timeout}
        with self.app.connection_for_read(connect_timeout=self.patience, transport_options=options) as connection:
            try:
                connection.ensure_connection(max_retries=1, interval_start=0, interval_step=0)
            except (KombuError, RedisError, OSError) as error:
                raise Unreachable(f"The broker {connection.as_uri()} cannot be reached: {said(error)}") from error
            yield connection

    def redis(self, url: str) -> "Redis":
        """A client of this server that gives up in time; it connects nothing yet. Raises `ConfigError`."""
        return Redis.from_url(
            plain_url(url),
            decode_responses=True,
            socket_timeout=self.patience,
            socket_connect_timeout=self.patience,
            retry=Retry(NoBackoff(), 0),
        )

    def table(self) -> Table | None:
        """The lease table as it is now; None: there is no server for one. Raises `Unreachable`."""
        if self.settings.redis_url is None:
            return None
        try:
            with self.redis(str(self.settings.redis_url)) as client:
                return Table.of(client.eval(LOOK, len(KEYS), *keys_of(self.settings.namespace, *KEYS)))
        except (RedisError, OSError, ConfigError) as error:
            raise Unreachable(f"The lease table cannot be read: {said(error)}") from error

    def answering(self) -> set[str]:
        """Names of the workers on this broker that answer a ping. Asked once. Raises `Unreachable`."""

        def ask() -> set[str]:
            return set(self.inspect("ping"))

        return set(self._shared("answering", ask))

    def inspect(self, command: str, nodes: set[str] | None = None) -> dict[str, Any]:
        """Answers to one of Celery's inspect commands, by node; None: of all that there are. Raises `Unreachable`."""
        with self.broker() as connection:
            asking = self.app.control.inspect(
                destination=sorted(nodes) if nodes else None,
                timeout=self.patience,
                connection=connection,
                limit=len(nodes) if nodes else None,
            )
            return getattr(asking, command)() or {}

    def _shared(self, name: str, make: Callable[[], Any]) -> Any:
        """Return, or raise, what *make* did the first time; several checks may want the same."""
        with self._locks[name]:
            if name not in self._known:
                self._known[name] = _outcome(make)
        return self._known[name]()


def _outcome(make: Callable[[], Any]) -> Callable[[], Any]:
    try:
        value = make()
    except Exception as error:
        problem = error

        def fail() -> Any:
            raise problem

        return fail
    return lambda: value
