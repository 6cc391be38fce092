"""Why does a key's work run where it runs? A node's answer, from what it knows."""

from time import time
from typing import Any

from pool.sharding.handoff import Source
from pool.sharding.hashing import key_hash, shard_of
from pool.sharding.ownership import now
from pool.worker.report import report_of


def explain(extension: Any, key: str) -> dict[str, Any]:
    """Tell of a key's shard, its owner as this node sees it, and, if that is this node, its backends and tasks."""
    settings = extension.settings
    shard = shard_of(key, settings.shards)
    told: dict[str, Any] = {
        "key": key,
        "hash": f"{key_hash(key):016x}",
        "shard": shard,
        "queue": extension.router.queues[shard].name,
        "node": extension.node,
        "owns": extension.ownership.owns(shard),
        "epoch": extension.ownership.epoch(shard),
        **_tenancy(extension, shard),
    }
    report = report_of(extension)
    turns = extension.turns
    return {
        **told,
        "backends": report.backends(key),
        "running": report.runs(key),
        "waiting": turns.waiting_of(key) if turns is not None else 0,
        "last": report.last(key).get(key, []),
    }


def _tenancy(extension: Any, shard: int) -> dict[str, Any]:
    tenant = extension.tenant
    if tenant is None:
        fixed = extension.ownership.owns(shard)
        how = "fixed by POOL_NODE_SHARDS" if fixed else None
        return {"state": "static" if fixed else None, "since": None, "how": how, "why": how}
    tenancy = tenant.machine.tenancies.get(shard)
    why = tenant.machine.why(shard)
    if tenancy is None:
        return {"state": None, "since": None, "how": None, "why": why}
    since = time() - (now() - tenancy.born)
    return {"state": tenancy.state, "since": round(since, 3), "how": how_it_came(tenancy.source), "why": why}


def how_it_came(source: Source) -> str:
    """Say in words how a node came to own a shard."""
    if source.how == "dead":
        return f"taken over from the dead node {source.node}"
    if source.how == "kept":
        return "kept, while the lease store could not be reached"
    return f"handed over by {source.node}" if source.how == "handed" else "nobody had it"
