"""The project's own workers over an SSH server, for the tables that go all the way."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import Worker, broker, pong, scratch, ssh_hosts, ssh_server


@dataclass
class Nodes:
    """What the tables need: the app as a producer sees it, and the server's name and log of logins."""

    app: Any
    which: str
    info: Any


@contextmanager
def nodes(*shards: str, concurrency: int = 32) -> Iterator[Nodes]:
    """Start one worker for each range of *shards*; the producer side is configured in this process's environment."""
    with scratch() as folder, broker(folder) as url, ssh_server(folder) as (which, info), ExitStack() as stack:
        env = _environment(folder, url, info, concurrency)
        os.environ.update(env)  # every table has a process of its own
        from benchmarks.build_app import app

        for number, part in enumerate(shards):
            name = f"node{number}"
            worker = Worker("benchmarks.build_app", name, {**env, "POOL_NODE_SHARDS": part})
            stack.enter_context(worker)
            worker.until(partial(pong, app, name), "answers a ping")
        yield Nodes(app, which, info)


def _environment(folder: Path, url: str, info: Any, concurrency: int) -> dict[str, str]:
    return {
        "POOL_BROKER_URL": url,
        "POOL_REDIS_URL": url,
        "POOL_RESULT_URL": url,
        "POOL_DATA_DIR": str(folder / "data"),
        "POOL_HOSTS_FILE": str(ssh_hosts(folder, info)),
        "POOL_MAX_BACKENDS": "400",
        "POOL_CONCURRENCY": str(concurrency),
        "BENCH_SSH_PORT": str(info.port),
        "BENCH_SSH_USER": info.username,
        "BENCH_SSH_KEY": str(info.client_key),
        "BENCH_SSH_KNOWN_HOSTS": str(info.known_hosts),
    }
