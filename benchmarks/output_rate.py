"""How fast 100 MB of output arrive from one command."""

from collections.abc import Callable
from functools import partial

from benchmarks.exec_peers import CHANNEL, OURS, tell_missing
from benchmarks.harness import Report, interleaved, p50, ratio, remote_folder, scratch, spread, ssh_server
from benchmarks.peers import ALL, opened, target_of
from benchmarks.peers.on_asyncssh import Asyncssh
from pool.runtime import loop_thread

MEGABYTES = 100
LINE = "cc -O2 -Wall -c -o build/objects/some/module/of/the/program.o src/some/module/of/it.c"
TARGET = 0.9  # ours / asyncssh


def measure(*, quick: bool) -> Report:
    rounds, megabytes = (2, 20) if quick else (8, MEGABYTES)
    command = f"yes '{LINE}' | head -c {megabytes}000000"
    report = Report("output_rate", f"{megabytes} MB from one command; loopback")
    with scratch() as folder, ssh_server(folder) as (which, info):
        report.title += f", {which}"
        target = target_of(info, remote_folder(folder))
        with opened((*ALL, Streamed), target, partial(tell_missing, report)) as peers:
            contestants: dict[str, Callable[[], float]] = {}
            for name, peer in peers.items():
                try:
                    peer.time_run(command)
                except Exception as error:
                    report.add(name, None, "", remark=f"{type(error).__name__}: {str(error)[:80]}")
                else:
                    contestants[name] = partial(peer.time_run, command)
            told = interleaved(contestants, rounds)
    report.raw |= {"ms": told, "megabytes": megabytes}
    for name, values in told.items():
        rates = [1e3 * megabytes / value for value in values]
        report.add(name, p50(rates), "MB/s", remark=spread(rates))
    for ours in (OURS, CHANNEL):
        for name in ("asyncssh", Streamed.name):
            if ours in told and name in told:
                required = TARGET if ours == OURS else None
                report.add(f"{ours} / {name}", ratio(told[name], told[ours]), "x", required, least=True)
    report.notes.append(
        "Ours keeps the first and the last half MB, as a task does; the others, but for the one that reads in pieces, "
        "take all of it into memory; parallel-ssh gives it out line by line only. Which cipher is used is what client "
        "and server agree on by themselves."
    )
    return report


class Streamed(Asyncssh):
    """asyncssh again, reading piece by piece and forgetting: what it can do when nothing is kept."""

    name = "asyncssh, in pieces"

    def run(self, command: str) -> int:
        return loop_thread().run(self._run(command))

    async def _run(self, command: str) -> int:
        process = await self.connection.create_process(command, encoding=None)
        while await process.stdout.read(1 << 16):
            pass
        code = (await process.wait()).exit_status
        return -1 if code is None else code
