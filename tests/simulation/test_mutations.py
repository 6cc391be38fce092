"""The simulation finds bugs: each of these is put in on purpose, and found."""

import pytest

from tests.simulation.mutations import MUTATIONS, mutated
from tests.simulation.run import simulate


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_bug_is_found_by_its_checker(name):
    """Within the seeds that it is given; without the bug, the seed that found it passes."""
    bug = MUTATIONS[name]
    with mutated(name):
        found = next((s for s in range(bug.seeds) if bug.caught_by in simulate(s, kinds=bug.kinds).problems), None)
    assert found is not None, f"{bug.caught_by} did not find it in {bug.seeds} seeds"
    assert bug.caught_by not in simulate(found, kinds=bug.kinds).problems
