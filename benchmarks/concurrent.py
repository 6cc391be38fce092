"""500 commands at once: over one connection whose server allows 10 sessions, and over 20 hosts."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.exec_peers import CHANNEL, OURS, tell_missing
from benchmarks.harness import Report, interleaved, p50, ratio, remote_folder, scratch, spread, ssh_server
from benchmarks.peers import ALL, Peer, opened, target_of
from benchmarks.peers.libraries import Mitogen, ParallelSsh, Paramiko
from benchmarks.peers.on_asyncssh import Asyncssh
from benchmarks.peers.ours import Ours, OursOnChannels

COMMANDS = 500
HOSTS = 20
MAX_SESSIONS = 10  # OpenSSH's default
COMMAND = "sleep 0.1"  # something to wait for
SERIAL = 50  # commands of `COMMAND` for a peer that runs them one after the other: the rate is the same
CROWD = (Ours, OursOnChannels, Asyncssh, Paramiko, Mitogen, ParallelSsh)
TARGET = 3.0  # commands per second, ours / asyncssh


def measure(*, quick: bool) -> Report:
    size = Size(100, 5, 1, 1) if quick else Size(COMMANDS, HOSTS, 3, 2)
    report = Report("concurrent", f"{size.commands} commands at once; MaxSessions {MAX_SESSIONS}")
    with scratch() as folder:
        with ssh_server(folder, max_sessions=MAX_SESSIONS) as (which, info):
            report.title += f", {which}"
            target = target_of(info, remote_folder(folder))
            with opened(ALL, target, partial(tell_missing, report)) as peers:
                _one_connection(report, "true", peers, size.commands, size.rounds)
                _one_connection(report, COMMAND, peers, size.commands, size.slow_rounds)
        _many_hosts(report, folder, size)
    report.notes.append(
        f"asyncssh, paramiko, parallel-ssh, ControlMaster and agent-backend's TypeScript client are held to "
        f"{MAX_SESSIONS} at a time, which they do not do by themselves; what failed nevertheless came while the server "
        "still counted a session that had just ended. agent-backend's Python client has a daemon that allows any "
        "number. Rates are of commands that succeeded."
    )
    return report


@dataclass(frozen=True)
class Size:
    """How much of it."""

    commands: int
    hosts: int
    rounds: int
    slow_rounds: int  # of `COMMAND`


class _Rates:
    """Commands per second, and how many failed, by peer."""

    def __init__(self) -> None:
        self.failed: dict[str, int] = {}

    def timed(self, name: str, call: Callable[[], int], count: int) -> float:
        started = perf_counter()
        failed = call()
        taken = perf_counter() - started
        self.failed[name] = self.failed.get(name, 0) + failed
        return (count - failed) / taken


def _one_connection(report: Report, command: str, peers: Mapping[str, Peer], commands: int, rounds: int) -> None:
    rates = _Rates()
    contestants: dict[str, Callable[[], float]] = {}
    for name, peer in peers.items():
        try:
            peer.many("true", 5)
        except Exception as error:
            report.add(f"one connection, {command}: {name}", None, "", remark=str(error)[:80])
            continue
        count = SERIAL if peer.serial and command == COMMAND else commands
        contestants[name] = partial(_turn, report, rates, peer, command, count)
    told = interleaved(contestants, rounds)
    _add(report, f"one connection, {command}", told, rates.failed, commands * rounds)


def _turn(report: Report, rates: _Rates, peer: Peer, command: str, count: int) -> float:
    """Commands per second, on a connection that works when the turn begins: some break under their refusals."""
    try:
        peer.run("true")
    except Exception:
        report.notes.append(f"{peer.name}: its connection did not outlive a turn; made anew")
        peer.close()
        peer.connect()
    return rates.timed(peer.name, partial(_tried, report, peer, command, count), count)


def _tried(report: Report, peer: Peer, command: str, count: int) -> int:
    """How many failed; all, if the peer itself did."""
    try:
        return peer.many(command, count)
    except Exception as error:
        report.notes.append(f"{peer.name}, {command}: {type(error).__name__}: {str(error)[:100]}")
        return count


def _many_hosts(report: Report, folder: Path, size: Size) -> None:
    crowds: dict[str, list[Any]] = {}
    with ExitStack() as stack:
        for number in range(size.hosts):
            place = folder / f"host-{number}"
            place.mkdir()
            _which, info = stack.enter_context(ssh_server(place, max_sessions=MAX_SESSIONS))
            target = target_of(info, remote_folder(place))
            for name, peer in stack.enter_context(opened(CROWD, target, lambda _name, _why: None)).items():
                crowds.setdefault(name, []).append(peer)
        rates = _Rates()
        contestants: dict[str, Callable[[], float]] = {}
        for name, crowd in crowds.items():
            call = partial(type(crowd[0]).crowd, crowd, "true", size.commands // size.hosts)
            contestants[name] = partial(rates.timed, name, call, size.commands)
        told = interleaved(contestants, size.rounds)
    _add(report, f"{size.hosts} hosts, true", told, rates.failed, size.commands * size.rounds)


def _add(report: Report, what: str, told: dict[str, list[float]], failed: Mapping[str, int], of: int) -> None:
    report.raw[f"{what}: commands per second"] = told
    report.raw[f"{what}: failed"] = dict(failed)
    for name, values in told.items():
        remark = spread(values)
        if failed[name]:
            remark += f"; {failed[name]} of {of} failed"
        report.add(f"{what}: {name}", p50(values), "commands/s", remark=remark)
    for ours in (OURS, CHANNEL):
        if ours in told:
            required = ours == OURS and what.startswith("one")
            report.add(f"{what}: {ours}, failed", failed[ours], "", 0 if required else None)
            if "asyncssh" in told:
                value = ratio(told[ours], told["asyncssh"])
                report.add(f"{what}: {ours} / asyncssh", value, "x", TARGET if required else None, least=True)
