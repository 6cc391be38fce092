"""One warm command, `true`, on an open connection: ours against everything else that runs commands over SSH."""

from collections.abc import Callable, Mapping
from functools import partial

from benchmarks.harness import Report, interleaved, p50, p99, ratio, remote_folder, scratch, spread, ssh_server
from benchmarks.peers import ALL, FLOORS, Peer, opened, target_of

OURS = "ours, helper"
CHANNEL = "ours, channel"
TARGETS = {  # ours / this one
    "asyncssh": 0.5,
    "OpenSSH ControlMaster": 0.2,
    "floor: shell loop, forks": 1.4,
    "floor: shell loop, starts sh": None,
}
BURST = 5


def measure(*, quick: bool) -> Report:
    rounds = 4 if quick else 60
    report = Report("exec_peers", "a warm `true` over SSH, from a thread; loopback")
    with scratch() as folder, ssh_server(folder) as (which, info):
        report.title += f", {which}"
        target = target_of(info, remote_folder(folder))
        with opened(ALL + FLOORS, target, partial(tell_missing, report)) as peers:
            bursts = Bursts(peers)
            told = bursts.told(rounds)
    report.raw["ms"] = bursts.single
    for name, values in bursts.single.items():
        remark = f"{beside(told, name)}{spread(values)}, p99 {p99(values):.3g}"
        report.add(name, p50(values), "ms", remark=remark)
    for ours in (OURS, CHANNEL):
        for name, required in TARGETS.items():
            if ours in told and name in told:
                target_value = required if ours == OURS else None
                report.add(f"{ours} / {name}", ratio(told[ours], told[name]), "x", target_value)
    report.notes.append(
        "The floors keep one shell on one channel and take nothing back but the exit code: no output, no timeout, no "
        "kill. paramiko, parallel-ssh and agent-backend's node wait 40 ms for a delayed TCP acknowledgement when one "
        "command follows another at once."
    )
    return report


def tell_missing(report: Report, name: str, why: str) -> None:
    """A row for a peer that is not there."""
    report.add(name, None, "", remark=why)


def beside(told: Mapping[str, list[float]], name: str) -> str:
    """How *name*'s time compares with asyncssh's, round by round; empty where that says nothing."""
    if name == "asyncssh" or "asyncssh" not in told:
        return ""
    return f"{ratio(told[name], told['asyncssh']):.2f} x asyncssh; "


class Bursts:
    """Takes turns of `BURST` commands, one right after the other, as tasks send them; ``single`` has each, in ms."""

    def __init__(self, peers: Mapping[str, Peer]) -> None:
        self.single: dict[str, list[float]] = {}
        self._contestants: dict[str, Callable[[], float]] = {
            name: partial(self._burst, name, peer) for name, peer in peers.items()
        }

    def _burst(self, name: str, peer: Peer) -> float:
        burst = [peer.time_run("true") for _ in range(BURST)]
        self.single.setdefault(name, []).extend(burst)
        return p50(burst)

    def told(self, rounds: int) -> dict[str, list[float]]:
        """The p50 of each burst, of all contestants; a first round is not counted."""
        interleaved(self._contestants, 1)
        self.single.clear()
        return interleaved(self._contestants, rounds)
