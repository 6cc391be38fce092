"""What killed processes have left on this machine: commands and agents, an embedded Valkey that nobody uses."""

import fcntl
import os
import time
from collections.abc import Iterator

from pool import embedded
from pool.backends import leftovers
from pool.doctor.deployment import Deployment
from pool.doctor.finding import Finding, info, ok, warning
from pool.embedded import EmbeddedValkey
from pool.errors import ConfigError


def check_processes(deployment: Deployment) -> Iterator[Finding]:
    """Processes that carry the mark of a dead owner."""
    try:
        import psutil  # noqa: F401
    except ImportError:
        yield info(
            "psutil-missing",
            "Processes were not looked at: psutil is not installed.",
            "Left-over agents would not be found, at the start of a node neither.",
            "pip install 'celery-warm-pool[agents]'",
        )
        return
    found = leftovers.find_leftovers()
    if not found:
        yield ok("processes", "No killed worker has left processes on this machine.")
        return
    pids = ", ".join(map(str, found))
    fixed = deployment.fix and set(leftovers.sweep_leftovers()) >= set(found)
    yield warning(
        "leftover-processes",
        f"Left on this machine by killed workers: {len(found)} process{'' if len(found) == 1 else 'es'} ({pids}).",
        "They use memory, and may write where the next task of their key works.",
        f"kill {pids.replace(',', '')}; or run doctor with --fix; the next node that starts here ends them, too.",
        fixed=fixed,
    )


def check_embedded(deployment: Deployment) -> Iterator[Finding]:
    """A server of this data folder that runs although no process uses it."""
    valkey = EmbeddedValkey(deployment.settings.data_dir / "valkey")
    files = [valkey.folder / name for name in ("server.json", "users.lock", "valkey.log")]
    if embedded._users.get(valkey.folder) == os.getpid() or not all(file.exists() for file in files):
        return  # used by us, or never started
    try:
        with valkey.alone(time.monotonic() + deployment.patience):
            if not valkey._runs() or _used(valkey):
                return
    except ConfigError as problem:
        yield info("embedded-locked", f"{problem}", "Somebody is starting or stopping it.")
        return
    stop = f"from pathlib import Path; from pool import embedded; embedded.stop(Path({str(valkey.folder)!r}))"
    yield warning(
        "embedded-left",
        f"The embedded Valkey of {valkey.folder} runs, and no process uses it.",
        "It was left by a killed process, and uses memory until the next one that uses it ends.",
        f'python -c "{stop}" (its data stays).',
    )


def _used(valkey: EmbeddedValkey) -> bool:
    fd = valkey._open("users.lock")
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(fd, fcntl.LOCK_UN)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False
