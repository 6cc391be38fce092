"""A way to a local server that takes time: ``python -m benchmarks.delay_proxy PORT RTT_MS`` prints the port to use.

It is a process of its own, so that it takes no turns of the clients' interpreter. Every piece is held back for half of
the round trip time, in either direction, and order is kept. It does not model the width of the line, loss or windows.
"""

import asyncio
import os
import selectors
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_HIGH_WATER = 64 << 20  # bytes under way in one direction until the sender has to wait


class _Side(asyncio.Protocol):
    """One end of a connection; what it receives leaves at the other end, later."""

    def __init__(self, delay: float) -> None:
        self._delay = delay
        self._transport: asyncio.Transport | None = None
        self.other: _Side | None = None
        self._held: deque[tuple[float, bytes | None]] = deque()  # when it is due, and what; None: the end
        self._bytes = 0
        self._loop = asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        other = self.other
        if other is not None and other._held and other._held[0][0] <= self._loop.time():
            other._let_go()  # what came for us before we were there
        plug: socket.socket = transport.get_extra_info("socket")
        plug.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        transport.set_write_buffer_limits(high=_HIGH_WATER)

    def data_received(self, data: bytes) -> None:
        self._hold(data)
        self._bytes += len(data)
        if self._bytes > _HIGH_WATER and self._transport is not None:
            self._transport.pause_reading()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._hold(None)

    def _hold(self, data: bytes | None) -> None:
        due = self._loop.time() + self._delay
        self._held.append((due, data))
        if len(self._held) == 1:
            self._loop.call_at(due, self._let_go)

    def _let_go(self) -> None:
        now = self._loop.time()
        target = self.other._transport if self.other is not None else None
        if target is None:
            return
        while self._held and self._held[0][0] <= now:
            data = self._held.popleft()[1]
            if target.is_closing():
                continue
            if data is None:
                target.close()
                continue
            target.write(data)
            self._bytes -= len(data)
            if self._bytes <= _HIGH_WATER and self._transport is not None and not self._transport.is_closing():
                self._transport.resume_reading()
        if self._held:
            self._loop.call_at(self._held[0][0], self._let_go)


async def _serve(port: int, rtt: float) -> None:
    loop = asyncio.get_running_loop()
    joining: set[asyncio.Task[Any]] = set()

    def accept() -> _Side:
        here, there = _Side(rtt / 2), _Side(rtt / 2)
        here.other, there.other = there, here
        task = loop.create_task(loop.create_connection(lambda: there, "127.0.0.1", port))
        joining.add(task)
        task.add_done_callback(joining.discard)
        return here

    server = await loop.create_server(accept, "127.0.0.1", 0)
    loop.add_signal_handler(signal.SIGTERM, server.close)
    loop.add_reader(0, server.close)  # our parent is gone
    print(server.sockets[0].getsockname()[1], flush=True)
    while server.is_serving():
        await asyncio.sleep(0.2)


def _main() -> None:
    # epoll's timeouts are whole milliseconds; select's are not, and a proxy that is late by one spoils the picture.
    loop = asyncio.SelectorEventLoop(selectors.SelectSelector())
    loop.run_until_complete(_serve(int(sys.argv[1]), float(sys.argv[2]) / 1e3))
    os._exit(0)


@contextmanager
def delayed(rtt: float) -> Iterator[Callable[[int], int]]:
    """Yield a function that returns, for a port of this machine, one that is *rtt* ms away from us."""
    processes: list[subprocess.Popen[bytes]] = []

    def way(port: int) -> int:
        command = [sys.executable, "-m", "benchmarks.delay_proxy", str(port), str(rtt)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        processes.append(process)
        assert process.stdout is not None
        return int(process.stdout.readline())

    try:
        yield way
    finally:
        for process in processes:
            process.terminate()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                pipe.close()


if __name__ == "__main__":
    _main()
