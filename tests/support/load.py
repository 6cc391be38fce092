"""A steady load of builds, short and long, from a thread of its own, while nodes come, go and die."""

import itertools
import threading
import uuid
from collections.abc import Sequence
from typing import Self

from celery import Celery
from kombu.exceptions import OperationalError

import tests.acceptance.apps.probe  # noqa: F401 - shared tasks: every app knows them
from pool import Settings, install
from pool.embedded import is_redis

BUILD = "probe.ledger_build"


class Load:
    """A context manager: sends builds until it is told to stop. *rate*: of them in a second.

    Every *long_every*-th is a long one, of one to three times *long* seconds; the others take *short* seconds.
    """

    def __init__(
        self,
        broker_url: str,
        keys: Sequence[str],
        *,
        rate: float = 12.0,
        short: float = 0.05,
        long: float = 2.0,
        long_every: int = 10,
        env_shards: int = 64,
    ) -> None:
        self.keys = keys
        self.sent: dict[str, str] = {}
        """Task id -> key, of all that the broker has taken."""
        self.doubtful: dict[str, str] = {}
        """Those of which that is unknown."""
        self._interval = 1 / rate
        self._seconds = [short if turn % long_every else long * (1 + turn // long_every % 3) for turn in range(210)]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="load")
        # No result backend: the nodes store results, but nobody here subscribes to them.
        self.app = Celery("load", broker=broker_url, set_as_current=False)
        if is_redis(broker_url):
            self.app.conf.broker_transport_options = {"priority_steps": [0], "socket_timeout": 5.0}
        install(self.app, Settings(broker_url=broker_url, shards=env_shards))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop()
        self.app.close()

    def stop(self) -> None:
        """Send no more."""
        self._stop.set()
        self._thread.join()

    def send(self, key: str, seconds: float) -> None:
        """Send one build."""
        task = uuid.uuid4().hex
        try:
            self.app.tasks[BUILD].apply_async((key, seconds), task_id=task, retry=False)
        except (OperationalError, OSError):
            self.doubtful[task] = key  # the broker may have it, and its answer is lost
        else:
            self.sent[task] = key

    def _run(self) -> None:
        for turn in itertools.count():
            # Each key gets every kind of build: the number of keys has no factor in common with the turns.
            self.send(self.keys[turn % len(self.keys)], self._seconds[turn % len(self._seconds)])
            if self._stop.wait(self._interval):
                return
