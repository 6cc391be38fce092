"""Asking nodes: who should be there, by the lease table, and what they answer, without waiting for those who cannot."""

import asyncio
import queue
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from time import monotonic
from typing import Any, NamedTuple, TypeVar

from celery import uuid
from kombu import Consumer, Producer
from kombu.exceptions import OperationalError
from kombu.utils.url import maybe_sanitize_url
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from pool.config import Settings
from pool.errors import ConfigError
from pool.sharding.lease import Terms
from pool.sharding.redis_store import RedisStore, plain_url
from pool.sharding.table import Table

T = TypeVar("T")

LINGER = 0.1
"""Seconds that nodes without leases get to answer, too, when all others have: nobody knows how many there are."""
HINT = " (--timeout)"
SLACK = 0.3
"""Seconds beyond its time after which a server that does not answer is given up."""


class Problem(Exception):
    """There is no answer; the message says why. ``code``: the exit code."""

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.code = code


class Replies(NamedTuple):
    """What came of a question."""

    answers: dict[str, Any]
    """By node."""
    missing: list[str]
    """Those who should have answered and did not."""


class Nodes:
    """The nodes of *app* as the lease table has them now. *timeout*: seconds they get to answer each question.

    Raises `Problem` when the Redis of the table, which is the broker as well, cannot be reached.
    """

    def __init__(self, app: Any, timeout: float) -> None:
        self.app = app
        self.timeout = timeout
        self.settings: Settings = app.warm_pool.settings
        self.trouble = ""
        """Why the lease table could not be read, if it could not."""
        self.table: Table | None = None
        self.read()

    def read(self) -> Table | None:
        """Read the lease table again. None: there is none, or it cannot be read now (`trouble`)."""
        settings = self.settings
        self.table, self.trouble = None, ""
        if settings.redis_url is None:
            return None
        shown = maybe_sanitize_url(settings.redis_url)
        try:
            url = plain_url(settings.redis_url)
            self.table = within(
                self.timeout, lambda: asyncio.run(_read(url, settings, self.timeout)), f"Redis {shown}", HINT
            )
        except ConfigError:
            return None  # a Sentinel: nodes that hold leases cannot be there
        except Exception as error:
            message = str(error) if isinstance(error, Problem) else f"cannot reach Redis {shown}: {error}"
            if settings.redis_url == settings.broker_url:
                raise Problem(message) from None
            self.trouble = message
        return self.table

    @property
    def living(self) -> list[str]:
        """Names of the nodes that hold leases, or could."""
        return sorted(self.table.living) if self.table is not None else []

    def ask(self, command: str, to: Iterable[str] | None = None, **arguments: Any) -> Replies:
        """Ask some nodes, or all. Returns as soon as all have answered who should.

        Nodes without leases are not known: with none that has any, the whole time is waited. Raises `Problem` when the
        broker cannot be reached.
        """
        expected = set(self.living if to is None else to)
        destination = None if to is None else sorted(expected)
        question = _Question(self.app, command, arguments, destination, expected, self.timeout)
        where = maybe_sanitize_url(str(self.settings.broker_url))
        answers = within(self.timeout + SLACK, question.put, f"the broker {where}", HINT)
        return Replies(answers, sorted(expected - answers.keys()))

    def named(self, given: Iterable[str]) -> list[str]:
        """Return the full names of nodes: ``a`` stands for ``a@host``. Raises `Problem` for an unknown one."""
        given = list(given)
        known = self.living
        if any(not _matching(name, known) for name in given):  # one without leases?
            known = sorted({*known, *self.ask("pool_stats").answers})
        found = []
        for name in given:
            matching = _matching(name, known)
            if len(matching) != 1:
                problem = "there is no node" if not matching else "several nodes are called"
                raise Problem(f"{problem} {name!r}: there are {', '.join(known) or 'none at all'}")
            found += matching
        return found


def _matching(name: str, known: Collection[str]) -> list[str]:
    return [name] if name in known else [each for each in known if each.partition("@")[0] == name]


