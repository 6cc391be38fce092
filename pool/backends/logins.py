"""Whose turn it is to log in: a host takes only so many logins at a time, and no user may take them all."""

import asyncio
from collections import deque
from weakref import WeakKeyDictionary, WeakValueDictionary

from pool.errors import BackendUnavailable

_hosts: "WeakKeyDictionary[asyncio.AbstractEventLoop, WeakValueDictionary[tuple[str, int], LoginLine]]"
_hosts = WeakKeyDictionary()
"""The lines of each event loop (a forked child has another one), for as long as somebody logs in or waits there."""


def login_line(host: str, port: int) -> "LoginLine":
    """Return the line in front of a host, shared by all pools and backends of this process."""
    lines = _hosts.setdefault(asyncio.get_running_loop(), WeakValueDictionary())
    line = lines.get((host, port))
    if line is None:
        line = lines[host, port] = LoginLine(f"{host}:{port}")
    return line


class _Waiter:
    """Somebody who waits; granted its turn once."""

    __slots__ = ("granted", "limit")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class LoginLine:
    """Turns to log in to one host. Users come round robin, the logins of one user first come first served.

    A waiter whose turn comes while it is being cancelled passes it on. Belongs to one event loop.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self.under_way = 0
        self._lines: dict[str, deque[_Waiter]] = {}  # by user; the first of them is next, and goes to the end then
        self._got_in = float("-inf")  # when somebody last did

    @property
    def waiting(self) -> int:
        """How many wait for their turn."""
        return sum(len(line) for line in self._lines.values())

    async def take(self, user: str, limit: int, patience: float) -> "Turn":
        """Wait until fewer than *limit* logins are under way and it is *user*'s turn; the caller ends the turn.

        A line that moves is no reason to give up, however long it is. Raises `BackendUnavailable` when nobody got in
        for *patience* seconds of waiting.
        """
        if not self._lines and self.under_way < limit:
            self.under_way += 1
            return Turn(self)
        waiter = _Waiter(limit)
        self._lines.setdefault(user, deque()).append(waiter)
        try:
            await self._wait(user, waiter, patience)
        except BaseException:
            self._leave(user, waiter)
            raise
        return Turn(self)

    async def _wait(self, user: str, waiter: _Waiter, patience: float) -> None:
        now = asyncio.get_running_loop().time
        began = now()
        while not waiter.granted.done():
            left = max(began, self._got_in) + patience - now()
            if left <= 0:
                raise BackendUnavailable(
                    f"waiting for its turn to log in to {self.where}: {self.ahead(user, waiter)} before it,"
                    f" {self.under_way} under way, and nobody got in for {patience:g} s",
                    "timeout",
                    0.0,
                )
            await asyncio.wait({waiter.granted}, timeout=left)

    def ahead(self, user: str, waiter: _Waiter) -> int:
        """How many of those who wait have their turn before this one."""
        users = list(self._lines)
        rounds, place = self._lines[user].index(waiter), users.index(user)
        others = (min(len(self._lines[u]), rounds + (i < place)) for i, u in enumerate(users) if u != user)
        return rounds + sum(others)

    def _leave(self, user: str, waiter: _Waiter) -> None:
        """Go away without a turn, or pass on one that came too late."""
        if waiter.granted.done():
            self.under_way -= 1
        else:
            self._lines[user].remove(waiter)
            if not self._lines[user]:
                del self._lines[user]
        self._serve()

    def _serve(self) -> None:
        """Let in who is next, as long as there is a place."""
        while self._lines:
            user, line = next(iter(self._lines.items()))
            if self.under_way >= line[0].limit:
                return
            self.under_way += 1
            line.popleft().granted.set_result(None)
            del self._lines[user]
            if line:
                self._lines[user] = line

    def end_turn(self, *, got_in: bool) -> None:
        """One login less is under way; called by `Turn`."""
        self.under_way -= 1
        if got_in:
            self._got_in = asyncio.get_running_loop().time()
        self._serve()


class Turn:
    """The right to log in now; keeps its line alive."""

    def __init__(self, line: LoginLine) -> None:
        self._line: LoginLine | None = line

    def over(self, *, got_in: bool = False) -> None:
        """Give the turn to the next. Can be called again."""
        line, self._line = self._line, None
        if line is not None:
            line.end_turn(got_in=got_in)
