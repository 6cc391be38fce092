"""Each example is run as its text says, and the demo as the README says."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pool import embedded
from pool.demo.real_agents import agent_processes
from tests.support.celery_nodes import CHECKOUT, START_TIMEOUT, WorkerNode, bare_environment
from tests.support.real_agents import require_agents
from tests.support.site import Site
from tests.support.waiting import wait_until

EXAMPLES = CHECKOUT / "examples"
DEMO_TIMEOUT = 180.0
AGENTS_TIMEOUT = 300.0
AGENTS_DIR = ["POOL_AGENTS_DIR"]
"""Names the folder with the real agents, here and in the demo."""


@pytest.fixture
def shop_env() -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join([str(EXAMPLES / "existing_app"), str(CHECKOUT)])}


@pytest.fixture
def shop(site: Site, shop_env: dict[str, str]) -> Iterator[WorkerNode]:
    """A worker of examples/existing_app."""
    node = site.start("shop", app="shop", options=["-Q", "celery,mail"], env=shop_env)
    try:
        node.ready()
        yield node
    finally:
        node.container.teardown()


def python(code: str, env: dict[str, str], cwd: Path) -> str:
    """Run a line of Python as a producer; return what it prints."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**bare_environment(), **env},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=START_TIMEOUT,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_existing_app_keeps_its_tasks_and_gets_a_warm_assistant(
    site: Site, shop: WorkerNode, shop_env: dict[str, str], tmp_path: Path
) -> None:
    """The assistant remembers its chat and no other; the task from before still has its queue."""
    code = (
        "import shop\n"
        "for chat, text in [('chat-7', 'hello'), ('chat-7', 'again'), ('chat-8', 'me too')]:\n"
        "    print(shop.ask.delay(chat, text).get(timeout=30))\n"
        "print(shop.send_receipt.delay(5).get(timeout=30))"
    )
    assert python(code, {**site.env, **shop_env}, tmp_path).splitlines() == [
        "you said 1: ['hello']",
        "you said 2: ['hello', 'again']",
        "you said 1: ['me too']",
        "receipt for order 5 sent",
    ]


def test_an_assistant_that_died_is_started_anew(
    site: Site, shop: WorkerNode, shop_env: dict[str, str], tmp_path: Path
) -> None:
    """Its process is killed; the task that finds out is retried with a new one."""
    ask = "import shop; print(shop.ask.delay('chat-9', {!r}).get(timeout=60))"
    env = {**site.env, **shop_env}
    assert python(ask.format("one"), env, tmp_path) == "you said 1: ['one']\n"
    for child in psutil.Process(shop.pid).children():
        child.kill()
    assert python(ask.format("two"), env, tmp_path) == "you said 1: ['two']\n"


