"""The project's own app, plus the task that people write without a pool: connect, run, close."""

import asyncio
import os
from typing import Any

import asyncssh

from worker_config import app

__all__ = ["app", "cold_build", "nothing"]


@app.task(name="bench.cold_build")
def cold_build(cmd: str) -> dict[str, Any]:
    """Run *cmd* over an asyncssh connection made for it."""
    result = asyncio.run(_run(cmd))
    return {"exit_code": result.exit_status, "output": result.stdout, "pid": os.getpid()}


@app.task(name="bench.nothing")
def nothing() -> dict[str, Any]:
    """What Celery itself costs."""
    return {"exit_code": 0, "output": "", "pid": os.getpid()}


async def _run(cmd: str) -> asyncssh.SSHCompletedProcess:
    async with asyncssh.connect(
        "127.0.0.1",
        int(os.environ["BENCH_SSH_PORT"]),
        username=os.environ["BENCH_SSH_USER"],
        client_keys=[os.environ["BENCH_SSH_KEY"]],
        known_hosts=os.environ["BENCH_SSH_KNOWN_HOSTS"],
        config=None,
        agent_path=None,
    ) as connection:
        return await connection.run(cmd, check=True)
