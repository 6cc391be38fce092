"""Redis or Valkey: of the leases and chats, of the broker, of results; each server is looked at once."""

import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from redis import Redis
from redis.connection import parse_url
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError, ResponseError

from pool.doctor.checks import Check
from pool.doctor.deployment import Deployment
from pool.doctor.finding import Finding, error, info, ok, said, warning
from pool.embedded import is_redis
from pool.errors import ConfigError
from pool.sharding.redis_store import plain_url

OLDEST = (6, 2)
SLOW = 0.05
"""Seconds for a PING, above which it is worth a warning: a task costs several round trips."""
SKEW = 1.0
"""Seconds between the clocks of the server and of this machine."""
FULL = 0.9
"""Part of maxmemory."""

LEASES, BROKER, RESULTS = "leases and chats", "broker", "results"


@dataclass
class Server:
    """One server and what it is used for."""

    url: str
    address: str
    roles: list[str]

    @property
    def name(self) -> str:
        return f"Redis {self.address} ({', '.join(self.roles)})"

    @property
    def precious(self) -> bool:
        """Whether it holds more than results, which may get lost."""
        return self.roles != [RESULTS]


def redis_checks(deployment: Deployment) -> list[Check]:
    """One for each server, and one for the case that there is none."""
    servers: dict[str, Server] = {}
    settings, conf = deployment.settings, deployment.app.conf
    for role, url in ((LEASES, settings.redis_url), (BROKER, settings.broker_url), (RESULTS, conf.result_backend)):
        if isinstance(url, str) and is_redis(url) and ";" not in url:
            try:
                address = _address(url)
            except (ConfigError, ValueError):
                continue  # Sentinel, or several
            servers.setdefault(address, Server(url, address, [])).roles.append(role)
    checks = [Check(each.name, partial(check_server, deployment, each)) for each in servers.values()]
    return [Check("leases", partial(check_leases, deployment)), *checks]


def _address(url: str) -> str:
    found = parse_url(plain_url(url))  # type: ignore[no-untyped-call]
    return str(found["path"]) if "path" in found else f"{found.get('host', 'localhost')}:{found.get('port', 6379)}"


def check_leases(deployment: Deployment) -> Iterator[Finding]:
    """Whether there is a server that can keep leases at all."""
    settings = deployment.settings
    fix = "POOL_REDIS_URL=redis://..., or shards of its own for each node (POOL_NODE_SHARDS)."
    if settings.redis_url is None:
        if settings.leased:
            yield error("redis-missing", "There is no Redis for the leases.", "Nodes refuse to start.", fix)
        return
    try:
        plain_url(settings.redis_url)
    except ConfigError as problem:
        yield error("redis-url", f"{said(problem)}.", "Nodes refuse to start.", fix)


def check_server(deployment: Deployment, server: Server) -> Iterator[Finding]:
    """Everything about one server."""
    with deployment.redis(server.url) as client:
        try:
            client.ping()
            told = client.info()
        except (NoPermissionError, AuthenticationError) as problem:
            yield error(
                "redis-refused",
                f"{server.name} refuses the login or a command: {said(problem)}.",
                "What needs it fails.",
                "Correct user and password in the URL, or the user's rights (ACL) on the server: +ping +info.",
            )
            return
        except (RedisError, OSError) as problem:
            yield error(
                "redis-unreachable",
                f"{server.name} cannot be reached: {said(problem)}.",
                "Without leases nodes end what runs; without the broker nothing is sent.",
                "Start it, or correct its URL (POOL_REDIS_URL, POOL_BROKER_URL, POOL_RESULT_URL).",
            )
            return
        found = [
            *version(server, told),
            *eviction(deployment, server, client, told),
            *persistence(server, client, told),
            *memory(server, told),
            *response(server, client),
        ]
    yield from found
    if all(finding.level == "ok" or finding.fixed for finding in found):
        kind = f"Valkey {told['valkey_version']}" if "valkey_version" in told else f"version {told['redis_version']}"
        yield ok("redis", f"{server.name}: {kind}; it evicts nothing.")


def version(server: Server, told: Mapping[str, Any]) -> Iterator[Finding]:
    """New enough, and the one that takes writes."""
    parts = str(told.get("redis_version", "0")).split(".")[:2]
    if tuple(int(part) for part in parts if part.isdigit()) < OLDEST:
        yield error(
            "redis-version",
            f"{server.name} is version {told.get('redis_version')}.",
            "It lacks commands that nodes use.",
            "Redis 6.2 or newer, or any Valkey.",
        )
    if told.get("role") in ("slave", "replica"):
        yield error(
            "redis-replica", f"{server.name} is a replica.", "It refuses writes.", "Name the primary in the URL."
        )


