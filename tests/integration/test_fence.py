"""The fence on the host: what an older owner has running ends before a newer one starts, and it starts nothing more."""

import os
import signal
import threading
from contextlib import suppress

import psutil
import pytest

from pool.backends.base import Claim
from pool.errors import BackendUnavailable, NotOwner
from pool.manager import BackendPoolManager
from tests.support.processes import is_gone, wait_gone, wait_pid
from tests.support.waiting import wait_until


def owner(rig, epoch, key="acme"):
    """A backend of a node that owns the key under this epoch."""
    backend = rig.backend()
    backend.claim = lambda: Claim(key, epoch)
    return backend


def running(backend, command, errors, **options):
    def run():
        try:
            errors.append(backend.exec(command, **options))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


DEAF = "trap '' TERM; setsid sleep 1000 & echo $! > other; echo $$ > pid; while :; do sleep 1; done"


def test_what_an_older_owner_runs_is_gone_before_a_newer_one_starts(rig):
    """Also what ignores TERM and has a session of its own; the older one is told, and refused from then on."""
    old, new, ended = owner(rig, 5), owner(rig, 6), []
    thread = running(old, DEAF, ended)
    pids = [wait_pid(rig.root / name) for name in ("pid", "other")]
    seen = new.exec("".join(f"if kill -0 {pid} 2>/dev/null; then echo {pid}; fi; " for pid in pids)).stdout
    assert seen == ""
    thread.join(30)
    assert isinstance(ended[0], BackendUnavailable)
    exec_, write = lambda: old.exec("touch late"), lambda: old.write("late", "x")
    for use in (exec_, write, lambda: old.exec("touch late", durable="late")):
        with pytest.raises(NotOwner, match=r"newer owner \(epoch 6\)") as caught:
            use()
        assert caught.value.epoch == 6
    assert not (rig.root / "late").exists()
    assert new.exec("echo on").stdout == "on\n"


def test_a_durable_command_of_an_older_owner_goes_on(rig):
    """The newer one follows it."""
    old, new, ended = owner(rig, 5), owner(rig, 6), []
    command = "echo once >> ran; echo $$ > pid; until [ -e go ]; do sleep 0.01; done; echo done"
    thread = running(old, command, ended, durable="task-1")
    pid = wait_pid(rig.root / "pid")
    new.exec("touch go")
    assert new.exec(command, durable="task-1").stdout == "done\n"
    thread.join(30)
    wait_gone(pid)
    assert (rig.root / "ran").read_text() == "once\n"


def test_owners_of_the_same_epoch_work_side_by_side(rig):
    """A node may have several backends of a key; and each key of a shared root has its own owner."""
    backends = [owner(rig, 5), owner(rig, 5), owner(rig, 4, key="other")]
    threads, ended = [], []
    for number, backend in enumerate(backends):
        threads.append(running(backend, f"touch is{number}; until [ -e go ]; do sleep 0.01; done", ended))
    wait_until(lambda: all((rig.root / f"is{number}").exists() for number in range(3)), "all run")
    rig.backend().exec("touch go")
    for thread in threads:
        thread.join(30)
    assert [result.exit_code for result in ended] == [0, 0, 0]


