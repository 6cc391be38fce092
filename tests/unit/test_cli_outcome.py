"""What a shell is told of a task's end."""

import pytest

from pool import CommandFailed, CommandTimeout, FileMissing
from pool.cli.outcome import Outcome


@pytest.mark.parametrize(
    ("state", "result", "code"),
    [
        ("SUCCESS", {"exit_code": 0}, 0),
        ("SUCCESS", {"exit_code": 7}, 7),
        ("SUCCESS", None, 0),
        ("FAILURE", CommandFailed("exit code 3", 3), 3),
        ("FAILURE", CommandFailed("killed", -9), 137),
        ("FAILURE", CommandFailed("exit code 256", 256), 255),
        ("FAILURE", CommandFailed("odd", 0), 1),
        ("FAILURE", CommandTimeout("killed after 1 s", 1.0), 124),
        ("FAILURE", FileMissing("no such folder", 2, "x"), 1),
        ("REVOKED", Exception("cancelled"), 130),
    ],
)
def test_the_exit_code_tells_how_it_ended(state, result, code):
    """As of the command itself, of ``timeout``, of an interrupted program."""
    assert Outcome(state, result).exit_code == code


def test_an_error_names_its_kind_unless_it_is_the_commands_own():
    """The message of a command that failed says all."""
    assert Outcome("FAILURE", CommandFailed("exit code 3", 3)).error == "exit code 3"
    assert Outcome("FAILURE", FileMissing("no such folder", 2, "x")).error == "FileMissing: no such folder"
    assert Outcome("SUCCESS", {"exit_code": 0}).error == ""
