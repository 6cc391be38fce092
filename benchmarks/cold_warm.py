"""The first command of a key, which connects, against the next ones."""

import subprocess
from collections.abc import Callable
from functools import partial
from itertools import count
from time import perf_counter
from typing import Any

import asyncssh

from benchmarks.harness import Report, interleaved, p50, ratio, remote_folder, scratch, spread, ssh_server
from pool import BackendPoolManager, LocalFilesystemBackend, RemoteFilesystemBackend
from pool.runtime import loop_thread

_keys = count()


def measure(*, quick: bool) -> Report:
    rounds = 3 if quick else 25
    report = Report("cold_warm", "acquire, exec of `true`, release; from a thread, no Celery")
    with scratch() as folder, ssh_server(folder) as (which, info):
        local = {"root_dir": str(folder / "work")}
        remote = {
            "host": "127.0.0.1",
            "port": info.port,
            "username": info.username,
            "client_keys": str(info.client_key),
            "known_hosts": str(info.known_hosts),
            "root_dir": remote_folder(folder),
        }
        pools: dict[str, BackendPoolManager[Any]] = {
            "local": BackendPoolManager(LocalFilesystemBackend, local),
            f"ssh ({which})": BackendPoolManager(RemoteFilesystemBackend, remote),
        }
        contestants: dict[str, Callable[[], float]] = {}
        for name, pool in pools.items():
            contestants[f"{name}: cold"] = partial(_cold, pool)
            contestants[f"{name}: warm"] = partial(_warm, pool)
        bare = _Bare(remote)
        contestants["asyncssh alone: warm, conn.run"] = bare.run
        contestants["subprocess alone: sh -c true"] = _subprocess
        try:
            interleaved(contestants, 1)
            told = interleaved(contestants, rounds)
        finally:
            bare.close()
            for pool in pools.values():
                pool.destroy_all(0.0)
    report.raw["ms"] = told
    for name, values in told.items():
        report.add(name, p50(values), "ms", remark=spread(values))
    warm = told[f"ssh ({which}): warm"]
    report.add("ssh warm / asyncssh alone", ratio(warm, told["asyncssh alone: warm, conn.run"]), "x")
    for name in pools:
        report.add(f"{name}: cold / warm", ratio(told[f"{name}: cold"], told[f"{name}: warm"]), "x")
    report.notes.append(
        "exec is supervised: a shell of ours kills the command's process group when the worker goes away."
    )
    return report


class _Bare:
    """One asyncssh connection, used from a thread as the pool is."""

    def __init__(self, config: dict[str, Any]) -> None:
        options = {name: config[name] for name in ("host", "port", "username", "known_hosts")}
        options |= {"client_keys": [config["client_keys"]], "config": None, "agent_path": None}
        self._connection = loop_thread().run(self._connect(options))

    @staticmethod
    async def _connect(options: dict[str, Any]) -> asyncssh.SSHClientConnection:
        return await asyncssh.connect(**options)

    async def _true(self) -> None:
        result = await self._connection.run("true")
        assert result.exit_status == 0

    def _once(self) -> float:
        started = perf_counter()
        loop_thread().run(self._true())
        return 1e3 * (perf_counter() - started)

    def run(self) -> float:
        return p50([self._once() for _ in range(5)])

    def close(self) -> None:
        loop_thread().loop.call_soon_threadsafe(self._connection.close)


def _subprocess() -> float:
    taken = []
    for _ in range(5):
        started = perf_counter()
        subprocess.run(["/bin/sh", "-c", "true"], check=True)
        taken.append(1e3 * (perf_counter() - started))
    return p50(taken)


def _once(pool: BackendPoolManager[Any], key: str) -> float:
    started = perf_counter()
    with pool.backend(key) as backend:
        backend.exec("true")
    return 1e3 * (perf_counter() - started)


def _cold(pool: BackendPoolManager[Any]) -> float:
    """A key that nobody used; closed afterwards, which is not counted."""
    key = f"cold-{next(_keys)}"
    taken = _once(pool, key)
    pool.close_key(key)
    return taken


def _warm(pool: BackendPoolManager[Any]) -> float:
    return p50([_once(pool, "warm") for _ in range(5)])
