"""The command group without any node: usage, errors, and what it costs those who do not use it."""

import contextlib
import json
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
from celery import Celery
from celery.bin.base import CLIContext
from click import Group
from click.shell_completion import BashComplete
from click.testing import CliRunner

import tasks.builds  # noqa: F401 - a shared task: every app knows it
from pool import Settings, install
from pool.cli import cancel as cancelling
from pool.cli import pool
from pool.cli.nodes import Replies

COMMANDS = "status top backends explain run logs cancel close sweep drain undrain doctor".split()
GONE = "redis://:canary-password@127.0.0.1:1/0"


def app_of(url):
    app = Celery("cli-test", broker=url, backend=url, set_as_current=False)
    app.conf.update(task_serializer="json", accept_content=["json"])
    install(app, Settings(broker_url=url, result_url=url))
    return app


def invoke(app, *arguments):
    return CliRunner().invoke(pool, arguments, obj=CLIContext(app, no_color=False, workdir=None))


@pytest.fixture
def silent():
    """The URL of a server that takes connections and never says a word."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        yield f"redis://:canary-password@127.0.0.1:{server.getsockname()[1]}/0"


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_explains_itself(name):
    """In words, with --json."""
    found = invoke(None, name, "--help")
    assert found.exit_code == 0
    assert "--json" in found.output
    assert len(pool.get_command(None, name).get_short_help_str(limit=200)) < 60


def test_help_lists_every_command():
    """In the order of use."""
    output = invoke(None, "--help").output
    places = [output.index(f"\n  {name} ") for name in COMMANDS]
    assert places == sorted(places)


def test_a_command_that_is_not_there_is_refused():
    """With what there is."""
    found = invoke(app_of(GONE), "stat")
    assert found.exit_code == 2
    assert "There are: status, top" in found.output


@pytest.mark.parametrize(
    "arguments",
    [
        ("status",), ("backends",), ("explain", "user-1"), ("cancel", "some-task"), ("sweep",), ("drain", "a"),
        ("undrain", "a"), ("run", "user-1", "--", "true"), ("close", "chat-1"), ("top",),
    ],
)  # fmt: skip
def test_a_broker_out_of_reach_ends_every_command_with_2(arguments):
    """And a message that names it without its password; with --json as one object."""
    found = invoke(app_of(GONE), arguments[0], "--json", *arguments[1:])
    assert found.exit_code == 2
    assert "127.0.0.1:1" in json.loads(found.stdout)["error"]
    assert "Error: cannot reach" in found.stderr
    assert "canary" not in found.output


def test_a_broker_that_never_answers_is_given_up(silent):
    """After the time that was asked for."""
    found = invoke(app_of(silent), "status", "--timeout", "0.2")
    assert found.exit_code == 2
    assert "did not answer within 0.2 s" in found.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("explain", ""), "key is empty"),
        (("run", "a\tb", "--", "true"), "control character"),
        (("run", "user-1", "--env", "X", "--", "true"), "NAME=VALUE"),
        (("run", "user-1"), "Missing argument"),
        (("run", "user-1", "--stdin", "/no/such/file", "--", "true"), "No such file"),
        (("close", "k" * 300), "at most 256 bytes"),
        (("status", "--timeout", "0"), "0.0"),
    ],
)
def test_wrong_usage_exits_with_2(silent, arguments, message):
    """Before anything is sent, and with the rule that is broken."""
    found = invoke(app_of(silent), *arguments)
    assert found.exit_code == 2
    assert message in " ".join(found.output.split())


def test_an_app_without_a_pool_is_told(silent):
    """A wrong -A is the usual reason."""
    app = Celery("bare", broker=silent, set_as_current=False)
    found = invoke(app, "status")
    assert found.exit_code == 2
    assert "'bare' has no pool" in found.stderr


def test_an_app_without_the_build_task_is_told(silent):
    """`run` needs it."""
    app = app_of(silent)
    app.tasks.pop("tasks.builds.run_build")
    found = invoke(app, "run", "user-1", "--", "true")
    assert found.exit_code == 2
    assert "has no task 'tasks.builds.run_build'" in found.stderr


def test_celerys_own_commands_pay_nothing_for_ours():
    """Celery imports the group each time: its commands come when they are used."""
    script = "import pool.cli, sys; print(sorted({'celery', 'rich', 'redis', 'asyncio'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize(
    ("line", "found"),
    [("celery pool st", ["status"]), ("celery pool run --pr", ["--project"]), ("celery pool nope x", [])],
)
def test_a_shell_can_complete_commands_and_options(line, found):
    """By click's own means, and without asking anybody."""
    words = line.split()[1:]
    completion = BashComplete(Group(commands={"pool": pool}), {}, "celery", "_CELERY_COMPLETE")
    assert [item.value for item in completion.get_completions(words[:-1], words[-1])] == found


def test_a_task_in_a_queue_may_start_where_a_node_does_not_answer(monkeypatch):
    """It is no success then, and the node is named."""
    monkeypatch.setattr(cancelling, "_state", lambda *_: "PENDING")
    monkeypatch.setattr(cancelling, "_queue_of", lambda *_: "pool.shard.001")
    for missing, found in ([], "waiting"), (["b@x"], "unknown"):
        replies = Replies({"a@x": {"found": "no", "ok": "it will not start at this node"}}, missing)
        told = cancelling.cancelled(SimpleNamespace(ask=lambda *_, replies=replies, **__: replies), "t1")
        assert (told.found, told.ok, told.no_answer) == (found, not missing, missing)
