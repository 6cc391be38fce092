"""The life of a shard at a node is the table, and nothing else."""

import pytest

from pool.sharding.handoff import MAY_RUN, TRANSITIONS, IllegalTransition, Tenancy

STEPS = [(state, event, after) for state, events in TRANSITIONS.items() for event, after in events.items()]
EVENTS = sorted({event for _, event, _ in STEPS})


def tenancy(state):
    """One in *state*, since second 0."""
    its = Tenancy(7, 100, 0.0)
    its.state = state
    return its


@pytest.mark.parametrize(("state", "event", "after"), STEPS)
def test_a_step_of_the_table_is_taken(state, event, after):
    """The state follows, and its beginning and the event are remembered."""
    its = tenancy(state)
    assert its.expects(event)
    its.apply(event, 5.0)
    assert (its.state, its.since, list(its.history)) == (after, 5.0, [event])


@pytest.mark.parametrize("state", TRANSITIONS)
def test_a_step_that_is_not_in_the_table_is_a_bug_and_shows_the_history(state):
    """Nothing changes, and the message has the shard, its epoch and what came before."""
    for event in set(EVENTS) - TRANSITIONS[state].keys():
        its = tenancy(state)
        its.history.extend(["restored", "move"])
        assert not its.expects(event)
        with pytest.raises(IllegalTransition, match=r"shard 7 epoch 100.*before: restored move"):
            its.apply(event, 5.0)
        assert (its.state, its.since) == (state, 0.0)


def test_the_way_out_of_a_living_node():
    """Stop, drain, close, release: in this order, whether or not the work ends in time."""
    for end in ("idle", "overdue"):
        its = Tenancy(7, 100, 0.0)
        states = []
        for event in ("restored", "move", "stopped", end, "closed", "released"):
            its.apply(event, 1.0)
            states.append(its.state)
        assert states == ["serving", "stopping", "draining", "closing", "releasing", "gone"]


def test_a_lease_can_be_lost_in_every_state_before_its_release():
    """Whatever was going on, everything under it ends; a release that is under way is nobody's loss."""
    assert {state for state, events in TRANSITIONS.items() if "lose" in events} == set(TRANSITIONS) - {
        "releasing",
        "losing",
        "gone",
    }


def test_tasks_run_only_between_restoring_and_closing():
    """Not before the dead are restored, not once the backends close, never under a lost lease."""
    assert MAY_RUN == {"serving", "stopping", "draining"}


def test_nothing_comes_after_the_end():
    """A shard that comes back begins a new tenancy."""
    assert TRANSITIONS["gone"] == {}
