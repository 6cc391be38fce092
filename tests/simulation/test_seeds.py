"""Some hundred seeds in every test run; `python -m tests.simulation --seeds 10000` runs more, ``--seed N --trace`` shows one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.simulation.run import TERMS, simulate

CHUNK = 50
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("first", range(0, 300, CHUNK))
def test_every_promise_is_kept_under_ordinary_faults(first):
    """One owner, one process, order, growing epochs, nothing lost, owned again, drains that end."""
    for seed in range(first, first + CHUNK):
        result = simulate(seed)
        assert not result.problems, f"python -m tests.simulation --seed {seed} --trace: {result.problems}"


def test_nothing_is_lost_under_the_faults_beyond():
    """A flushed store, a clock that jumps, wild drift: tasks are done and shards owned again all the same."""
    for seed in range(60):
        result = simulate(seed, beyond=True)
        assert not result.problems, f"python -m tests.simulation --seed {seed} --beyond --trace: {result.problems}"


@pytest.mark.parametrize(
    ("kinds", "seeds"),
    [(("flush", "cut_store", "crash"), 150), (("wild_drift", "cut_store"), 200)],
    ids=["flush", "drift"],
)
def test_a_key_can_be_executed_twice_where_that_is_said_and_only_for_a_while(kinds, seeds):
    """The limits of the promise are real: some seeds show an overlap, none a longer one than a TTL."""
    longest = max(simulate(seed, kinds=kinds).overlap for seed in range(seeds))
    assert 0 < longest < TERMS.ttl


def test_a_seed_says_everything():
    """The same seed gives the same trace, in another process with other hashes too."""
    code = "from tests.simulation.run import simulate; print(*(hash(str(simulate(s).trace)) for s in range(5)))"
    code = code.replace("hash(", "__import__('zlib').crc32(").replace(".trace)", ".trace).encode()")
    seen = {
        subprocess.check_output(
            [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": ".", "PYTHONHASHSEED": salt}
        )
        for salt in ("1", "2")
    }
    assert len(seen) == 1
