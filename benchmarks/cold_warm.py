"""The first command of a key, which connects, against the next ones."""

from collections.abc import Callable
from functools import partial
from itertools import count
from time import perf_counter
from typing import Any

from benchmarks.harness import Report, interleaved, p50, ratio, remote_folder, scratch, spread, ssh_server
from pool import BackendPoolManager, LocalFilesystemBackend, RemoteFilesystemBackend

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
        pools = {
            "local": BackendPoolManager(LocalFilesystemBackend, local),
            f"ssh ({which})": BackendPoolManager(RemoteFilesystemBackend, remote),
        }
        contestants: dict[str, Callable[[], float]] = {}
        for name, pool in pools.items():
            contestants[f"{name}: cold"] = partial(_cold, pool)
            contestants[f"{name}: warm"] = partial(_warm, pool)
        try:
            interleaved(contestants, 1)
            told = interleaved(contestants, rounds)
        finally:
            for pool in pools.values():
                pool.destroy_all(0.0)
    report.raw["ms"] = told
    for name, values in told.items():
        report.add(name, p50(values), "ms", remark=spread(values))
    for name in pools:
        report.add(f"{name}: cold / warm", ratio(told[f"{name}: cold"], told[f"{name}: warm"]), "x")
    return report


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
