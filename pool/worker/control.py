"""Remote control commands: ``celery -A app inspect pool_stats``, ``celery -A app control pool_drain -d NODE``.

Each is answered at once, from snapshots; what takes time is begun, and goes on without the worker's main thread.
What they answer is a documented interface: ``docs/operations.md``.
"""

import logging
import threading
from collections.abc import Callable
from time import monotonic
from typing import Any

from celery import uuid
from celery.worker import state as worker_state
from celery.worker.control import control_command, inspect_command, revoke

from pool.errors import InvalidKey, PoolError
from pool.keys import check_key
from pool.sharding.hashing import shard_of
from pool.worker.explain import explain
from pool.worker.maintenance import close_chat
from pool.worker.report import report_of, stats_of
from pool.worker.takeover import requests
from pool.worker.task import PooledTask

logger = logging.getLogger(__name__)


@inspect_command()
def pool_stats(state: Any) -> dict[str, Any]:
    """Count the backends of a node, and what became of them."""
    return stats_of(state.app.warm_pool)


@inspect_command(args=[("limit", int), ("key", str)], signature="[limit [key pattern]]")
def pool_backends(state: Any, limit: int = 100, key: str | None = None) -> dict[str, Any]:
    """List the backends of a node, the busiest first; of keys that match a pattern (``acme:*``), or of all."""
    total, rows = report_of(state.app.warm_pool).busiest(max(0, limit), key)
    return {"total": total, "shown": len(rows), "backends": rows}


@inspect_command(args=[("key", str)], signature="<key>")
def pool_explain(state: Any, key: str) -> dict[str, Any]:
    """Tell why a key's work runs where it runs, and what is known of it."""
    try:
        return explain(state.app.warm_pool, check_key(key))
    except InvalidKey as error:
        return {"error": str(error)}


@control_command()
def pool_sweep(state: Any) -> dict[str, str]:
    """Evict the idle backends of a node now."""
    return _say(state, "sweep") or {"ok": "sweeping"}


@control_command(args=[("key", str)], signature="<key>")
def pool_close(state: Any, key: str) -> dict[str, Any]:
    """Close all that a key or chat has, when its turn comes; only its owner acts."""
    extension = state.app.warm_pool
    try:
        shard = shard_of(check_key(key), extension.settings.shards)
    except InvalidKey as error:
        return {"error": str(error)}
    if not extension.ownership.owns(shard):
        return {"ok": "not the owner", "owns": False}
    task_id = uuid()
    _in_thread(lambda: close_chat.apply_async((key,), task_id=task_id))
    return {"ok": f"closing {key} when its turn comes", "owns": True, "task_id": task_id}


@control_command(args=[("task_id", str), ("reason", str)], signature="<task id> [reason]")
def pool_cancel(state: Any, task_id: str, reason: str | None = None) -> dict[str, Any]:
    """End a task of the pool: one that runs, with all its commands; its backend stays warm. One that waits, too."""
    active = (request for request in requests(worker_state.active_requests) if request.id == task_id)
    request = next(active, None) or worker_state.requests.get(task_id)  # it may have been delivered again
    if request is not None and not isinstance(request.task, PooledTask):
        return {"error": f"{request.name} is no task of the pool: use revoke", "found": "no"}
    running = request is not None and request in worker_state.active_requests
    if not running:
        _in_thread(lambda: revoke(state, task_id))  # it asks the result backend for the task's state
        worker_state.revoked.add(task_id)
        where = "here" if request is not None else "at this node"
        return {"ok": f"it will not start {where}", "found": "no" if request is None else "waiting"}
    worker_state.revoked.add(task_id)  # no other attempt of it may start either
    failed = _say(state, "cancel", task_id=task_id, reason=reason or "cancelled by pool_cancel")
    return failed or {"ok": f"cancelling {request.name}", "found": "running"}


@control_command()
def pool_drain(state: Any) -> dict[str, str]:
    """Hand all shards over to the other nodes and take none, until pool_undrain."""
    return _drain(state, on=True)


@control_command()
def pool_undrain(state: Any) -> dict[str, str]:
    """Take shards again."""
    return _drain(state, on=False)


def _drain(state: Any, *, on: bool) -> dict[str, str]:
    tenant = state.app.warm_pool.tenant
    if tenant is None:
        return {"error": "the shards of this node are fixed by POOL_NODE_SHARDS: stop it instead"}
    tenant.drain(on=on)
    return {"ok": "draining: its shards go to the other nodes" if on else "taking part again"}


def _say(state: Any, word: str, **what: Any) -> dict[str, Any] | None:
    """Tell the process that has the backends; return an error for the caller, if there was one."""
    try:
        state.app.warm_pool.line.say(word, **what)
    except PoolError as error:
        return {"error": str(error)}
    return None


def _in_thread(call: Callable[[], Any]) -> None:
    """Do what may wait for the broker or the result backend, off the worker's main thread."""

    def run() -> None:
        started = monotonic()
        try:
            call()
        except Exception:
            logger.exception("a remote control command failed after %.1f s", monotonic() - started)

    threading.Thread(target=run, name="pool-control", daemon=True).start()
