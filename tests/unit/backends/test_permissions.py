"""What an agent may do: how a policy is read, and what it answers."""

import pytest

from pool.backends.permissions import KINDS, Policy
from pool.errors import ConfigError

ALL = [("1", "allow_always"), ("2", "allow_once"), ("3", "reject_always"), ("4", "reject_once")]


@pytest.mark.parametrize("kind", [*KINDS, None, "invented"])
@pytest.mark.parametrize("answer", ["deny", "allow"])
def test_one_word_is_the_answer_to_everything(kind, answer):
    """Also to kinds that a later protocol invents, and to calls that name none."""
    assert Policy.parse(answer).answer(kind) == answer


def test_a_table_names_kinds_and_a_default():
    """A call that names no kind is an ``other``."""
    policy = Policy.parse({"default": "allow", "execute": "deny", "other": "deny"})
    assert [policy.answer(kind) for kind in ("read", "execute", "other", None)] == ["allow", "deny", "deny", "deny"]


def test_what_no_table_names_is_denied():
    """A default that is left out is no."""
    policy = Policy.parse({"read": "allow"})
    assert [policy.answer(kind) for kind in ("read", "edit", None)] == ["allow", "deny", "deny"]
    assert Policy.parse({}).answer("read") == "deny"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("maybe", "default='maybe': must be 'deny' or 'allow'"),
        (None, "permissions=None: must be 'deny', 'allow' or a table of kinds"),
        (["read"], "must be 'deny', 'allow' or a table of kinds"),
        ({"exec": "allow"}, "unknown kind 'exec': known are default, read, edit"),
        ({"read": True}, "read=True: must be 'deny' or 'allow'"),
        ({"read": "ask"}, "read='ask': must be 'deny' or 'allow'"),
    ],
)
def test_what_is_no_policy_is_refused(given, told):
    """The error names the field, its value and the rule."""
    with pytest.raises(ConfigError) as caught:
        Policy.parse(given)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("answer", "options", "chosen"),
    [
        ("allow", ALL, "2"),
        ("allow", ALL[:1], "1"),
        ("allow", ALL[2:], None),
        ("deny", ALL, "4"),
        ("deny", ALL[:3], "3"),
        ("deny", ALL[:2], None),
        ("deny", [], None),
        ("allow", [("5", "something_new")], None),
    ],
)
def test_once_is_chosen_rather_than_always(answer, options, chosen):
    """So that the policy is asked each time; an option of the other kind is never taken."""
    assert Policy.parse(answer).choose("read", options) == chosen
