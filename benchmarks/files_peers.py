"""Reading and writing files of 1 KB and 10 MB over an open connection; 1 KB also at 20 ms round trip time."""

import os
from collections.abc import Callable, Mapping
from functools import partial

from benchmarks.delay_proxy import delayed
from benchmarks.exec_peers import CHANNEL, OURS, beside, tell_missing
from benchmarks.harness import Report, interleaved, p50, ratio, remote_folder, scratch, spread, ssh_server
from benchmarks.peers import ALL, Peer, Target, opened, target_of

RTT = 20  # ms
SIZES = {"1 KB": 1_000, "10 MB": 10_000_000}
TIME_TARGET = 0.5  # 1 KB: ours / asyncssh
RATE_TARGET = 0.9  # 10 MB: bytes per second, ours / asyncssh

Told = dict[str, dict[str, list[float]]]
"""ms, by what is done and by peer."""


def measure(*, quick: bool) -> Report:
    report = Report("files_peers", "read and write a file over SSH, from a thread; loopback")
    with scratch() as folder, ssh_server(folder) as (which, info):
        report.title += f", {which}"
        target = target_of(info, remote_folder(folder))
        with opened(ALL, target, partial(tell_missing, report)) as peers:
            told, failed = _times(peers, target, "1 KB", 5 if quick else 100)
            big, failed_big = _times(peers, target, "10 MB", 3 if quick else 20)
        with delayed(RTT) as way, opened(ALL, target.through(way, folder), lambda _name, _why: None) as peers:
            far, _failed = _times(peers, target, "1 KB", 3 if quick else 30)
    report.raw["ms"] = {**told, **big, **{f"{what} at {RTT} ms": times for what, times in far.items()}}
    _add(report, told, failed)
    _add(report, big, failed_big)
    for what, times in far.items():
        for name, values in times.items():
            report.add(
                f"{what} at {RTT} ms: {name}", p50(values), "ms", remark=f"{beside(times, name)}{spread(values)}"
            )
    _compare(report, {**told, **big})
    report.notes.append(
        "Ours writes beside the file and renames: readers see the old content or the new one. The others write "
        "into it. "
        "parallel-ssh copies from and to files of this machine (in memory); ControlMaster is `cat` over ssh."
    )
    return report


def _times(peers: Mapping[str, Peer], target: Target, size: str, rounds: int) -> tuple[Told, dict[str, str]]:
    """Write, then read, by each in turn; and why it could not be done, by what and peer."""
    data = os.urandom(SIZES[size])
    failed: dict[str, str] = {}
    contestants: dict[str, Callable[[], float]] = {}
    for number, (name, peer) in enumerate(peers.items()):
        path = f"{target.folder}/file-{number}"
        able: dict[str, Callable[[], float]] = {
            f"write {size}": partial(peer.time_write, path, data),
            f"read {size}": partial(peer.time_read, path),
        }
        for what, call in able.items():
            try:
                call()
                contestants[f"{what}: {name}"] = call
            except Exception as error:
                failed[f"{what}: {name}"] = f"{type(error).__name__}: {str(error)[:60]}"
        if f"read {size}: {name}" in contestants and peer.read(path) != data:
            failed[f"read {size}: {name}"] = "returned something else than was written"
    told: Told = {f"write {size}": {}, f"read {size}": {}}
    for both, values in interleaved(contestants, rounds).items():
        what, name = both.split(": ", 1)
        told[what][name] = values
    return told, failed


def _add(report: Report, told: Told, failed: Mapping[str, str]) -> None:
    for what, times in told.items():
        for name, values in times.items():
            report.add(f"{what}: {name}", p50(values), "ms", remark=f"{beside(times, name)}{spread(values)}")
        for both, why in failed.items():
            if both.startswith(what):
                report.add(both, None, "", remark=why)


def _compare(report: Report, told: Told) -> None:
    for what, times in told.items():
        for ours in (OURS, CHANNEL):
            if ours not in times or "asyncssh" not in times:
                continue
            if what.endswith("1 KB"):
                required = TIME_TARGET if ours == OURS else None
                report.add(f"{what}: {ours} / asyncssh, time", ratio(times[ours], times["asyncssh"]), "x", required)
            else:
                required = RATE_TARGET if ours == OURS else None
                value = ratio(times["asyncssh"], times[ours])
                report.add(f"{what}: {ours} / asyncssh, bytes per second", value, "x", required, least=True)
