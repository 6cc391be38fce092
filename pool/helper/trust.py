"""Until when the worker may work, as it said last: a worker that is frozen, or cut off, ends nothing itself.

It says so in the time of this host's clock, of which it gets a sample each time: what it said long ago, and comes late,
says nothing that is no longer true.
"""

import time

FOREVER = float("inf")


def _clock() -> float:
    """Seconds since the boot, also those in which the machine slept."""
    try:
        return time.clock_gettime(7)  # CLOCK_BOOTTIME, which Python 3.6 does not name
    except (OSError, AttributeError):
        return time.monotonic()


def now() -> bytes:
    """Return the payload of a CLOCK."""
    return b"%d" % int(100 * _clock())


class Trust:
    """Without a limit until one is heard of."""

    def __init__(self) -> None:
        self._until = FOREVER

    def hear(self, moment: bytes) -> bytes:
        """Take the payload of an UNTIL; return that of its answer."""
        self._until = int(moment) / 100 if moment else FOREVER
        return now()

    def left(self) -> float:
        """Seconds until the moment; 0 or less: it is over."""
        return FOREVER if self._until == FOREVER else self._until - _clock()
