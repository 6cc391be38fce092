"""When channels claim: before the event loop waits, and after they have heard of a filled queue.

It overrides private methods of kombu 5.7, as `pool.worker.transport` does.
"""

from queue import Empty
from time import monotonic
from typing import Any

from kombu.transport import redis

CLAIMS = "CLAIMS"
"""The poller's name for a connection on which a channel hears of filled queues."""
LOOK_EVERY = 1.0
"""Seconds between two looks at all queues, whatever was heard."""
LOOK_EVERY_UNTOLD = 0.05
"""... where the server tells nothing."""


class ShardPoller(redis.MultiChannelPoller):
    """Has channels claim before it waits, and when they have heard of something."""

    def __init__(self) -> None:
        super().__init__()
        self.delivered = 0
        """Messages that were claimed and delivered, ever."""
        self._loop: Any = None
        self._timer: Any = None
        self._every = LOOK_EVERY
        self._looked_at = monotonic()

    def _register_BRPOP(self, channel: Any) -> None:  # noqa: N802 - kombu's name
        if not channel.claiming:
            super()._register_BRPOP(channel)

    def on_poll_start(self) -> None:
        super().on_poll_start()
        for channel in tuple(self._channels):
            if channel.claiming and not channel.closed:
                self._claim(channel)

    def _claim(self, channel: Any) -> None:
        if not self._client_registered(channel, channel.watch.listener, CLAIMS):
            self._register(channel, channel.watch.listener, CLAIMS)
        number = channel.claim()
        self.delivered += number
        if number and self._loop is not None and self._loop._waker is not None:
            # The event loop is about to wait for as long as it found right before this. What the messages have brought
            # since (a timer, an acknowledgement to be sent, more to claim) must not wait that long.
            self._loop._waker.wake()

    def on_readable(self, fileno: int) -> None:
        channel, kind = self._fd_to_chan.get(fileno, (None, None))
        if kind != CLAIMS:
            super().on_readable(fileno)
            return
        channel.handlers[CLAIMS]()
        raise Empty

    def get(self, callback: Any, timeout: float | None = None) -> None:
        """Wait for messages and deliver them, where no event loop runs; raises Empty after *timeout* seconds."""
        if not any(channel.claiming for channel in self._channels):
            super().get(callback, timeout)
            return
        before = self.delivered
        self.on_poll_start()
        if self.delivered == before:
            try:
                super().get(callback, self._every if timeout is None else min(timeout, self._every))
            except Empty:
                if monotonic() - self._looked_at >= self._every:
                    self.look()
                self.on_poll_start()
                if self.delivered == before:
                    raise

    def look(self) -> None:
        """Have every channel look at all its queues."""
        self._looked_at = monotonic()
        for channel in self._channels:
            channel.look()

    def look_every(self, seconds: float | None = None, loop: Any = None) -> None:
        """Look this often; with an event loop by its timer."""
        self._loop = loop or self._loop
        if seconds in (None, self._every) and loop is None:
            return
        self._every = seconds or self._every
        if self._loop is not None:
            self._stop_timer()
            self._timer = self._loop.call_repeatedly(self._every, self.look)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def close(self) -> None:
        self._stop_timer()
        super().close()