def start_demo(folder: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pool.demo", "--folder", str(folder), *options],
        env={**bare_environment(), **{name: os.environ[name] for name in AGENTS_DIR if name in os.environ}},
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_the_demo_shows_what_it_promises(tmp_path: Path) -> None:
    """Exit code 0 and one JSON object: every build done, at home, on one connection for each user."""
    with start_demo(tmp_path / "demo", "--json", "--users", "5", "--tasks", "60") as demo:
        told, progress = demo.communicate(timeout=DEMO_TIMEOUT)
    assert demo.returncode == 0, progress
    report = json.loads(told)
    assert report.pop("cold_ms_p50") > 0
    assert report.pop("warm_ms_p50") > 0
    assert report == {
        "tasks": 60,
        "users": 5,
        "failed": 0,
        "connects": 5,
        "affinity": 1.0,
        "warm_hit_rate": round(55 / 60, 4),
        "evicted": 2,
        "closed": 3,
    }


def test_a_demo_that_is_kept_lets_one_look_around(tmp_path: Path) -> None:
    """By the commands that it names, until Ctrl-C; then it ends as it would have."""
    with start_demo(tmp_path / "demo", "--keep", "--users", "2", "--tasks", "6") as demo:
        assert demo.stdout is not None
        try:
            commands = []
            while not any(" flower" in line for line in commands):
                commands.append(demo.stdout.readline())
                assert commands[-1], demo.stderr and demo.stderr.read()
            patient = "--timeout 20"
            for words, more in [
                ("pool status", patient), ("pool explain user-1", patient), ("pool run user-1 -- uname -a", "")
            ]:  # fmt: skip
                (line,) = [line for line in commands if line.rstrip().endswith(words)]
                done = subprocess.run(
                    f"{line.rstrip()} {more}", shell=True, cwd=CHECKOUT, env=bare_environment(), capture_output=True, text=True, timeout=60, check=False
                )  # fmt: skip
                assert done.returncode == 0, done.stdout + done.stderr
            assert os.uname().release in done.stdout
        finally:
            demo.send_signal(signal.SIGINT)
            demo.communicate(timeout=DEMO_TIMEOUT)
    assert demo.returncode == 0


def test_the_demo_kills_a_node_and_loses_nothing(tmp_path: Path) -> None:
    """``make demo KILL=1``: builds ran there and run again elsewhere, every build succeeds, each key in one process at a time."""
    with start_demo(tmp_path / "demo", "--kill", "--json", "--users", "12") as demo:
        told, progress = demo.communicate(timeout=DEMO_TIMEOUT)
    assert demo.returncode == 0, progress
    report = json.loads(told)
    assert (report["failed"], report["lost"], report["strayed"]) == (0, 0, 0)
    assert report["builds"] > report["users"] == 12
    assert 0 < report["users_of_killed"] < 12
    assert report["cut_off"] > 0
    assert 3.0 < report["running_again_s"] < 15.0  # from TTL - heartbeat - margin, to what a loaded machine takes
    assert 3.0 < report["first_finished_s"] <= report["every_user_s"] < 15.0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_demo_leaves_no_process_behind(number: signal.Signals, tmp_path: Path) -> None:
    """Ctrl-C while nodes work: not even Valkey. After kill -9 Valkey may be left, to be found again."""
    folder = tmp_path / "demo"
    with start_demo(folder, "--users", "20", "--tasks", "3000") as demo:
        try:
            log = folder / "worker-node-a.log"
            wait_until(lambda: log.exists() and "succeeded in" in log.read_text(), "builds run", DEMO_TIMEOUT)
            below = psutil.Process(demo.pid).children(recursive=True)
            assert len(below) >= 4  # the SSH server, two nodes
            demo.send_signal(number)
            _, errors = demo.communicate(timeout=60)
            if number == signal.SIGINT:
                assert demo.returncode == 130
                assert "Traceback" not in errors
            _, alive = psutil.wait_procs(below, timeout=30)
            assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []
            assert not embedded.stop(folder / "valkey") or number == signal.SIGKILL
        finally:
            demo.kill()
            embedded.stop(folder / "valkey")


@pytest.mark.agents
@pytest.mark.timeout(AGENTS_TIMEOUT + 60)
def test_the_demo_chats_with_real_agents_that_remember(tmp_path: Path) -> None:
    """``make demo AGENTS=1``: every chat goes on in its session, after an eviction and after kill -9 of its node."""
    require_agents()
    with start_demo(tmp_path / "demo", "--agents", "--json") as demo:
        told, progress = demo.communicate(timeout=AGENTS_TIMEOUT)
    assert demo.returncode == 0, progress + told
    report = json.loads(told)
    assert (report["failed"], report["astray"], report["forgotten"], report["refused"]) == (0, 0, 0, 0)
    assert report["evicted"] >= 10  # 8 x codex-acp, 2 x opencode; more if one was idle in between
    assert (report["chats"], report["evicted_resumed"], report["closed"]) == (12, 12, 12)
    assert (report["killed_chats"], report["killed_resumed"]) == (6, 6)
    assert 3.0 < report["continued_s"]  # TTL - heartbeat - margin
    assert report["killed_agents"] > 0
    assert report["warm_ms_p50"].keys() == {"codex", "codex-host", "opencode"}


@pytest.mark.agents
@pytest.mark.timeout(AGENTS_TIMEOUT)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_demo_leaves_no_agent_behind(number: signal.Signals, tmp_path: Path) -> None:
    """Ctrl-C, or kill -9, while agents of each kind run."""
    require_agents()
    folder = tmp_path / "demo"
    with start_demo(folder, "--agents") as demo:
        try:
            log = folder / "worker-node-a.log"
            wait_until(lambda: log.exists() and "succeeded in" in log.read_text(), "agents work", DEMO_TIMEOUT)
            pids = [process.pid for process in psutil.Process(demo.pid).children(recursive=True)]

            def both_run() -> bool:
                return {"codex-acp", "opencode"} <= {process.program for process in agent_processes(pids)}

            wait_until(both_run, "agents of each kind run", DEMO_TIMEOUT)
            below = psutil.Process(demo.pid).children(recursive=True)
            demo.send_signal(number)
            _, errors = demo.communicate(timeout=90)
            if number == signal.SIGINT:
                assert demo.returncode == 130
                assert "Traceback" not in errors
            _, alive = psutil.wait_procs(below, timeout=30)
            assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []
            wait_until(lambda: not agent_processes(pids), "no agent is left", 30.0)
        finally:
            demo.kill()
            embedded.stop(folder / "valkey")


def test_a_demo_without_agents_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, in one line."""
    monkeypatch.setenv("POOL_AGENTS_DIR", str(tmp_path))
    with start_demo(tmp_path / "demo", "--agents") as demo:
        told, errors = demo.communicate(timeout=DEMO_TIMEOUT)
    assert (demo.returncode, errors) == (1, "")
    assert told == "not installed: codex-acp and opencode. Run `make agents`, which needs npm\n"
