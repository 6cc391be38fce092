"""What the benchmarks promise about peers: none is left out silently, and the way that takes time loses nothing."""

import socket
import threading
from functools import partial
from pathlib import Path

from benchmarks.delay_proxy import delayed
from benchmarks.exec_peers import tell_missing
from benchmarks.harness import Report, p99
from benchmarks.peers import Missing, Peer, Target, opened


class _Fake(Peer):
    name = "fake"
    closed: list[str] = []

    def connect(self):
        pass

    def run(self, command):
        return 0

    def close(self):
        self.closed.append(self.name)


class _NotInstalled(_Fake):
    name = "not there"

    def connect(self):
        raise Missing("not installed")


class _Broken(_Fake):
    name = "broken"

    def run(self, command):
        raise OSError("no route")


def _target():
    return Target(1, "user", Path("key"), Path("hosts"), Path("/home"), "folder")


def test_a_peer_that_is_missing_or_broken_has_a_row_that_says_so():
    """The others are measured; nobody is left out silently, and what was begun is closed."""
    report = Report("name", "title")
    _Fake.closed.clear()
    with opened((_Fake, _NotInstalled, _Broken), _target(), partial(tell_missing, report)) as peers:
        assert list(peers) == ["fake"]
    rows = {row.what: (row.measured, row.reached, row.remark) for row in report.rows}
    assert rows == {
        "not there": (None, None, "not installed"),
        "broken": (None, None, "failed: OSError: no route"),
    }
    assert sorted(_Fake.closed) == ["broken", "fake", "not there"]
    report.show()


def test_p99_is_a_value_that_one_in_a_hundred_exceeds():
    """Of fewer than a hundred it is the greatest."""
    assert p99([float(number) for number in range(1, 101)]) == 99.0
    assert p99([float(number) for number in range(1, 201)]) == 198.0
    assert p99([3.0, 1.0, 2.0]) == 3.0


def test_the_way_that_takes_time_keeps_order_and_passes_the_end_on():
    """All bytes come back as they were sent, and the end after them."""
    sent = b"".join(number.to_bytes(4, "big") for number in range(200_000))
    with socket.create_server(("127.0.0.1", 0)) as listener, delayed(4.0) as way:
        thread = threading.Thread(target=_echo, args=(listener, len(sent)))
        thread.start()
        with socket.create_connection(("127.0.0.1", way(listener.getsockname()[1])), timeout=60) as client:
            sender = threading.Thread(target=client.sendall, args=(sent,))
            sender.start()
            told = b""
            while piece := client.recv(1 << 16):
                told += piece
            sender.join()
        thread.join()
    assert told == sent


def _echo(listener, size):
    connection, _ = listener.accept()
    with connection:
        while size:
            data = connection.recv(1 << 16)
            assert data, f"{size} bytes are missing"
            connection.sendall(data)
            size -= len(data)
