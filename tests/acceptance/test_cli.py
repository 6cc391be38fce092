"""``celery -A worker_config pool ...`` with two real nodes, as a user types it: in a shell, a pipe, a terminal."""

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from celery.bin.base import CLIContext
from click.testing import CliRunner

from pool.cli import pool
from pool.sharding.hashing import shard_of
from tests.support.celery_nodes import CHECKOUT, bare_environment, run_celery
from tests.support.processes import wait_group_gone
from tests.support.site import RESULT_TIMEOUT, Gate
from tests.support.terminal import Terminal
from tests.support.waiting import wait_until

METADATA = {
    "METADATA": "Metadata-Version: 2.1\nName: celery-warm-pool\nVersion: 0.1.0\n",
    "entry_points.txt": "[celery.commands]\npool = pool.cli:pool\n",
}
CELERY = ["-A", "worker_config", "pool"]
ASKING = ("status", "explain", "backends", "top", "cancel", "drain", "undrain", "sweep")
"""Commands that wait for the answers of nodes: here for as long as a busy machine needs."""


@pytest.fixture(scope="module")
def start_nodes():
    """Two nodes whose leases outlast a node that is held still."""
    env = {"POOL_LEASE_TTL": "60"}
    return lambda site: [site.start("cli-a", env=env), site.start("cli-b", env=env)]


@pytest.fixture(scope="module")
def environment(site):
    """What ``celery`` gets; as installed, whichever version the interpreter has installed."""
    folder = site.folder / "metadata" / "celery_warm_pool-0.1.0.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in METADATA.items():
        (folder / name).write_text(text)
    return {**site.env, "PYTHONPATH": os.pathsep.join([str(folder.parent), str(CHECKOUT)]), "POOL_LEASE_TTL": "60"}


@pytest.fixture
def celery(site, environment, producer):
    """Run ``celery ... pool`` as a program; *stdin*: a file that it reads."""
    return lambda *arguments, stdin=None, **env: run_celery(
        [*CELERY, *arguments], site.folder, {**environment, **env}, stdin=stdin
    )


@pytest.fixture
def terminal(site, environment, producer):
    """Run ``celery ... pool`` in a terminal."""

    def terminal(*arguments, columns=100, **env):
        command = [sys.executable, "-m", "celery", *CELERY, *arguments]
        return Terminal(command, {**bare_environment(), **environment, **env}, site.folder, columns=columns)

    return terminal


@pytest.fixture
def invoke(producer):
    """Run a command in this process: the same but for Celery's start. *timeout*: seconds for the nodes' answers."""

    def invoke(*arguments, env=None, timeout=20.0):
        context = CLIContext(producer.app, no_color=False, workdir=None)
        defaults = {name: {"timeout": timeout} for name in ASKING}
        found = CliRunner().invoke(pool, arguments, obj=context, env=env, default_map=defaults)
        assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
        return found

    return invoke


@pytest.fixture
def told(invoke):
    """Run a command with ``--json``; return the exit code and what it says."""

    def told(*arguments, **options):
        found = invoke(arguments[0], "--json", *arguments[1:], **options)
        return found.exit_code, json.loads(found.stdout)

    return told


@pytest.fixture
def settled(told):
    """The two nodes have shared the shards out."""

    def even():
        _, overview = told("status")
        shards = [node["shards"] for node in overview["nodes"]]
        return shards == [32, 32] and overview["ok"] and not overview["shards"]["moving"]

    wait_until(even, "the shards are shared out", RESULT_TIMEOUT)


