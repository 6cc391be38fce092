"""Borrowing a warm backend and giving it back: what every task pays."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from time import perf_counter
from typing import Any

from benchmarks.harness import Report, interleaved, p50, ratio, spread
from pool import BackendPoolManager, MemoryBackend

KEYS = [f"user-{n}" for n in range(100)]
THREADS = 8
TARGET = 3.0  # us for acquire + release


def measure(*, quick: bool) -> Report:
    loops, rounds = (20, 3) if quick else (100, 25)
    report = Report("hot_path", f"acquire + release of a warm backend, {len(KEYS)} keys in turn, one thread")
    pool = BackendPoolManager(MemoryBackend, max_backends=1000, enable_periodic_cleanup=False)
    floor = _floor()
    contestants: dict[str, Callable[[], float]] = {
        "floor": partial(_timed, floor, loops),
        "floor, 8 threads": partial(_contending, floor, loops),
        "ours": partial(_timed, partial(_ours, pool), loops),
        "ours, with": partial(_timed, partial(_ours_with, pool), loops),
        "ours, 8 threads": partial(_contending, partial(_ours, pool), loops),
    }
    try:
        for key in KEYS:
            pool.acquire_backend(key).release()
        with _agent_backend() as theirs:
            if theirs is None:
                report.notes.append("agent-backend is not installed (pip install 'celery-warm-pool[bench]').")
            else:
                other, loop = theirs
                hop = partial(_theirs_hopping, other, loop)
                contestants |= {
                    "theirs": partial(_theirs_timed, other, loop, loops),
                    "theirs, hop": partial(_timed, hop, max(1, loops // 10)),
                    "theirs, 8 threads": partial(_contending, hop, max(1, loops // 20)),
                }
            told = interleaved(contestants, rounds)
    finally:
        pool.destroy_all(0.0)
    report.raw["us"] = told
    report.add("pool.acquire_backend(key).release()", p50(told["ours"]), "us", TARGET, remark=spread(told["ours"]))
    report.add("with pool.backend(key)", p50(told["ours, with"]), "us")
    if "theirs" in told:
        where = "agent-backend BackendPoolManager"
        report.add(f"{where}, awaited inside its own loop", p50(told["theirs"]), "us")
        report.add(f"{where}, from a thread (as a task must)", p50(told["theirs, hop"]), "us")
        _compare(report, "ours / agent-backend inside its loop", ratio(told["ours"], told["theirs"]))
        _compare(report, "ours / agent-backend from a thread", ratio(told["ours"], told["theirs, hop"]))
    report.add("floor: lock + dict + counter, twice", p50(told["floor"]), "us")
    report.add("ours / floor", ratio(told["ours"], told["floor"]), "x")
    report.add(f"ours, {THREADS} threads at once: wall time / operations", p50(told["ours, 8 threads"]), "us")
    report.add(f"floor, {THREADS} threads at once", p50(told["floor, 8 threads"]), "us")
    if "theirs" in told:
        report.add(f"agent-backend, {THREADS} threads at once", p50(told["theirs, 8 threads"]), "us")
    report.notes.append(
        "agent-backend's pool has no lock and belongs to one event loop; it counts, ours also keeps the idle order,"
        " the state machine with its history, lifetimes and waiters."
    )
    return report


def _compare(report: Report, what: str, value: float) -> None:
    report.add(what, value, "x", remark="slower" if value > 1 else "faster")


def _timed(run: Callable[[str], Any], loops: int) -> float:
    """Microseconds for one call."""
    started = perf_counter()
    for _ in range(loops):
        for key in KEYS:
            run(key)
    return 1e6 * (perf_counter() - started) / (loops * len(KEYS))


def _ours(pool: BackendPoolManager[Any], key: str) -> None:
    pool.acquire_backend(key).release()


def _ours_with(pool: BackendPoolManager[Any], key: str) -> None:
    with pool.backend(key):
        pass


def _floor() -> Callable[[str], None]:
    """The least that any thread-safe pool does: find and count under a lock, count down under a lock."""
    lock = threading.Lock()
    entries = {(key, "default"): [0] for key in KEYS}

    def run(key: str) -> None:
        with lock:
            entry = entries[key, "default"]
            entry[0] += 1
        with lock:
            entry[0] -= 1

    return run


def _contending(run: Callable[[str], Any], loops: int) -> float:
    """Microseconds of wall time for one call, with all threads at it."""
    barrier = threading.Barrier(THREADS + 1)

    def work() -> None:
        barrier.wait()
        for _ in range(loops):
            for key in KEYS:
                run(key)
        barrier.wait()

    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    barrier.wait()
    started = perf_counter()
    barrier.wait()
    taken = perf_counter() - started
    for thread in threads:
        thread.join()
    return 1e6 * taken / (loops * len(KEYS) * THREADS)


@contextmanager
def _agent_backend() -> Any:
    """agent-backend's pool with every key warm, and its running loop; None if it is not installed."""
    try:
        from agent_backend.backends.memory import MemoryBackend as TheirMemory
        from agent_backend.pool import BackendPoolManager as TheirPool
        from agent_backend.pool import PoolManagerConfig
    except ImportError:
        yield None
        return
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    pool = TheirPool(PoolManagerConfig(backend_factory=TheirMemory))
    try:
        for key in KEYS:
            _theirs_hopping(pool, loop, key)
        yield pool, loop
    finally:
        asyncio.run_coroutine_threadsafe(pool.destroy_all(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(5)
        loop.close()


async def _theirs(pool: Any, key: str) -> None:
    _, release = await pool.acquire_backend(key)
    release()


def _theirs_hopping(pool: Any, loop: asyncio.AbstractEventLoop, key: str) -> None:
    asyncio.run_coroutine_threadsafe(_theirs(pool, key), loop).result()


def _theirs_timed(pool: Any, loop: asyncio.AbstractEventLoop, loops: int) -> float:
    async def run() -> float:
        started = perf_counter()
        for _ in range(loops):
            for key in KEYS:
                await _theirs(pool, key)
        return 1e6 * (perf_counter() - started) / (loops * len(KEYS))

    return asyncio.run_coroutine_threadsafe(run(), loop).result()
