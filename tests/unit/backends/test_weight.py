"""How much memory a family of processes holds."""

import os
import subprocess
import sys

import psutil

from pool.backends.weight import resident

HOLD = "import sys, subprocess; block = bytearray(30_000_000); {}; print('ready', flush=True); sys.stdin.read()"
CHILD = f"subprocess.Popen([sys.executable, '-c', {HOLD.format('pass')!r}], stdin=0, stdout=1)"


def test_the_memory_of_descendants_counts():
    """A process and its child hold 30 MB each, besides what Python takes."""
    command = [sys.executable, "-c", HOLD.format(CHILD)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert [process.stdout.readline() for _ in range(2)] == [b"ready\n"] * 2
        own = psutil.Process(process.pid).memory_info().rss
        assert own > 30_000_000
        assert resident(process.pid) > own + 30_000_000
        process.stdin.close()


def test_what_is_gone_weighs_nothing():
    """A process that has ended meanwhile is no error."""
    with subprocess.Popen(["true"]) as process:
        process.wait()
    assert resident(process.pid) == 0
    assert resident(os.getpid()) > 0