async def _read(url: str, settings: Settings, timeout: float) -> Table:
    client = Redis.from_url(
        url,
        decode_responses=True,
        socket_timeout=timeout,
        socket_connect_timeout=timeout,
        retry=Retry(NoBackoff(), 0),
    )
    async with client:
        return await RedisStore(client, settings.namespace, settings.shards, Terms()).read()


class _Question:
    """A remote control command, with replies."""

    def __init__(
        self,
        app: Any,
        command: str,
        arguments: Mapping[str, Any],
        destination: list[str] | None,
        expected: set[str],
        timeout: float,
    ) -> None:
        self._app = app
        self._command = command
        self._arguments = dict(arguments)
        self._destination = destination
        self._missing = set(expected)
        self._deadline = monotonic() + timeout
        self._timeout = timeout
        self._ticket = uuid()
        self._answers: dict[str, Any] = {}

    def put(self) -> dict[str, Any]:
        """Return the answers. Raises what kombu raises."""
        known = bool(self._missing)
        with self._app.connection_for_write(connect_timeout=self._timeout) as connection:
            connection.ensure_connection(max_retries=1, interval_start=0.0, timeout=self._timeout)
            mailbox = self._app.control.mailbox(connection)
            with connection.channel() as channel, Consumer(
                channel, [mailbox.reply_queue], callbacks=[self._receive], accept=mailbox.accept, no_ack=True
            ):  # fmt: skip
                mailbox._publish(
                    self._command,
                    self._arguments,
                    destination=self._destination,
                    reply_ticket=self._ticket,
                    channel=channel,
                    timeout=self._timeout,
                    producer=Producer(channel, auto_declare=False),
                )
                channel.brpop_timeout = LINGER  # on Redis, closing the channel waits for a read that is under way
                while self._missing or not known:
                    if not self._drain(connection, self._deadline):
                        return self._answers
                if self._destination is None:
                    until = min(self._deadline, monotonic() + LINGER)
                    while self._drain(connection, until):
                        pass
        return self._answers

    @staticmethod
    def _drain(connection: Any, until: float) -> bool:
        """Wait for a reply; False: none came in time."""
        remaining = until - monotonic()
        if remaining <= 0:
            return False
        try:
            connection.drain_events(timeout=remaining)
        except TimeoutError:
            return False
        return True

    def _receive(self, body: Any, message: Any) -> None:
        if message.headers.get("ticket", self._ticket) != self._ticket:
            return
        for node, reply in body.items():
            # A worker without our control commands answers with an error, a KeyError of the command's name.
            if not (isinstance(reply, dict) and set(reply) == {"error"} and self._command in str(reply["error"])):
                self._answers[node] = reply
                self._missing.discard(node)


def reachable(app: Any, seconds: float) -> None:
    """Raise `Problem` unless the broker takes a connection: what sends messages tries again and again."""

    def connect() -> None:
        with app.connection_for_write(connect_timeout=seconds) as connection:
            connection.ensure_connection(max_retries=1, interval_start=0.0, timeout=seconds)

    within(seconds, connect, f"the broker {maybe_sanitize_url(str(app.warm_pool.settings.broker_url))}")


def within(seconds: float, call: Callable[[], T], what: str, hint: str = "") -> T:
    """Return what *call* returns, or raise what it raises; `Problem` when it takes longer than *seconds*.

    It runs in a thread, which is left alone then: a server that takes connections and never answers, or a name that
    is looked up for ever, would hold up this one.
    """
    box: queue.SimpleQueue[tuple[T | None, Exception | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            box.put((call(), None))
        except Exception as error:
            box.put((None, error))

    threading.Thread(target=run, name="pool-cli", daemon=True).start()
    try:
        value, error = box.get(timeout=seconds)
    except queue.Empty:
        value, error = None, TimeoutError()
    if isinstance(error, TimeoutError | RedisTimeoutError):  # the call's own time may be over a moment before ours
        raise Problem(f"{what} did not answer within {seconds:g} s{hint}") from None
    if isinstance(error, OSError | OperationalError | RedisError):
        raise Problem(f"cannot reach {what}: {error}") from error
    if error is not None:
        raise error
    return value  # type: ignore[return-value]
