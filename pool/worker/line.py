"""The line from the worker's main process to the one that has the backends: with prefork another one."""

import asyncio
import contextlib
import json
import logging
import socket
from collections.abc import Callable, Mapping
from typing import Any

from pool.errors import PoolError
from pool.runtime import Call, loop_thread

logger = logging.getLogger(__name__)

LONGEST = 4096
"""Bytes of one message at most."""


class Line:
    """Made before worker processes are forked. A message is a word and what it needs; nobody answers.

    Each message is a datagram: a listener that is killed leaves no half of one behind for the next.
    """

    def __init__(self) -> None:
        self._ear, self._mouth = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._ear.setblocking(False)
        self._mouth.setblocking(False)

    def say(self, word: str, **what: Any) -> None:
        """Send a message; from any thread. Raises `PoolError` when nobody has listened for long."""
        message = json.dumps([word, what]).encode()
        if len(message) > LONGEST:
            raise PoolError(f"the message {word!r} has {len(message)} bytes: at most {LONGEST}")
        try:
            self._mouth.send(message)
        except BlockingIOError:
            raise PoolError("the process that has the backends does not listen: try again") from None

    def wake(self) -> None:
        """Send the message ``look``, which says nothing that an earlier one would not say as well."""
        with contextlib.suppress(PoolError):  # there is enough to wake up for
            self.say("look")

    def listen(self, hear: Mapping[str, Callable[..., object]]) -> Call[None]:
        """Call ``hear[word](**what)`` for each message from now on, on the event loop of this process."""
        return loop_thread().spawn(self._listen(hear))

    async def _listen(self, hear: Mapping[str, Callable[..., object]]) -> None:
        loop = asyncio.get_running_loop()
        while True:
            word, what = json.loads(await loop.sock_recv(self._ear, LONGEST))
            try:
                hear[word](**what)
            except Exception:
                logger.exception("the message %r was not carried out", word)

    def close(self) -> None:
        """Nobody speaks any more."""
        self._ear.close()
        self._mouth.close()