@contextlib.contextmanager
def held_still(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


# -- seeing


def test_status_shows_everything_on_one_screen(settled, celery):
    """As a program, in a pipe: both nodes, all shards, exit code 0."""
    found = celery("status", "--timeout", "20")
    assert found.returncode == 0, found.stderr
    assert "cli-a@" in found.stdout
    assert "64 shards, 64 owned." in found.stdout
    assert re.search(r"^ +0  [AB]{64}$", found.stdout, re.MULTILINE)
    assert "\x1b" not in found.stdout


def test_a_terminal_of_40_columns_without_colours_is_enough(settled, terminal):
    """Nothing is cut, nothing escapes."""
    with terminal("status", "--timeout", "20", columns=40, TERM="dumb") as screen:
        assert screen.end() == 0
    assert b"\x1b" not in screen.output
    assert all(len(line) <= 40 for line in screen.text.splitlines())
    assert "2 nodes answering" in screen.text


def test_explain_tells_where_why_and_what_ran(settled, producer, told, invoke, key):
    """The owner that the task itself saw, and the task."""
    result = producer.built(key, "echo hello")
    code, answer = told("explain", key)
    assert code == 0
    assert answer["owner"] == result["node"]
    assert answer["shard"] == shard_of(key, 64)
    assert answer["backends"][0]["state"] == "idle"
    assert answer["last"][0]["state"] == "SUCCESS"
    text = invoke("explain", key).output
    assert f"owner     {result['node']}, epoch {answer['epoch']}" in text
    assert "local: idle for" in text


def test_backends_and_top_show_who_is_busy(settled, producer, told, key, gate):
    """With their keys; never the arguments of a task."""
    running = producer.build(key, gate.command, env={"CANARY": "canary-value"})
    gate.wait_started()
    _, listed = told("backends", "--key", key[:-1] + "?")
    assert [(row["key"], row["state"]) for row in listed["backends"]] == [(key, "busy")]
    code, seen = told("top")
    assert code == 0
    assert [(task["task_id"], task["key"]) for task in seen["running"]] == [(running.id, key)]
    assert "canary" not in json.dumps(seen)
    gate.open()
    assert running.get(timeout=RESULT_TIMEOUT)["exit_code"] == 0


def test_top_ends_by_q_and_leaves_the_terminal_as_it_was(settled, terminal):
    """It draws on the terminal's other screen, and goes back."""
    with terminal("top", "--interval", "0.2") as screen:
        screen.wait_for("Tasks that run: 0")
        screen.type("q")
        assert screen.end() == 0
    assert screen.output.endswith(b"\x1b[?1049l") or b"\x1b[?1049l" in screen.output[-200:]


# -- running


def test_run_is_the_command_with_its_output_and_exit_code(settled, celery, key):
    """Each stream on its own, nothing added, nothing changed."""
    found = celery("run", key, "--env", "WHO=a b", "--project", "p", "--", "sh", "-c",
                   'printf "\\033[1mhello $WHO\\n"; basename "$PWD"; echo oops >&2; exit 3')  # fmt: skip
    assert found.returncode == 3
    assert found.stdout == "\x1b[1mhello a b\np\n"
    assert found.stderr == "oops\n"


def test_run_passes_a_file_on_to_the_command(settled, celery, key, tmp_path):
    """Byte for byte; '-' is what it reads itself. Without the option it leaves that alone."""
    content = bytes(range(256)) * 400
    (tmp_path / "file").write_bytes(content)
    want = f"{hashlib.sha256(content).hexdigest()}  -\n"
    assert celery("run", key, "--stdin", str(tmp_path / "file"), "--", "sha256sum").stdout == want
    assert celery("run", key, "--stdin", "-", "--", "sha256sum", stdin=tmp_path / "file").stdout == want
    assert celery("run", key, "--", "cat", stdin=tmp_path / "file").stdout == ""


def test_one_word_is_a_line_of_shell(settled, told, key):
    """With JSON the end of the output comes with the result."""
    code, answer = told("run", key, "--", "echo one && echo two; false")
    assert (code, answer["state"], answer["exit_code"]) == (1, "FAILURE", 1)
    assert answer["stdout"] == "one\ntwo\n"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--timeout", "0.3", "--", "sleep 60"), 124, "CommandTimeout"),
        (("--cwd", "gone", "--", "true"), 1, "FileMissing"),
    ],
)
def test_run_says_why_a_command_could_not_run_or_end(settled, invoke, key, arguments, code, message):
    """On stderr, with the exit code that tells it apart."""
    found = invoke("run", key, *arguments)
    assert found.exit_code == code
    assert message in found.stderr


def test_ctrl_c_cancels_and_the_backend_stays_warm(settled, terminal, told, producer, key):
    """And what the command writes cannot act on the terminal."""
    with terminal("run", key, "--", "sh", "-c", 'printf "\\033[2Jready\\n"; sleep 600') as screen:
        screen.wait_for("^[[2Jready")
        screen.type("\x03")
        assert screen.end() == 130
    assert "cancelled by Ctrl-C" in screen.text
    assert told("explain", key)[1]["last"][0]["state"] == "REVOKED"
    assert producer.built(key)["warm"]


def test_a_second_ctrl_c_leaves_the_task_alone(terminal, site, key):
    """Where no node answers: the task stays in its queue."""
    with terminal("run", key, "--", "true", POOL_NAMESPACE="nobody") as screen:
        screen.wait_for("task ")
        screen.type("\x03")
        screen.wait_for("cancelling")
        screen.type("\x03")
        assert screen.end() == 130
    assert "left alone: task" in screen.text
    with site.redis() as client:
        client.delete(f"nobody.shard.{shard_of(key, 64):03d}")


