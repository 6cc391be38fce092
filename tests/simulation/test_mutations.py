"""The simulation finds bugs: each of these is put in on purpose, and found."""

import pytest

from tests.simulation.mutations import MUTATIONS, mutated
from tests.simulation.run import simulate


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_bug_is_found_by_its_checker(name):
    """Within the seeds that it is given; without the bug, the seed that found it passes."""
    bug = MUTATIONS[name]

    def finds(seed):
        return bug.caught_by in simulate(seed, kinds=bug.kinds, grace=bug.grace).problems

    with mutated(name):
        found = next((seed for seed in range(bug.seeds) if finds(seed)), None)
    assert found is not None, f"{bug.caught_by} did not find it in {bug.seeds} seeds"
    assert not finds(found)
