"""One warm command at 20 and 50 ms round trip time: how many round trips does it take?

A round trip is what one byte takes there and back over a bare TCP connection through the same proxy, in the same
rounds: a little more than the proxy was told to wait.
"""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from benchmarks.delay_proxy import delayed
from benchmarks.exec_peers import CHANNEL, OURS, Bursts, tell_missing
from benchmarks.harness import Report, p50, p99, remote_folder, scratch, spread, ssh_server
from benchmarks.peers import ALL, FLOORS, Peer, opened, target_of

RTTS = (20, 50)  # ms
TARGET = 1.1  # round trips
ECHO = "TCP: one byte and back"


def measure(*, quick: bool) -> Report:
    rounds = 1 if quick else 20
    report = Report("exec_latency", "a warm `true` over SSH through a proxy that delays, in round trip times")
    with scratch() as folder, ssh_server(folder) as (which, info):
        report.title += f"; {which}"
        target = target_of(info, remote_folder(folder))
        for rtt in RTTS:
            missing = partial(tell_missing, report) if rtt == RTTS[0] else lambda _name, _why: None
            with (
                delayed(rtt) as way,
                _echo(way) as echo,
                opened(ALL + FLOORS, target.through(way, folder), missing) as peers,
            ):
                bursts = Bursts({ECHO: echo, **peers})
                bursts.told(rounds)
            report.raw[f"ms at {rtt} ms"] = bursts.single
            _add(report, rtt, bursts.single)
    report.notes.append("RTT: the p50 of one byte there and back over TCP, through the same proxy, in the same rounds.")
    return report


def _add(report: Report, rtt: int, told: dict[str, list[float]]) -> None:
    trip = p50(told[ECHO])
    report.add(f"{rtt} ms: {ECHO}", trip, "ms", remark=f"{spread(told[ECHO])}, p99 {p99(told[ECHO]):.3g}")
    for name, values in told.items():
        if name == ECHO:
            continue
        required = TARGET if name == OURS else None
        report.add(f"{rtt} ms: {name}", p50(values) / trip, "RTT", required, remark=f"ms: {spread(values)}")
        if name in (OURS, CHANNEL, "asyncssh", "mitogen"):
            report.add(f"{rtt} ms: ... p99", p99(values) / trip, "RTT", required)


class _Echo(Peer):
    """What the proxy itself costs."""

    name = ECHO

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def connect(self) -> None: ...

    def run(self, command: str) -> int:
        self._socket.sendall(command[:1].encode())
        return len(self._socket.recv(1)) - 1

    def close(self) -> None:
        self._socket.close()


@contextmanager
def _echo(way: Callable[[int], int]) -> Iterator[_Echo]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=_send_back, args=(listener,), daemon=True)
        thread.start()
        peer = _Echo(way(listener.getsockname()[1]))
        try:
            yield peer
        finally:
            peer.close()
            thread.join()


def _send_back(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    with connection:
        while data := connection.recv(1024):
            connection.sendall(data)