def test_logs_of_a_task_that_runs_and_has_ended(settled, celery, producer, site, environment, key, gate):
    """-f begins at the beginning, and ends with the task; later the same is there without -f."""
    running = producer.build(key, f"echo first; {gate.command}")
    gate.wait_started()
    command = [sys.executable, "-m", "celery", *CELERY, "logs", "-f", running.id]
    env = {**bare_environment(), **environment}
    with subprocess.Popen(command, cwd=site.folder, env=env, stdout=subprocess.PIPE, text=True) as follower:
        assert follower.stdout.readline() == "first\n"
        gate.open()
        assert follower.stdout.read() == "built\n"
        assert follower.wait(RESULT_TIMEOUT) == 0
    assert celery("logs", running.id).stdout == "first\nbuilt\n"


# -- steering


def test_cancel_tells_what_it_found(settled, told, producer, site, key):
    """Running, waiting, over, unknown: each with its exit code."""
    gate = Gate(site.work(key))
    running = [producer.build(key, gate.command) for _ in range(4)]  # as many as a key may have at once
    wait_until(lambda: gate.runs == 4, "four builds run", RESULT_TIMEOUT)
    waiting = producer.build(key, "true")
    node = told("explain", key)[1]["owner"]
    group = gate.wait_started()
    try:
        code, answer = told("cancel", waiting.id)
        assert (code, answer["found"]) == (0, "waiting")
        for each in running:
            code, answer = told("cancel", each.id, "--reason", "enough")
            assert (code, answer["found"], answer["node"]) == (0, "running", node)
        wait_until(
            lambda: all(each.state == "REVOKED" for each in [*running, waiting]), "all are revoked", RESULT_TIMEOUT
        )
        wait_group_gone(group)
        assert "enough" in str(running[0].result)
    finally:
        gate.open()
    code, answer = told("cancel", running[0].id)
    assert (code, answer["found"]) == (1, "over")
    code, answer = told("cancel", f"no-such-task-{key}")
    assert (code, answer["found"]) == (1, "unknown")


def test_close_waits_until_a_chat_is_closed(settled, told, producer, key):
    """A second time there is nothing to close."""
    producer.built(key)
    code, answer = told("close", key)
    assert (code, answer["closed"]) == (0, ["default"])
    assert told("explain", key)[1]["backends"] == []
    assert told("close", key)[0] == 1


def test_a_drained_node_gives_its_shards_to_the_other_until_it_takes_part_again(settled, told, invoke):
    """By its short name; ``--wait`` returns when it has none."""
    code, answer = told("drain", "cli-b", "--wait")
    assert code == 0
    assert list(answer["shards"].values()) == [0]
    wait_until(  # the table, which `--wait` looks at, is ahead of the nodes by a heartbeat
        lambda: [(n["state"], n["shards"]) for n in told("status")[1]["nodes"]] == [("ok", 64), ("draining", 0)],
        "they serve what the table says",
        RESULT_TIMEOUT,
    )
    assert told("undrain", "cli-b")[0] == 0
    wait_until(
        lambda: [node["shards"] for node in told("status")[1]["nodes"]] == [32, 32],
        "it has shards again",
        RESULT_TIMEOUT,
    )
    unknown = invoke("drain", "cli-c")
    assert unknown.exit_code == 2
    assert "there is no node 'cli-c': there are cli-a@" in unknown.stderr
    assert told("sweep")[0] == 0


# -- when not all is well


def test_an_unknown_task_has_no_logs(settled, invoke, key):
    """It may have expired, too."""
    found = invoke("logs", f"unheard-of-{key}")
    assert found.exit_code == 1
    assert "nothing is known of task" in found.stderr


def test_with_half_of_the_nodes_silent_everything_works_and_says_so(settled, told, invoke, celery_worker_cluster):
    """What is known of the silent one comes from the lease table."""
    silent = celery_worker_cluster[1]
    name = told("status")[1]["nodes"][1]["node"]
    key = next(f"key-{n}" for n in range(99) if told("explain", f"key-{n}")[1]["owner"] == name)
    with held_still(silent.pid):
        code, overview = told("status", timeout=2.0)
        assert (code, [node["state"] for node in overview["nodes"]]) == (1, ["ok", "no answer"])
        assert overview["nodes"][1]["shards"] == 32
        text = invoke("status", env={"COLUMNS": "40"}, timeout=2.0).stdout
        assert f"! {name} does not answer" in text.replace("\n", " ")
        code, answer = told("explain", key, timeout=2.0)
        assert (code, answer["owner"], answer["answers"]) == (1, name, False)
        code, listed = told("backends", timeout=2.0)
        assert (code, listed["no_answer"]) == (1, [name])
        assert told("drain", "cli-b", timeout=2.0)[0] == 1
        assert f"{name} does not answer" in invoke("cancel", "some-task", timeout=2.0).stderr
    wait_until(lambda: told("status")[0] == 0, "both answer again", RESULT_TIMEOUT)
