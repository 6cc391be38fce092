"""Who waits for room in a pool, in order of arrival."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Set as AbstractSet

from pool.entry import Effects, Waiter, Wake
from pool.errors import BackendClosed


class Room:
    """Waiters, one line for each group (None: those of no group); tickets keep the order across the lines.

    So the next one who may go in is found among the heads of the lines, however many wait behind a head that may not.
    """

    def __init__(self) -> None:
        self.lines: dict[str | None, deque[Waiter]] = {}  # none of them empty
        self._last = 0
        self._ahead = 0

    def append(self, waiter: Waiter) -> None:
        """Behind everybody."""
        self._last += 1
        waiter.ticket = self._last
        self.lines.setdefault(waiter.group, deque()).append(waiter)

    def send_ahead(self, waiters: Iterable[Waiter]) -> None:
        """Before everybody, in the order given."""
        for waiter in reversed(list(waiters)):
            self._ahead -= 1
            waiter.ticket = self._ahead
            self.lines.setdefault(waiter.group, deque()).appendleft(waiter)

    def first(self, passing: AbstractSet[str | None] = frozenset()) -> Waiter | None:
        """Return who came first, of all whose group is not one of *passing*."""
        heads = [line[0] for group, line in self.lines.items() if group not in passing]
        return min(heads, key=lambda waiter: waiter.ticket or 0, default=None)

    def remove(self, waiter: Waiter) -> None:
        """Take one out."""
        line = self.lines[waiter.group]
        line.remove(waiter)
        waiter.ticket = None
        if not line:
            del self.lines[waiter.group]

    def take(self, match: Callable[[Waiter], bool] = lambda _: True) -> list[Waiter]:
        """Take out all who match; return them in order."""
        found = [waiter for waiter in self if match(waiter)]
        for waiter in found:
            self.remove(waiter)
        return found

    def __contains__(self, waiter: Waiter) -> bool:
        return waiter.ticket is not None

    def __iter__(self) -> Iterator[Waiter]:
        waiting = [waiter for line in self.lines.values() for waiter in line]
        return iter(sorted(waiting, key=lambda waiter: waiter.ticket or 0))

    def __len__(self) -> int:
        return sum(len(line) for line in self.lines.values())


def send_away(waiting: Iterable[Waiter], why: str, effects: Effects) -> None:
    """Tell waiters, wherever they stood, that they will not be served."""
    for waiter in waiting:
        waiter.error = BackendClosed(why)
        effects.append(Wake(waiter))
