"""The pulse: a host is told, now and then, until when this process may work. Then it ends by itself what runs there.

A worker that is frozen, or cut off from the host, kills nothing, and its connection stays open. So what runs there for
it is ended by its helper (`pool.helper.trust`), or by a watchdog (`pool.backends.watchdog`) where no helper does it.

The moment is told in the host's own time, of which the host sends samples: a message that was held up on its way, or in
a frozen worker, says nothing that is no longer true.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from time import monotonic

from pool.backends.base import Trust
from pool.errors import BackendUnavailable

logger = logging.getLogger(__name__)

_INTERVAL = 10.0
"""Seconds between two beats; a quarter of the remaining time when that is less."""
_UNLIMITED = 1.0
"""Seconds between two beats while there is no limit: one may come."""
_SHORTEST = 0.05
"""Seconds between two beats at least."""
_FAR = 1e6
"""Seconds: further ahead than any beat needs to tell."""
_SAMPLES = 8
"""Of the host's clock. The best of the last few counts: clocks drift, so an old one is worth nothing."""


class Pulse:
    """Beats while this process may work. *left*: for how long the host is to believe that.

    *tell* sends a moment, in hundredths of seconds of the host's clock, or None for no limit; it may raise OSError when
    the channel is closed. The host answers each with a `sample`.
    """

    __slots__ = ("_beating", "_clock", "_left", "_tell")

    def __init__(self, left: Trust, tell: Callable[[int | None], None]) -> None:
        self._left = left
        self._tell = tell
        self._clock: list[float] = []  # the host's time minus ours, in seconds, if not more
        self._beating: asyncio.TimerHandle | None = None

    def sample(self, moment: int) -> None:
        """Take the time of the host's clock, as it was not later than now."""
        self._clock = [*self._clock, moment / 100 - monotonic()][-_SAMPLES:]

    def start(self) -> None:
        """Beat for the first time, and go on. There must be a sample.

        Raises `BackendUnavailable` when this process may not work even now.
        """
        pause = self._beat()
        if pause is None:
            raise BackendUnavailable("this process may not work for its keys any more", "setup", 0.0)
        self._beat_later(pause)

    @property
    def beating(self) -> bool:
        """Whether it was started, and not stopped."""
        return self._beating is not None

    def stop(self) -> None:
        """Beat no more. Can be repeated."""
        if self._beating is not None:
            self._beating.cancel()
            self._beating = None

    def _beat_later(self, pause: float) -> None:
        self._beating = asyncio.get_running_loop().call_later(pause, self._go_on)

    def _go_on(self) -> None:
        """Beat while the process may work. Then what runs is ended by the host, when it was told to, or now."""
        pause = None
        try:
            pause = self._beat()
        except OSError:  # the channel is closed
            return
        except Exception:
            logger.exception("asking how long this process may work failed: taken as not any more")
        if pause is not None:
            self._beat_later(pause)
            return
        with contextlib.suppress(Exception):  # a channel that is closed has ended it
            self._tell(0)  # it may have been told of no limit so far

    def _beat(self) -> float | None:
        """Tell the host; return the seconds until the next time, None when the process may not work any more."""
        now = monotonic()  # before asking: a freeze between the two makes the moment too early, never too late
        left = self._left()
        if left is None:
            self._tell(None)
            return _UNLIMITED
        if left <= 0:
            return None
        self._tell(max(0, int(100 * (now + min(left, _FAR) + max(self._clock)))))
        return max(_SHORTEST, min(_INTERVAL, left / 4))
