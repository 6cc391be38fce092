"""The text that starts a command, as each kind of login shell gets it."""

import subprocess

import pytest

from pool.backends.shell import ShellCommand

SHELLS = [["/bin/sh"], ["bash"], ["dash"], ["bash", "--posix"]]


@pytest.mark.parametrize("login_shell", ["sh", "bash", "fish", ""])
@pytest.mark.parametrize("program", SHELLS, ids=" ".join)
@pytest.mark.parametrize("env", [{}, {"A": "x y'z"}], ids=["arguments", "setup"])
def test_a_command_runs_the_same_whatever_its_login_shell_is(login_shell, program, env, tmp_path):
    """A Bourne shell runs the script itself, any other one starts /bin/sh for it; what comes out is the same."""
    shell = ShellCommand('printf \'%s|\' "$A" "$0" "$#" "$PWD"; exit 7', [str(tmp_path), str(tmp_path)], env)
    line = shell.line(login_shell)
    assert line.startswith("set -- ") == (login_shell in ("sh", "bash"))
    done = subprocess.Popen(
        [*program, "-c", line],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    with done:
        done.stdin.write(shell.setup)
        done.stdin.flush()
        assert done.stdout.read().decode() == f"{env.get('A', '')}|/bin/sh|0|{tmp_path}|"
        assert done.stderr.read() == b""
    assert done.returncode == 7


def test_no_variable_of_the_script_reaches_the_command(tmp_path):
    """The command's environment is the caller's, and its own shell starts fresh."""
    shell = ShellCommand("env; set", [str(tmp_path)], {})
    with subprocess.Popen(shell.argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as done:
        assert b"_pool" not in done.stdout.read()
