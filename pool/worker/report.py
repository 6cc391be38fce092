"""What a node knows of its backends and tasks, as plain data: for remote control commands, from snapshots only.

The process that has the backends describes them (`Report`). With threads and solo that is the node itself; a prefork
child posts its report on the `Board` every second, for its parent to read.
"""

import asyncio
import heapq
import json
import logging
import os
import sys
from fnmatch import fnmatchcase
from time import time
from typing import Any

from pool.agents import GROUP
from pool.sharding.hashing import shard_of
from pool.snapshot import BackendInfo
from pool.stats import PoolStats

logger = logging.getLogger(__name__)

POST_INTERVAL = 1.0
"""Seconds between two reports of a prefork child."""
POSTED_ROWS = 2000
"""Backends in one of them at most, the busiest first."""

Row = dict[str, Any]


class Report:
    """What the process that has the backends knows; *extension* is its `WarmPool`."""

    def __init__(self, extension: Any) -> None:
        self._extension = extension

    def stats(self) -> Row:
        """Count everything."""
        return {**counts_of(self._extension.pool.get_stats()), "running": len(self._extension.running.runs()),
                "pid": os.getpid(), "age_s": 0.0}  # fmt: skip

    def backends(self, key: str | None = None) -> list[Row]:
        """Describe the backends of one key, the busiest first."""
        return self.busiest(sys.maxsize, key=key)[1]

    def busiest(self, limit: int, pattern: str | None = None, key: str | None = None) -> tuple[int, list[Row]]:
        """Describe *limit* backends of keys that match, the busiest first; and how many match."""
        infos = self._extension.pool.get_backends(key)
        if pattern is not None:
            infos = [info for info in infos if fnmatchcase(info.key, pattern)]
        first = heapq.nsmallest(limit, infos, lambda info: (-(info.busy or -1.0), -info.waiters, info.idle or 0.0))
        return len(infos), [row(info, self._extension.settings.shards) for info in first]

    def runs(self, key: str | None = None) -> list[Row]:
        """Describe the tasks under way."""
        return [run.told() for run in self._extension.running.runs(key)]

    def last(self, key: str | None = None) -> dict[str, list[Row]]:
        """Describe the last runs of each key."""
        ended: dict[str, list[Row]] = self._extension.running.last(key)
        return ended

    def metrics(self) -> str:
        """What this process has to tell Prometheus; "": nothing."""
        metrics = self._extension.host.metrics
        return "" if metrics is None else metrics.render().decode()

    def whole(self) -> bytes:
        """Everything, for the board."""
        told = {
            "at": time(),
            "stats": self.stats(),
            "backends": self.busiest(POSTED_ROWS)[1],
            "runs": self.runs(),
            "last": self.last(),
            "metrics": self.metrics(),
        }
        return json.dumps(told).encode()

    async def post(self) -> None:
        """Keep the board up to date; on the event loop, until it ends."""
        while True:
            try:
                self._extension.board.post(self.whole())
            except Exception:
                logger.exception("posting the report failed")
            await asyncio.sleep(POST_INTERVAL)


class Posted:
    """The report of a prefork child, as its parent reads it; the same questions as `Report`."""

    def __init__(self, content: bytes | None) -> None:
        self._told: dict[str, Any] = {} if content is None else json.loads(content)

    def stats(self) -> Row:
        if not self._told:
            return {}
        return {**self._told["stats"], "age_s": round(time() - self._told["at"], 3)}

    def busiest(self, limit: int, pattern: str | None = None) -> tuple[int, list[Row]]:
        rows = [row for row in self.backends() if pattern is None or fnmatchcase(row["key"], pattern)]
        return len(rows), rows[:limit]

    def backends(self, key: str | None = None) -> list[Row]:
        return [row for row in self._told.get("backends", ()) if key in (None, row["key"])]

    def runs(self, key: str | None = None) -> list[Row]:
        return [run for run in self._told.get("runs", ()) if key in (None, run["key"])]

    def metrics(self) -> str:
        return str(self._told.get("metrics", ""))

    def last(self, key: str | None = None) -> dict[str, list[Row]]:
        return {each: runs for each, runs in self._told.get("last", {}).items() if key in (None, each)}


def report_of(extension: Any) -> Report | Posted:
    """Return the newest report of the node; from its main process."""
    return Report(extension) if extension.in_process else Posted(extension.board.read())


def stats_of(extension: Any) -> Row:
    """What ``inspect pool_stats`` answers."""
    trusted = extension.ownership.remaining()
    return {
        **report_of(extension).stats(),
        **shards_of(extension),
        "trusted_s": None if trusted is None else max(0.0, round(trusted, 3)),
        "node": extension.node,
        "execution": extension.settings.execution,
    }


def shards_of(extension: Any) -> Row:
    """What the node owns."""
    tenant = extension.tenant
    return {
        "shards": extension.ownership.count,
        "shards_suspended": extension.ownership.suspended,
        "shards_total": extension.ownership.shards,
        "lease_age_s": None if tenant is None else tenant.lease_age,
        "draining": tenant is not None and tenant.machine.draining,
    }


def flat(stats: Row) -> Row:
    """Return it as one table without tables in it, for ``inspect stats`` and Flower."""
    found = {name: value for name, value in stats.items() if not isinstance(value, dict)}
    return found | {
        f"{name}_{what}": count
        for name, counts in stats.items()
        if isinstance(counts, dict)
        for what, count in counts.items()
    }


def counts_of(stats: PoolStats) -> Row:
    """Return the counts of a pool."""
    asked = stats.hits + stats.connects
    agents = stats.groups.get(GROUP, {})
    return {
        "total": stats.total_backends,
        "busy": stats.active_backends,
        "idle": stats.idle_backends,
        "connecting": stats.connecting,
        "retired": stats.retired,
        "waiting": stats.waiting,
        "hits": stats.hits,
        "connects": stats.connects,
        "hit_rate": round(stats.hits / asked, 4) if asked else None,
        "connect_failures": stats.connect_failures,
        "failures": stats.failures,
        "modes": stats.modes,
        "evicted_idle": stats.evicted_idle,
        "evicted_lru": stats.evicted_lru,
        "retired_total": stats.retired_total,
        "oldest_busy_s": round(stats.oldest_busy, 3),
        "agents": agents.get("total", 0),
        "agents_mb": agents.get("weight", 0) // 10**6,
    }


def row(info: BackendInfo, shards: int) -> Row:
    """Return one backend as plain data."""
    return {
        "key": info.key,
        "agent": info.agent,
        "kind": info.kind,
        "state": info.state,
        "status": info.status,
        "users": info.users,
        "waiters": info.waiters,
        "uses": info.uses,
        "age_s": round(info.age, 3),
        "idle_s": None if info.idle is None else round(info.idle, 3),
        "busy_s": None if info.busy is None else round(info.busy, 3),
        "group": info.group,
        "weight_mb": info.weight // 10**6,
        "mode": info.mode,
        "shard": None if info.key.startswith("(") else shard_of(info.key, shards),
    }
