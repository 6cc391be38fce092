"""``python -m tests.simulation --seeds 10000``, or ``--seed 17 --trace`` to see one of them."""

import argparse
import sys
import time
from collections import Counter
from multiprocessing import Pool

from tests.simulation.run import Result, simulate


def summary(job: tuple[int, bool]) -> tuple[int, tuple[str, ...], dict[str, list[str]], float]:
    seed, beyond = job
    try:
        result = simulate(seed, beyond=beyond)
    except Exception as error:
        return seed, (), {"crash": [f"{type(error).__name__}: {error}"]}, 0.0
    return seed, result.kinds, result.problems, result.overlap


def show(result: Result) -> None:
    print(f"seed {result.seed}: faults {' '.join(result.kinds)}")
    for kind, when, *rest in result.trace:
        print(f"{when:9.3f} {kind:8} {' '.join(map(str, rest))}")
    for name, problems in result.problems.items():
        print(name, *problems, sep="\n    ")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--seed", type=int, help="only this one")
    parser.add_argument("--trace", action="store_true", help="print what happened")
    parser.add_argument("--beyond", action="store_true", help="with faults under which exclusivity is not promised")
    parser.add_argument("--processes", type=int, default=None)
    arguments = parser.parse_args()
    if arguments.seed is not None:
        result = simulate(arguments.seed, beyond=arguments.beyond)
        if not arguments.trace:
            result.trace.clear()
        show(result)
        return bool(result.problems)
    return several(arguments)


def several(arguments: argparse.Namespace) -> int:
    jobs = [(seed, arguments.beyond) for seed in range(arguments.first, arguments.first + arguments.seeds)]
    started, failed, longest, overlapping = time.monotonic(), Counter(), 0.0, 0
    with Pool(arguments.processes) as workers:
        for seed, kinds, problems, overlap in workers.imap_unordered(summary, jobs, chunksize=20):
            longest = max(longest, overlap)
            overlapping += overlap > 0
            failed.update(problems.keys())
            if problems and sum(failed.values()) < 40:
                print(f"seed {seed} ({' '.join(kinds)})", *(f"{n}: {p[0]}" for n, p in problems.items()), sep="\n    ")
    took = time.monotonic() - started
    print(
        f"{len(jobs)} seeds in {took:.1f} s, {1000 * took / len(jobs):.1f} ms each; problems: {dict(failed) or 'none'}; ",
        end="",
    )
    print(f"a key executed twice at once in {overlapping} seeds, for {longest:.2f} s at most")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