def test_many_owners_at_once(rig):
    """Whoever comes in whatever order: the newest works, and nobody else does after it."""
    backends = [owner(rig, epoch) for epoch in range(1, 9)]
    results = {}

    def work(epoch, backend):
        try:
            backend.exec(f"echo {epoch} >> log")
            results[epoch] = "worked"
        except (NotOwner, BackendUnavailable) as error:
            results[epoch] = type(error).__name__

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(backends, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results[8] == "worked"
    log = [int(line) for line in (rig.root / "log").read_text().split()]
    assert log == sorted(log)
    for backend in backends[:-1]:
        with pytest.raises(NotOwner):
            with suppress(BackendUnavailable):  # it may not have been told yet that its helper was ended
                backend.exec("true")
            backend.exec("true")


def test_a_helper_that_hangs_is_killed_with_what_it_runs(rig, server):
    """Frozen, it cannot end anything itself."""
    old, new, ended = owner(rig, 5), owner(rig, 6), []
    thread = running(old, DEAF, ended)
    pids = [wait_pid(rig.root / name) for name in ("pid", "other")]
    helper = psutil.Process(pids[0]).parent()
    keeper = running(old, "echo $$ > kept; until [ -e go ]; do sleep 0.01; done", [], durable="kept")
    kept = wait_pid(rig.root / "kept")
    os.kill(helper.pid, signal.SIGSTOP)
    assert new.exec("echo in").stdout == "in\n"
    assert [is_gone(pid) for pid in [*pids, helper.pid]] == [True] * 3
    assert not is_gone(kept)
    (rig.root / "go").touch()
    for each in (thread, keeper):
        each.join(30)
    wait_gone(kept)


def test_a_newer_epoch_of_the_same_node_goes_on(rig):
    """It lost the shard and got it back: its own helper is not an older owner."""
    epoch, backend = [5], rig.backend()
    backend.claim = lambda: Claim("acme", epoch[0])
    first = backend.exec("echo $PPID").stdout
    epoch[0] = 6
    assert backend.exec("echo $PPID").stdout == first
    with pytest.raises(NotOwner):
        owner(rig, 5).exec("true")


def test_no_epoch_is_no_owner(rig):
    """A node that has lost its shard asks no host."""
    with pytest.raises(NotOwner, match="any more"):
        owner(rig, 0).exec("touch late")
    assert not (rig.root / "late").exists()


def test_a_command_waits_while_nobody_knows_the_owner(rig):
    """What runs goes on; what comes is begun when the process owns the key again, under its new epoch."""
    now = [Claim("acme", 5, 30.0)]
    backend, ended = rig.backend(), []
    backend.claim = lambda: now[0]
    assert not backend.fenced
    first = running(backend, "echo $$ > pid; until [ -e go ]; do sleep 0.01; done", ended)
    pid = wait_pid(rig.root / "pid")
    assert backend.fenced
    now[0] = Claim("acme", 0, 30.0)
    second = running(backend, "echo second > log", ended)
    rig.backend().exec("touch go; sleep 0.2")
    first.join(30)
    assert (ended[0].exit_code, is_gone(pid)) == (0, True)
    assert not (rig.root / "log").exists()
    assert second.is_alive()
    now[0] = Claim("acme", 9, 30.0)
    second.join(30)
    assert (rig.root / "log").read_text() == "second\n"
    with pytest.raises(NotOwner, match="epoch 9"):
        owner(rig, 8).exec("true")


def test_a_command_that_waits_in_vain_is_refused(rig):
    """The grace ended, or the helper did: another owner came."""
    now = [Claim("acme", 5, 30.0)]
    backend, ended = rig.backend(), []
    backend.claim = lambda: now[0]
    backend.exec("true")
    now[0] = Claim("acme", 0, 30.0)
    waiting = running(backend, "touch late", ended)
    now[0] = Claim("acme", 0)
    waiting.join(30)
    now[0] = Claim("acme", 5, 30.0)
    backend.exec("true")
    now[0] = Claim("acme", 0, 30.0)
    waiting = running(backend, "touch late", ended)
    owner(rig, 6).exec("true")
    waiting.join(30)
    assert [type(error) for error in ended] == [NotOwner, NotOwner]
    assert not (rig.root / "late").exists()


def test_nobody_s_key_needs_no_fence(rig):
    """Outside of a node, and for what many keys share."""
    backend = rig.backend()
    backend.claim = lambda: None
    assert backend.exec("echo in").stdout == "in\n"
    assert not (rig.root / ".pool").exists()


def test_a_host_that_cannot_keep_a_fence_does_without(rig, caplog):
    """With a warning: a full or read-only disk is no reason to stand still."""
    (rig.root / ".pool").write_text("in the way")
    backend = owner(rig, 5)
    assert [backend.exec("echo in").stdout for _ in range(2)] == ["in\n"] * 2
    assert len([record for record in caplog.records if "older owners" in record.message]) == 1


def test_a_pool_tells_its_backends_under_which_epoch(rig):
    """The key of each; none for a backend without a key."""
    pool = BackendPoolManager(rig.backend, claim_for=lambda key: Claim(f"ns:{key}", 7))
    try:
        with pool.backend("user-1") as backend:
            assert backend.claim() == Claim("ns:user-1", 7)
        with pool.backend(None) as backend:
            assert backend.claim is None
    finally:
        pool.destroy_all(0.0)
