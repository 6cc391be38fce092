"""How long commands that will not go live on after their timeout, or a cancel, with all that they started."""

import asyncio
from pathlib import Path
from time import perf_counter

import psutil

from benchmarks.harness import Report, interleaved, p50, p99, remote_folder, scratch, spread, ssh_server
from pool import CommandTimeout, RemoteFilesystemBackend
from pool.runtime import loop_thread

# Four processes, all deaf to TERM: a command, its child, a grandchild, and one in a session of its own.
DEAF = """
trap '' TERM; echo $$ >> pids
sh -c 'trap "" TERM; echo $$ >> pids; sh -c "echo \\$\\$ >> pids; while :; do sleep 1; done" & wait' &
setsid sh -c 'echo $$ >> pids; while :; do sleep 1; done' &
wait"""
PROCESSES = 4
TIMEOUT = 0.5  # seconds in which they must have started
TARGET = 200.0  # ms until the last one is gone


def measure(*, quick: bool) -> Report:
    rounds = 5 if quick else 100
    with scratch() as folder, ssh_server(folder) as (which, info):
        report = Report("command_ends", f"{PROCESSES} processes that ignore TERM; loopback, {which}")
        backend = RemoteFilesystemBackend(
            "127.0.0.1",
            port=info.port,
            username=info.username,
            client_keys=str(info.client_key),
            known_hosts=str(info.known_hosts),
            root_dir=remote_folder(folder),
            exec_mode="helper",
        )
        pids = Pids(info.home / remote_folder(folder) / "pids")
        try:
            backend.exec("true")
            told = interleaved(
                {"timeout": lambda: _timed_out(backend, pids), "cancel": lambda: _cancelled(backend, pids)}, rounds
            )
        finally:
            backend.destroy()
    report.raw["ms"] = told
    for name, values in told.items():
        report.add(f"{name}: until the last process is gone, p50", p50(values), "ms", remark=spread(values))
        report.add(f"{name}: ... p99", p99(values), "ms")
        report.add(f"{name}: ... the slowest", max(values), "ms", TARGET)
    report.add("processes that were left", pids.left, "", 0)
    report.notes.append(
        "TERM comes first, and KILL 100 ms later. The call returns when all of them are gone, and not before."
    )
    return report


class Pids:
    """The processes of one command, which write themselves down in a file; ``left`` counts those that outlived it."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.left = 0

    def found(self) -> list[int]:
        return [int(line) for line in self._file.read_text().split()] if self._file.exists() else []

    def check(self) -> None:
        """Count who is still there. Raises `RuntimeError` when not all had started: nothing was measured."""
        found = self.found()
        if len(found) < PROCESSES:
            raise RuntimeError(f"{len(found)} of {PROCESSES} processes had started: a slow machine")
        self.left += sum(psutil.pid_exists(pid) for pid in found)
        self._file.unlink()


def _timed_out(backend: RemoteFilesystemBackend, pids: Pids) -> float:
    started = perf_counter()
    try:
        backend.exec(DEAF, timeout=TIMEOUT)
    except CommandTimeout:
        ended = perf_counter()
    pids.check()
    return 1e3 * (ended - started - TIMEOUT)


def _cancelled(backend: RemoteFilesystemBackend, pids: Pids) -> float:
    async def cancelled() -> float:
        command = asyncio.ensure_future(backend.aexec(DEAF))
        while len(pids.found()) < PROCESSES:
            await asyncio.sleep(0.01)
        started = perf_counter()
        command.cancel()
        await asyncio.wait({command})
        return 1e3 * (perf_counter() - started)

    took = loop_thread().run(cancelled())
    pids.check()
    return took
