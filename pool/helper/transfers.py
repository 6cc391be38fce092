"""File operations of the helper: each blocks, so it runs in one of a few threads; contents go against credit."""

import errno
import os
import threading
from collections import deque

from pool.helper import files, wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_THREADS = 4
"""File operations at a time; more wait. One that hangs, on a dead network drive, holds up one of them."""


class GivenUp(Exception):
    """The worker does not want it any more."""


class Transfer:
    """One operation: what the worker has sent for it, and may be sent."""

    def __init__(self, number: int, request: bytes, condition: "threading.Condition") -> None:
        operation, *self.arguments = request.split(b"\0")
        self.operation = operation.decode()
        self.number = number
        self.credit = wire.WINDOW
        self.given_up = False
        self.input = deque()  # type: deque[bytes]
        self._condition = condition

    def wait_credit(self) -> int:
        """Wait until something may be sent; returns how many bytes."""
        with self._condition:
            while self.credit <= 0 and not self.given_up:
                self._condition.wait()
            if self.given_up:
                raise GivenUp
            return self.credit

    def wait_input(self) -> bytes:
        """Wait for the next piece of the content."""
        with self._condition:
            while not self.input and not self.given_up:
                self._condition.wait()
            if self.given_up:
                raise GivenUp
            return self.input.popleft()


