"""Schedules of the deterministic simulation (`tests/simulation`): how many, how long each, how many broke a promise."""

from multiprocessing import Pool
from time import perf_counter

from benchmarks.harness import Report
from tests.simulation.__main__ import summary


def measure(*, quick: bool) -> Report:
    seeds = 200 if quick else 10_000
    report = Report(
        "simulation", "crashes, pauses, partitions and a store that forgets, some 60 virtual seconds a seed"
    )
    started = perf_counter()
    with Pool() as workers:
        told = list(workers.imap_unordered(summary, [(seed, False) for seed in range(seeds)], chunksize=20))
    took = perf_counter() - started
    broken = sorted(seed for seed, _kinds, problems, _overlap in told if problems)
    report.add("seeds", len(told), "schedules", None if quick else 10_000, least=True)
    report.add("seeds that broke a promise", len(broken), "schedules", 0.0, remark=" ".join(map(str, broken[:5])))
    report.add("one seed", 1000 * took / seeds, "ms", remark=f"{took:.0f} s in all, on all cores")
    report.raw["broken"] = broken
    return report
