"""A way to a server that a test can close: for a node that is cut off from one server and from nothing else."""

import contextlib
import selectors
import socket
import threading
from types import TracebackType
from typing import Self


class Proxy:
    """Passes bytes on between a local port and *target*; a context manager."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._cut = threading.Event()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, name="proxy", daemon=True).start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _exc: BaseException | None, _tb: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._close_all()

    def cut(self) -> None:
        """From now on nothing passes: connections end, new ones are closed at once."""
        self._cut.set()
        self._close_all()

    def mend(self) -> None:
        self._cut.clear()

    def _close_all(self) -> None:
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for side in (side for pair in pairs for side in pair):
            with contextlib.suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self._join(self._listener.accept()[0])

    def _join(self, here: socket.socket) -> None:
        with contextlib.ExitStack() as sides, contextlib.suppress(OSError):
            sides.enter_context(here)
            there = sides.enter_context(socket.create_connection(self._target))
            with self._lock:
                if self._cut.is_set():
                    return
                self._pairs.append((here, there))
            sides.pop_all()
            threading.Thread(target=_pump, args=(here, there), daemon=True).start()


def _pump(here: socket.socket, there: socket.socket) -> None:
    """Both ways, until either side ends."""
    other = {here: there, there: here}
    with here, there, selectors.DefaultSelector() as selector, contextlib.suppress(OSError):
        for side in other:
            selector.register(side, selectors.EVENT_READ)
        while True:
            for ready, _events in selector.select():
                side = ready.fileobj
                assert isinstance(side, socket.socket)
                data = side.recv(65536)
                if not data:
                    return
                other[side].sendall(data)