class Transfers:
    """All operations of the helper. *wake* is called when there are frames for `take`."""

    def __init__(self, wake: "Callable[[], None]") -> None:
        self._wake = wake
        self._frames = deque()  # type: deque[tuple[int, int, bytes]]
        self._open = {}  # type: dict[int, Transfer]
        self._queue = deque()  # type: deque[Transfer]
        self._condition = threading.Condition()
        self._threads = 0
        self._idle = 0

    # -- called by the loop

    def begin(self, number: int, request: bytes) -> None:
        """Start the operation of a FILE."""
        with self._condition:
            transfer = self._open[number] = Transfer(number, request, self._condition)
            self._queue.append(transfer)
            if self._threads < _THREADS and self._idle < len(self._queue):
                self._begin_thread()
            self._condition.notify_all()

    def _begin_thread(self) -> None:
        try:
            threading.Thread(target=self._serve, daemon=True).start()
        except RuntimeError:  # this host has no room for one
            if not self._threads:
                transfer = self._queue.pop()
                del self._open[transfer.number]
                self._send(wire.FAILED, transfer.number, wire.join(b"os", b"%d" % errno.EAGAIN, b""))
        else:
            self._threads += 1

    def feed(self, number: int, data: bytes) -> None:
        """Take a piece of content."""
        self._tell(number, lambda transfer: transfer.input.append(data))

    def grant(self, number: int, count: int) -> None:
        """Let *count* bytes more be sent."""

        def grant(transfer: Transfer) -> None:
            transfer.credit += count

        self._tell(number, grant)

    def give_up(self, number: int) -> None:
        """Have it end soon."""

        def give_up(transfer: Transfer) -> None:
            transfer.given_up = True

        self._tell(number, give_up)

    def give_all_up(self) -> None:
        """Have them all end soon."""
        for number in list(self._open):
            self.give_up(number)

    def none(self) -> bool:
        """Whether all have ended."""
        return not self._open

    def take(self) -> "list[tuple[int, int, bytes]]":
        """Return the frames that are to be sent."""
        frames = []
        while self._frames:
            frames.append(self._frames.popleft())
        return frames

    def _tell(self, number: int, what: "Callable[[Transfer], object]") -> None:
        transfer = self._open.get(number)
        if transfer is not None:
            with self._condition:
                what(transfer)
                self._condition.notify_all()

    # -- in threads

    def _serve(self) -> None:
        while True:
            with self._condition:
                self._idle += 1
                while not self._queue:
                    self._condition.wait()
                self._idle -= 1
                transfer = self._queue.popleft()
            try:
                answer = wire.DONE, self._operate(transfer)
            except files.Outside as error:
                answer = wire.FAILED, wire.join(b"outside", error.args[0])
            except OSError as error:
                answer = wire.FAILED, wire.join(b"os", b"%d" % (error.errno or 0), b"")
            except GivenUp:
                answer = wire.FAILED, b"given up"
            except Exception as error:
                answer = wire.FAILED, wire.join(b"bug", repr(error).encode("utf-8", "replace"))
            with self._condition:
                self._open.pop(transfer.number, None)
            self._send(answer[0], transfer.number, answer[1])

    def _operate(self, transfer: Transfer) -> bytes:
        if transfer.given_up:
            raise GivenUp
        return _OPERATIONS[transfer.operation](self, transfer)

    def _send(self, kind: int, number: int, payload: bytes) -> None:
        self._frames.append((kind, number, payload))
        self._wake()

    def read(self, transfer: Transfer) -> bytes:
        """Send the content."""
        path, *roots = transfer.arguments
        file = files.begin_read(path, roots)
        try:
            while True:
                data = os.read(file, min(wire.CHUNK, transfer.wait_credit()))
                if not data:
                    return b""
                with self._condition:
                    transfer.credit -= len(data)
                self._send(wire.OUT, transfer.number, data)
        finally:
            os.close(file)

    def write(self, transfer: Transfer) -> bytes:
        """Receive the content, and replace the file."""
        path, *roots = transfer.arguments
        replacement = files.Replacement(path, roots)
        try:
            while True:
                data = transfer.wait_input()
                if not data:
                    break
                replacement.write(data)
                self._send(wire.CREDIT, transfer.number, wire.COUNT.pack(len(data)))
            replacement.commit()
            return b""
        finally:
            replacement.end()

    def names(self, transfer: Transfer) -> bytes:
        """Send the names in a folder: none of them is empty."""
        path, *roots = transfer.arguments
        return wire.join(*files.names(path, roots))

    def make_folder(self, transfer: Transfer) -> bytes:
        """Make a folder."""
        path, *roots = transfer.arguments
        files.make_folder(path, roots)
        return b""

    def stat(self, transfer: Transfer) -> bytes:
        """Describe a file."""
        path, *roots = transfer.arguments
        found = files.stat(path, roots)
        return b"%d %.6f %d" % (found.st_size, found.st_mtime, found.st_mode)

    def remove(self, transfer: Transfer) -> bytes:
        """Remove something."""
        recursive, path, *roots = transfer.arguments
        files.remove(path, roots, recursive == b"1")
        return b""

    def move(self, transfer: Transfer) -> bytes:
        """Rename something."""
        count, *paths = transfer.arguments
        source, target = paths[: int(count)], paths[int(count) :]
        files.move(source[0], source[1:], target[0], target[1:])
        return b""

    def touch(self, transfer: Transfer) -> bytes:
        """Make a file, or set its time."""
        path, *roots = transfer.arguments
        files.touch(path, roots)
        return b""

    def clean(self, transfer: Transfer) -> bytes:
        """Remove what durable commands left long ago."""
        from pool.helper import durable

        durable.clean(os.path.join(transfer.arguments[0], durable.FOLDER))
        return b""

    def claim(self, transfer: Transfer) -> bytes:
        """Claim a root for an owner."""
        from pool.helper import fence

        root, scope, epoch = transfer.arguments
        try:
            fence.claim(root, scope, int(epoch))
        except fence.Stale as stale:
            return b"%d" % stale.args[0]
        return b""


_OPERATIONS = {"read": Transfers.read, "write": Transfers.write, "readdir": Transfers.names, "stat": Transfers.stat,
               "mkdir": Transfers.make_folder, "rm": Transfers.remove, "rename": Transfers.move,
               "touch": Transfers.touch, "clean": Transfers.clean, "claim": Transfers.claim}  # fmt: skip
