"""The fence: which owner of a key may work in a root, by the epoch of its lease.

``ROOT/.pool/fence/SCOPE`` keeps the highest epoch that has claimed the root, under ``lock``, and a file for each helper
that has. A claim with an older epoch is refused. One with a newer epoch first ends the helpers of older ones, and with
them the commands that they run; durable commands go on, for the new owner goes on with them. A helper lives only as
long as no newer epoch has claimed its root, so a command needs no look at the fence: that its helper runs is enough.
"""

import errno
import fcntl
import os
import signal
import time

from pool.helper import commands, durable, family, wire

FOLDER = b".pool/fence"
_PATIENCE = commands.KILL_PATIENCE + wire.KILL_GRACE + 1.0
"""Seconds for an older helper to end its commands and itself, before it is killed with all that it runs."""


class Stale(Exception):
    """A newer epoch, ``args[0]``, has claimed the root."""


def claim(root: bytes, scope: bytes, epoch: int) -> None:
    """Claim the root for *epoch*, for this process; returns when nothing of an older one runs there. May block.

    Raises `Stale`, and `OSError` when the fence cannot be kept.
    """
    folder = durable.open_below(root, FOLDER, scope)
    try:
        lock = os.open(b"lock", os.O_RDWR | os.O_CREAT, 0o600, dir_fd=folder)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            _claim(root, folder, epoch)
        finally:
            os.close(lock)
    finally:
        os.close(folder)


def _claim(root: bytes, folder: int, epoch: int) -> None:
    claimed = int(durable.read(folder, b"epoch") or 0)
    if epoch < claimed:
        raise Stale(claimed)
    failed = None
    if epoch > claimed:
        try:
            durable.write(folder, b"epoch", b"%d" % epoch)
        except OSError as error:  # no room: what older ones run is ended all the same
            failed = error
    for name in os.listdir(folder):
        if not name.startswith("helper."):
            continue
        other = durable.KeptBy(durable.read(folder, os.fsencode(name)) or b"0 0 - 0")
        if other.pid == os.getpid():
            continue
        lives = other.lives()
        if lives and int(other.digest) < epoch:
            _end(root, other)
            lives = False
        if not lives:
            os.unlink(name, dir_fd=folder)
    if failed:
        raise failed
    me = family.look(os.getpid())
    text = b"%d %d %s %d" % (os.getpid(), me.start if me else 0, durable.boot(), epoch)
    durable.write(folder, b"helper.%d" % os.getpid(), text)


def _end(root: bytes, helper: durable.KeptBy) -> None:
    """Have an older helper end what it runs, and itself; make sure of it. Raises `OSError` when that cannot be done."""
    family.ask_to_end(helper.pid)
    until = time.monotonic() + _PATIENCE
    pause = 0.002
    while helper.lives():
        if time.monotonic() > until:
            _kill(root, helper)
            if helper.lives():
                raise OSError(errno.EPERM, os.strerror(errno.EPERM))
            return
        time.sleep(pause)
        pause = min(0.05, 2 * pause)


def _kill(root: bytes, helper: durable.KeptBy) -> None:
    """Kill a helper that does not end, and what is below it, but no keeper and what that keeps."""
    below = {helper.pid: family.ANY}
    keepers = dict.fromkeys(durable.keepers(root), family.ANY)
    for _ in range(20):  # what it starts at this moment is found the next time
        everyone = family.processes()
        kept = {process.pid for process in family.members(keepers, everyone, family.nobodys)}
        found = [process for process in family.members(below, everyone, family.nobodys) if process.pid not in kept]
        if not found:
            return
        family.send(signal.SIGKILL, helper.pid, found, leads=False)
        time.sleep(0.01)