def eviction(deployment: Deployment, server: Server, client: "Redis", told: Mapping[str, Any]) -> Iterator[Finding]:
    """It must not throw away what it was given."""
    policy = told.get("maxmemory_policy", "noeviction")
    if policy == "noeviction":
        return
    if not server.precious:
        yield info(
            "results-eviction",
            f"{server.name}: maxmemory-policy is {policy}.",
            "When it is full, results are lost before their time.",
            "maxmemory-policy noeviction, if they matter.",
        )
        return
    fixed, note = False, ""
    if deployment.fix:
        try:
            client.config_set("maxmemory-policy", "noeviction")
            fixed, note = True, " Set at run time: without the line in the file a restart undoes it."
        except RedisError as problem:
            note = f" It could not be set at run time: {said(problem)}."
    yield error(
        "redis-eviction",
        f"{server.name}: maxmemory-policy is {policy}.",
        "When it is full, it throws tasks, leases or chats away. Nodes refuse to start.",
        f"redis-cli CONFIG SET maxmemory-policy noeviction; and in its configuration file:"
        f" maxmemory-policy noeviction.{note}",
        fixed=fixed,
    )


def persistence(server: Server, client: "Redis", told: Mapping[str, Any]) -> Iterator[Finding]:
    """What a restart leaves."""
    if told.get("rdb_last_bgsave_status") == "err" or told.get("aof_last_write_status") == "err":
        yield error(
            "redis-disk",
            f"{server.name} could not write to its disk the last time.",
            "It refuses writes until it can.",
            "Look into its log: a full disk, or a folder that it may not write to.",
        )
    if not server.precious or told.get("aof_enabled"):
        return
    lost = "tasks that wait or run" if BROKER in server.roles else "chats"
    fix = "appendonly yes in its configuration file; at run time: redis-cli CONFIG SET appendonly yes."
    try:
        saves = bool((client.config_get("save").get("save") or "").strip())
    except ResponseError:  # a managed server keeps that to itself
        saves = True
    if saves:
        yield info(
            "redis-snapshots",
            f"{server.name} keeps snapshots only (appendonly is off).",
            f"A restart after a crash loses the {lost} of the time since the last one. Leases are safe.",
            fix,
        )
    else:
        yield warning(
            "redis-persistence",
            f"{server.name} writes nothing to disk: appendonly is off, and save is empty.",
            f"A restart loses all {lost}. Leases are safe: nodes take part again.",
            fix,
        )


def memory(server: Server, told: Mapping[str, Any]) -> Iterator[Finding]:
    """How full it is."""
    used, limit = int(told.get("used_memory", 0)), int(told.get("maxmemory", 0))
    if limit and used > FULL * limit:
        yield warning(
            "redis-memory",
            f"{server.name} uses {used / 1e6:.0f} MB of maxmemory={limit / 1e6:.0f} MB.",
            "When it is full, it refuses writes: nothing can be sent, and leases end.",
            "Raise maxmemory; shorten result_expires; lower POOL_LIVE_OUTPUT_MB and POOL_LIVE_TTL.",
        )


def response(server: Server, client: "Redis") -> Iterator[Finding]:
    """How fast it answers, and what its clock says."""
    times, skew = [], 0.0
    for _ in range(5):
        before, started = time.time(), time.monotonic()
        seconds, micros = client.time()
        times.append(time.monotonic() - started)
        skew = seconds + micros / 1e6 - (before + times[-1] / 2)
    latency = statistics.median(times)
    if latency > SLOW:
        yield warning(
            "redis-latency",
            f"{server.name} takes {latency * 1000:.0f} ms to answer (median of 5).",
            "Each task costs several round trips, and each heartbeat of the leases one.",
            "Run it near the nodes; look for slow commands there (redis-cli SLOWLOG GET).",
        )
    if abs(skew) - max(times) > SKEW:
        yield warning(
            "clock-skew",
            f"The clock of {server.name} and this machine's differ by {abs(skew):.1f} s.",
            "Tasks with an ETA start at the wrong time, and times in logs and events mislead. Leases are not affected:"
            " they compare durations.",
            "Synchronise both machines' clocks (chrony, systemd-timesyncd).",
        )
