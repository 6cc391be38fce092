"""What a claim does to the helpers of older epochs, at moments that no real process can be held at."""

import os
import subprocess

import pytest

from pool.helper import durable, family, fence


@pytest.fixture
def older():
    """A process that stands for a helper of an older owner."""
    process = subprocess.Popen(["sleep", "1000"])
    yield process
    process.kill()
    process.wait()


def register(root, process, epoch):
    """Write what `claim` writes for a helper."""
    folder = durable.open_below(os.fsencode(root), fence.FOLDER, b"scope")
    text = b"%d %d %s %d" % (process.pid, family.look(process.pid).start, durable.boot(), epoch)
    durable.write(folder, b"helper.%d" % process.pid, text)
    os.close(folder)


def epoch_of(root):
    return (root / ".pool" / "fence" / "scope" / "epoch").read_text()


def test_an_older_helper_that_ends_by_itself_at_this_moment_is_ended(tmp_path, older, monkeypatch):
    """It was there when it was looked for, and is gone when it is asked to end: that is what was wanted."""
    register(tmp_path, older, 1)
    older.kill()
    older.wait()
    seen = iter([True])
    monkeypatch.setattr(durable.KeptBy, "lives", lambda _: next(seen, False))
    fence.claim(os.fsencode(tmp_path), b"scope", 2)
    assert epoch_of(tmp_path) == "2"
    assert not (tmp_path / ".pool" / "fence" / "scope" / f"helper.{older.pid}").exists()


def test_an_older_helper_that_cannot_be_ended_is_no_success(tmp_path, older, monkeypatch):
    """Another user's, say: the claim fails, rather than say that nothing of an older owner runs."""
    register(tmp_path, older, 1)

    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    monkeypatch.setattr(fence, "_PATIENCE", 0.0)
    with pytest.raises(PermissionError):
        fence.claim(os.fsencode(tmp_path), b"scope", 2)
    monkeypatch.undo()
    assert older.poll() is None


def test_an_older_helper_is_ended_though_there_is_no_room_for_the_epoch(tmp_path, older, monkeypatch):
    """What fills the disk may be its own command; the claim has failed all the same."""
    register(tmp_path, older, 1)

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable, "write", refuse)
    with pytest.raises(OSError, match="No space"):
        fence.claim(os.fsencode(tmp_path), b"scope", 2)
    assert older.wait(10) is not None


def test_an_older_epoch_is_told_the_newer_one(tmp_path):
    """And changes nothing."""
    fence.claim(os.fsencode(tmp_path), b"scope", 7)
    with pytest.raises(fence.Stale) as caught:
        fence.claim(os.fsencode(tmp_path), b"scope", 6)
    assert caught.value.args == (7,)
    assert epoch_of(tmp_path) == "7"
