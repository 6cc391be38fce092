"""kill -9 of the worker, and of the shell that stands between it and its agent: nothing stays."""

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from pool.backends.leftovers import owner, sweep_leftovers
from pool.backends.shell import MARK
from tests.support.agent_rigs import EchoRig, HostRig
from tests.support.faulty_agent import FORKS
from tests.support.leaks import no_leaks
from tests.support.openssh import OpenSshd, sshd_binary
from tests.support.processes import is_gone, wait_gone
from tests.support.services import require_service
from tests.support.waiting import wait_until

ROOT = Path(__file__).parents[2]
FORK_ALL = [word for kind in FORKS for word in ("--fork", kind)]


@pytest.fixture
def rig(tmp_path):
    with no_leaks(), EchoRig(tmp_path / "rig") as rig:
        rig.root.mkdir()
        yield rig


@contextmanager
def child(rig, flags, ssh=None, turn=""):
    """A worker with an agent that has forked all that it can; yields the worker, and the ids of all the others."""
    before = len(rig.forked()), len(rig.started())
    config = {"root": str(rig.root), "command": rig.command(flags), "env": rig.env, "ssh": ssh, "turn": turn}
    command = [sys.executable, "-m", "tests.integration.agent_child", json.dumps(config)]
    with subprocess.Popen(command, cwd=ROOT) as worker:
        try:
            wait_until(lambda: len(rig.forked()) == before[0] + len(FORKS), "all are there", 60)
            yield worker, [*rig.forked()[before[0] :], *rig.started()[before[1] :]]
        finally:
            worker.kill()


def test_a_killed_worker_leaves_nothing(rig):
    """Twenty times: neither the agent nor what it has forked, whatever session that is in and whatever it ignores."""
    for _ in range(20):
        with child(rig, ["--slow-start", "1000", "--stubborn", *FORK_ALL]) as (worker, pids):
            assert len(pids) == len(FORKS) + 1
            worker.kill()
            wait_gone(*pids)
    wait_until(lambda: rig.processes() == [], "not even a shell is left")


def test_a_worker_that_is_killed_in_a_turn_leaves_nothing(rig):
    """The whole way: a session, a turn, and forks made in it."""
    with child(rig, ["--stubborn"], turn=f"!fork {' '.join(FORKS)}") as (worker, pids):
        worker.kill()
        wait_gone(*pids)
    wait_until(lambda: rig.processes() == [], "not even a shell is left")


@pytest.mark.openssh
def test_a_killed_worker_leaves_nothing_on_its_hosts(tmp_path):
    """Twenty times, over OpenSSH: its connection ends, and with it the agent."""
    require_service("sshd", sshd_binary())
    with OpenSshd(tmp_path / "sshd") as server, HostRig(server.info) as rig:
        info = server.info
        ssh = {
            "port": info.port,
            "username": info.username,
            "client_keys": str(info.client_key),
            "known_hosts": str(info.known_hosts),
        }
        for _ in range(20):
            with child(rig, ["--slow-start", "1000", "--stubborn", *FORK_ALL], ssh) as (worker, pids):
                assert len(pids) == len(FORKS) + 1
                worker.kill()
                wait_gone(*pids)
        wait_until(lambda: rig.processes() == [], "not even a shell is left")


def test_what_outlives_worker_and_shell_is_swept(rig):
    """And nothing else: neither what carries no mark, nor what belongs to a worker that lives, nor strangers' things."""
    mine = rig.ready()  # of a live owner: this process
    machine, pid, start = owner().rsplit(".", 2)
    marks = ["", "nonsense", f"0-{machine}.1.{start}.ab", f"{machine}.{pid}.{start}.ab", f"{machine}.x.{start}.ab"]
    others = [
        subprocess.Popen(["sleep", "1000"], env={**os.environ, **({MARK: mark} if mark else {})}) for mark in marks
    ]
    kept = [process.pid for process in others] + [pid for pid in rig.started() if not is_gone(pid)]
    try:
        with child(rig, ["--slow-start", "1000", "--stubborn", *FORK_ALL]) as (worker, left):
            shells = []
            for process in psutil.Process(worker.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):  # a sleep of somebody's, or a zombie
                    if any("_pool_kill" in word for word in process.cmdline()):
                        shells.append(process)
            assert len(shells) == 3
            for process in [*shells, psutil.Process(worker.pid)]:
                process.suspend()  # so that none sees the other die
            for process in [*shells, psutil.Process(worker.pid)]:
                process.send_signal(signal.SIGKILL)
            worker.wait(20)
            wait_gone(*(process.pid for process in shells))
            assert [pid for pid in left if is_gone(pid)] == []
            assert set(left) <= set(sweep_leftovers())
            wait_gone(*left)
            assert [pid for pid in kept if is_gone(pid)] == []
            assert not set(kept) & set(sweep_leftovers())
        assert mine.prompt("usable").text.startswith("turn 1: usable")
    finally:
        for process in others:
            process.kill()
            process.wait()
