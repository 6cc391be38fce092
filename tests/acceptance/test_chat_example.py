"""``examples/chat.py``: a user at a terminal, or a pipe, with an agent of our own."""

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import psutil
import pytest

from pool.sessions import RedisChats
from tests.support.celery_nodes import CHECKOUT, WorkerNode, bare_environment
from tests.support.site import Site, echo_hosts
from tests.support.waiting import wait_until

TIMEOUT = 60.0


@pytest.fixture(scope="module")
def hosts(site: Site) -> str:
    return echo_hosts(site)


@pytest.fixture(scope="module")
def start_nodes() -> Callable[[Site], list[WorkerNode]]:
    return lambda site: [site.start("a")]


@pytest.fixture(autouse=True)
def running(celery_worker_cluster: object) -> None:
    """There is a node."""


@contextmanager
def chat(site: Site, *arguments: str, **options: object) -> Iterator[subprocess.Popen[str]]:
    """Start it as somebody in another folder does."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # not ignored, as it is for a shell's background jobs
    with subprocess.Popen(
        [sys.executable, str(CHECKOUT / "examples" / "chat.py"), *arguments],
        env={**bare_environment(), **site.env},
        cwd=site.folder,
        text=True,
        **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def running_turn(site: Site, key: str) -> Iterator[Callable[[], str]]:
    """Look which turn of the chat runs."""
    store = RedisChats.from_url(site.valkey.url, "pool", 64)
    yield lambda: next((record.turn for record in store.records(key)), "")
    store.close()


def test_lines_from_a_pipe_are_answered_in_order(site: Site, key: str) -> None:
    """Answers, tool calls, what was denied and errors, each in a line; orders of the user; it ends with its input."""
    lines = [
        "hello",
        "",
        "again",
        "!tool echo made",
        "!ask edit",
        "!error",
        "/agent ecko",
        "hi",
        "/agent echo",
        "/close",
    ]
    with chat(site, key, "echo") as process:
        told, errors = process.communicate("\n".join([*lines, "anew"]) + "\n", TIMEOUT)
    assert (process.returncode, errors) == (0, "")
    assert told.splitlines() == [
        "turn 1: hello; earlier: []",
        "turn 2: again; earlier: [hello]",
        "execute: echo made (completed)",
        "tool said: made",
        "not allowed: edit: to edit",
        "edit=False",
        f"TurnFailed: agent {sys.executable!r}: told to fail (no reason)",
        f"ConfigError: {site.hosts_file}: there is no agent 'ecko'; did you mean 'echo'?",
        "closed echo",
        "turn 1: anew; earlier: []",
    ]


def test_a_chat_is_continued(site: Site, key: str) -> None:
    """Another run finds the agent warm."""
    for told in "turn 1: hello; earlier: []\n", "turn 2: hello; earlier: [hello]\n":
        with chat(site, key, "echo") as process:
            assert process.communicate("hello\n", TIMEOUT) == (told, "")


def test_ctrl_c_cancels_the_turn_and_no_more(site: Site, key: str) -> None:
    """What was said so far is shown, and the chat goes on; Ctrl-C between turns is nothing."""
    with chat(site, key, "echo") as process, running_turn(site, key) as running:
        assert process.stdin
        process.stdin.write("/slow 100 on and on\n")
        process.stdin.flush()
        wait_until(running, "the turn runs", TIMEOUT)
        process.send_signal(signal.SIGINT)
        wait_until(lambda: not running(), "it was cancelled", TIMEOUT)
        told, errors = process.communicate("hello\n", TIMEOUT)
    assert (process.returncode, errors) == (0, "")
    assert told.splitlines() == [
        "",
        "cancelling ...",
        "on",
        "cancelled",
        "turn 2: hello; earlier: [/slow 100 on and on]",
    ]


def test_a_terminal_gets_a_prompt_and_ctrl_d_leaves(site: Site, key: str) -> None:
    """Ctrl-C at the prompt only makes a new line."""
    ours, theirs = pty.openpty()
    seen = b""

    def read(until: bytes) -> bytes:
        nonlocal seen
        with suppress(OSError):  # its end
            while until not in seen:
                seen += os.read(ours, 1000)
        end = seen.find(until) + len(until) if until in seen else len(seen)
        found, seen = seen[:end], seen[end:]  # what came with it is read next
        return found

    with chat(site, key, "echo", stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        read(b"echo> ")
        os.write(ours, b"hello\n")
        assert b"turn 1: hello; earlier: []" in read(b"]")
        read(b"echo> ")
        # Before readline waits, a signal would be noticed with the next key only.
        wait_until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_SLEEPING, "it waits for a key")
        process.send_signal(signal.SIGINT)
        read(b"echo> ")
        os.write(ours, b"\x04")
        assert process.wait(TIMEOUT) == 0
        os.close(ours)


def test_wrong_arguments_get_the_usage(site: Site) -> None:
    """On stderr."""
    with chat(site, "only-a-chat") as process:
        assert process.communicate(timeout=TIMEOUT) == ("", "usage: python examples/chat.py CHAT AGENT\n")
    assert process.returncode == 1
