"""One maintenance pass over very many idle backends."""

import asyncio
from collections.abc import Callable
from time import monotonic, perf_counter
from typing import Any

from benchmarks.harness import Report, interleaved, p50, ratio, spread
from pool import BackendPoolManager, MemoryBackend
from pool.backends.base import BackendStatus
from pool.entry import Effects
from pool.runtime import loop_thread

IDLE = 100_000
DUE = 1_000
BATCH = 20  # sweeps in a row
TARGET = 100.0  # us for a sweep that finds nothing to do


def measure(*, quick: bool) -> Report:
    rounds, evictions = (3, 2) if quick else (15, 10)
    report = Report("sweep", f"{IDLE:,} idle backends")
    pool = _full_pool()
    theirs = asyncio.run(_their_full_pool())
    loop = asyncio.new_event_loop()
    try:
        first: list[float] = []
        contestants: dict[str, Callable[[], float]] = {
            "ours": lambda: _batch(lambda: _us(pool.sweep), first),
            "decision": lambda: _batch(lambda: _us(lambda: pool._life.sweep(monotonic(), []))),
            "reaper": lambda: loop_thread().run(_reaping(pool)),
        }
        if theirs is not None:
            contestants["theirs"] = lambda: _batch(lambda: loop.run_until_complete(_their_sweep(theirs)))
        told = interleaved(contestants, rounds)
        evicting: dict[str, Callable[[], float]] = {"ours": lambda: _ours_evicting(pool)}
        if theirs is not None:
            evicting["theirs"] = lambda: loop.run_until_complete(_their_sweep(theirs, due=DUE))
        evicted = interleaved(evicting, evictions)
    finally:
        loop.close()
        _drop(pool)
    report.raw["us"] = {"none due": told, "none due, first of a turn": first, f"{DUE} due": evicted}
    report.add("none due: BackendPoolManager.sweep(), as called", p50(told["ours"]), "us", TARGET,
               remark=spread(told["ours"]))  # fmt: skip
    report.add("none due: the first sweep of each turn (cold caches)", p50(first), "us")
    report.add("none due: as the pool's own reaper does it, on the loop", p50(told["reaper"]), "us", TARGET)
    report.add("none due: the decision alone, Lifecycle.sweep()", p50(told["decision"]), "us")
    if theirs is not None:
        report.add("none due: agent-backend's sweep, in its own loop", p50(told["theirs"]), "us")
        report.add("agent-backend / ours, both in their loop", ratio(told["theirs"], told["reaper"]), "x")
        report.add("agent-backend / ours as called from a thread", ratio(told["theirs"], told["ours"]), "x")
    report.add(f"{DUE:,} due, closes included: ours", p50(evicted["ours"]) / 1e3, "ms")
    if theirs is not None:
        report.add(f"{DUE:,} due, closes included: agent-backend", p50(evicted["theirs"]) / 1e3, "ms")
        report.add("agent-backend / ours", ratio(evicted["theirs"], evicted["ours"]), "x")
    report.notes.append(f"Each turn is {BATCH} sweeps in a row, of which the median counts.")
    report.notes.append(
        "Memory backends on both sides: closing one costs nothing but the pool's own work. Ours closes side by side,"
        " each within close_timeout, theirs one after the other without a limit."
    )
    return report


def _batch(run: Callable[[], float], first: list[float] | None = None) -> float:
    """The median of some sweeps in a row: the one right after another contestant's turn finds cold caches."""
    taken = [run() for _ in range(BATCH)]
    if first is not None:
        first.append(taken[0])
    return p50(taken)


async def _reaping(pool: BackendPoolManager[MemoryBackend]) -> float:
    taken = []
    for _ in range(BATCH):
        started = perf_counter()
        await pool.asweep()
        taken.append(1e6 * (perf_counter() - started))
    return p50(taken)


def _us(run: Callable[[], Any]) -> float:
    started = perf_counter()
    run()
    return 1e6 * (perf_counter() - started)


def _connected(root: str = "/") -> MemoryBackend:
    backend = MemoryBackend(root)
    backend._status = BackendStatus.CONNECTED  # 100,000 turns of the event loop would prove nothing here
    return backend


def _full_pool() -> BackendPoolManager[MemoryBackend]:
    pool = BackendPoolManager(MemoryBackend, max_backends=2 * IDLE, idle_timeout=3600, enable_periodic_cleanup=False)
    for number in range(IDLE):
        pool.register(f"user-{number}", "default", _connected())
    return pool


def _ours_evicting(pool: BackendPoolManager[MemoryBackend]) -> float:
    """Evict the 1,000 oldest, then fill up."""
    idle = iter(pool._life.idle)
    oldest = [next(idle) for _ in range(DUE)]
    now = oldest[-1].idle_since + pool._life.config.idle_timeout
    evicted: list[Any] = []
    taken = _us(lambda: evicted.extend(pool.sweep(now)))
    assert 0.9 * DUE < len(evicted) < 1.1 * DUE, len(evicted)
    for primary, agent in evicted:
        pool.register(primary, agent, _connected())
    return taken * DUE / len(evicted)


def _drop(pool: BackendPoolManager[MemoryBackend]) -> None:
    """Close the pool without waiting for 100,000 closes."""
    effects: Effects = []
    pool._life.shutdown(monotonic(), effects)


async def _their_full_pool() -> Any:
    try:
        from agent_backend.backends.memory import MemoryBackend as TheirMemory
        from agent_backend.pool import BackendPoolManager as TheirPool
        from agent_backend.pool import PoolManagerConfig
    except ImportError:
        return None
    pool = TheirPool(PoolManagerConfig(backend_factory=TheirMemory, idle_timeout_ms=3_600_000))
    for number in range(IDLE):
        _, release = await pool.acquire_backend(f"user-{number}")
        release()
    return pool


async def _their_sweep(pool: Any, due: int = 0) -> float:
    old = list(pool._backends)[:due]
    for key in old:
        pool._backends[key].last_used -= 1e6
    started = perf_counter()
    await pool._cleanup_idle_backends()
    taken = 1e6 * (perf_counter() - started)
    for key in old:
        _, release = await pool.acquire_backend(key)
        release()
    return taken
