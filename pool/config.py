"""Settings of a pool and of a worker: frozen, checked at start, every time in seconds."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

from pool.errors import ConfigError

EXECUTION_POOLS = ("threads", "prefork", "solo")

MAX_SHARDS = 65536
MAX_LEASE_TTL = 600.0

_TIMES = (
    "sweep_interval",
    "close_interval",
    "chat_ttl",
    "lease_heartbeat",
    "handoff_timeout",
    "consumer_timeout",
    "live_ttl",
)
"""Fields of `Settings` that are seconds, more than 0."""


def check_number(name: str, value: Any, rule: str, *, above: float = 0.0, unit: str = "s") -> None:
    """Raise `ConfigError` naming field, value, unit and rule unless *value* is a number greater than *above*."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > above:
        raise ConfigError(f"{name}={value!r} {unit}: {rule}")


@dataclass(frozen=True)
class GroupLimit:
    """What a group of a pool's backends may take up, besides what ``max_backends`` allows the whole pool."""

    count: int
    """Live backends of the group at most, closing ones included."""
    weight: float | None = None
    """Bytes of memory: while its live backends hold this much by their ``weight``, nobody new comes in. They are
    weighed when they run, not before, so this is a mark to come back to, not a wall. None: no limit."""
    starting: int | None = None
    """How many backends of the group may be connecting at once; None: no limit."""

    def __post_init__(self) -> None:
        for name in ("count", "starting"):
            value = getattr(self, name)
            if value is None and name == "starting":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name}={value!r} backends: must be a whole number, 1 or more")
        if self.weight is not None:
            check_number("weight", self.weight, "must be more than 0, or None for no limit", unit="bytes")


@dataclass(frozen=True)
class PoolConfig:
    """How a `BackendPoolManager` behaves. All times in seconds."""

    idle_timeout: float = 300.0
    """An entry that nobody used for this long is evicted by the next sweep."""
    max_backends: int = 200
    """Live backends at most, keyless and closing ones included."""
    cleanup_interval: float = 60.0
    """Between two sweeps of the pool's own reaper."""
    acquire_timeout: float = 30.0
    """How long an acquire waits in all: for room, for a connect, for its turn."""
    connect_timeout: float = 20.0
    """For one connect, after which it counts as failed."""
    close_timeout: float = 10.0
    """For closing one backend, after which it is given up and logged."""
    check_after: float = 30.0
    """A backend that was idle for this long is checked before it is handed out."""
    max_lifetime: float | None = None
    """A backend older than this is replaced once nobody uses it; None: no limit."""
    lifetime_jitter: float = 0.1
    """Each lifetime is shortened by a random part of up to this share, so that backends do not all end together."""
    backoff_base: float = 0.5
    """A failed connect is remembered for about this long, doubled with each failure in a row."""
    backoff_max: float = 30.0
    """... up to this."""
    groups: Mapping[str, GroupLimit] = field(default_factory=dict)
    """Limits of groups of entries, by name. A group that is not in it has none."""

    def __post_init__(self) -> None:
        for name in (
            "idle_timeout",
            "cleanup_interval",
            "acquire_timeout",
            "connect_timeout",
            "close_timeout",
        ):
            check_number(name, getattr(self, name), "must be more than 0")
        for name in ("check_after", "backoff_base", "backoff_max"):
            check_number(name, getattr(self, name), "must be 0 or more", above=-1e-9)
        check_number("max_backends", self.max_backends, "must be a whole number, 1 or more", unit="backends")
        if not isinstance(self.max_backends, int):
            raise ConfigError(f"max_backends={self.max_backends!r} backends: must be a whole number, 1 or more")
        if self.max_lifetime is not None:
            check_number("max_lifetime", self.max_lifetime, "must be more than 0, or None for no limit")
        if not isinstance(self.lifetime_jitter, int | float) or not 0 <= self.lifetime_jitter < 1:
            raise ConfigError(f"lifetime_jitter={self.lifetime_jitter!r}: must be from 0 up to, not including, 1")
        if self.backoff_max < self.backoff_base:
            raise ConfigError(
                f"backoff_max={self.backoff_max!r} s: must not be below backoff_base={self.backoff_base!r} s"
            )
        if not isinstance(self.groups, Mapping):
            raise ConfigError(f"groups={self.groups!r}: must be a mapping of names to GroupLimit")
        for group, limit in self.groups.items():
            if not isinstance(group, str) or not group or not isinstance(limit, GroupLimit):
                raise ConfigError(f"groups[{group!r}]={limit!r}: must be a name, not empty, and a GroupLimit")
        object.__setattr__(self, "groups", dict(self.groups))  # what the caller does to its own is its own affair

    def lifetime(self, dice: float) -> float:
        """Seconds that one backend may live; *dice*: a random number from 0 up to, not including, 1."""
        return float("inf") if self.max_lifetime is None else self.max_lifetime * (1 - self.lifetime_jitter * dice)

    def changed(self, **changes: Any) -> Self:
        """Return a copy with *changes*; an unknown name raises `ConfigError`."""
        known = {f.name for f in fields(self)}
        for name in changes:
            if name not in known:
                raise ConfigError(f"unknown pool setting {name!r}: known are {', '.join(sorted(known))}")
        return replace(self, **changes)


@dataclass(frozen=True)
class Settings:
    """What a worker and a producer need to know; `from_env` reads it from ``POOL_*`` variables.

    Producers and workers must agree on ``namespace`` and ``shards``: they decide in which queue a key's tasks go.
    """

    broker_url: str | None = None
    """None: the embedded Valkey of ``data_dir``."""
    redis_url: str | None = None
    """Coordination and sessions. None: the broker if it is Redis, else the embedded Valkey."""
    result_url: str | None = None
    """Celery's result backend. None: the same as ``redis_url``."""
    namespace: str = "pool"
    shards: int = 64
    node_shards: tuple[int, ...] | None = None
    """The shards of this node, for good: static placement. None: the nodes share all of them out by leases."""
    lease_ttl: float = 5.0
    """Seconds after its last heartbeat when a node's shards may be taken over."""
    lease_heartbeat: float = 1.0
    """Seconds between two heartbeats of a node."""
    lease_grace: float = 120.0
    """Seconds for which running commands go on when the lease store cannot be reached, where their host ends them for a
    newer owner. 0: they are ended with the leases."""
    handoff_timeout: float = 300.0
    """Seconds that running tasks get when their shard moves to another node; then they are run again there."""
    execution: str = "threads"
    concurrency: int | None = None
    """Tasks at once in this node. None: 32 with threads, else 1."""
    key_concurrency: int = 4
    """Tasks of one key at once; more of them wait, without holding up other keys."""
    hosts_file: Path | None = None
    data_dir: Path = field(default_factory=lambda: Path.cwd() / ".pool")
    """The embedded Valkey's files, and the folders of keys that have no host."""
    pool: PoolConfig = field(default_factory=PoolConfig)
    sweep_interval: float = 60.0
    """Seconds between two beat-driven sweeps of a shard."""
    close_interval: float = 60.0
    """Seconds between two beat-driven passes that close idle chats."""
    chat_ttl: float = 1800.0
    """A chat none of whose backends was used for this many seconds is closed."""
    max_agents: int = 20
    """Agent processes in this node at most; a shared server is one."""
    max_agents_mb: float | None = None
    """Megabytes (10^6 bytes) of memory that they may hold in all before idle ones are ended. None: no limit."""
    agent_starts: int = 2
    """Agents that may be starting at once in this node."""
    consumer_timeout: float = 1800.0
    """RabbitMQ only: seconds for which it lets a task keep its message (``consumer_timeout`` of the server)."""
    live_output_mb: float = 4.0
    """Megabytes (10^6 bytes) of each running task's output that Redis keeps for those who follow it; 0: none."""
    live_ttl: float = 3600.0
    """Seconds for which it is kept after the last of it came."""
    metrics_port: int = 0
    """Where each node serves ``/metrics`` for Prometheus; 0: nowhere."""
    metrics_host: str = "127.0.0.1"
    """The address of this machine on which it does."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", self.namespace):
            raise ConfigError(f"namespace={self.namespace!r}: must be 1 to 64 letters, digits, _ or -")
        if not isinstance(self.shards, int) or not 1 <= self.shards <= MAX_SHARDS:
            raise ConfigError(f"shards={self.shards!r}: must be a whole number from 1 to {MAX_SHARDS}")
        if self.node_shards is not None and not self.node_shards:
            raise ConfigError("node_shards is empty: name at least one shard, or leave it unset for all")
        for shard in self.node_shards or ():
            if not 0 <= shard < self.shards:
                raise ConfigError(f"node_shards names shard {shard}: must be from 0 to {self.shards - 1}")
        if self.execution not in EXECUTION_POOLS:
            raise ConfigError(f"execution={self.execution!r}: must be one of {', '.join(EXECUTION_POOLS)}")
        if self.concurrency is not None and self.concurrency < 1:
            raise ConfigError(f"concurrency={self.concurrency!r} tasks: must be 1 or more")
        if self.execution != "threads" and self.concurrency not in (None, 1):
            raise ConfigError(
                f"concurrency={self.concurrency} with execution={self.execution!r}: must be 1, or a key's tasks would"
                " land in different processes. Use execution='threads', or start several nodes"
            )
        check_number("key_concurrency", self.key_concurrency, "must be a whole number, 1 or more", unit="tasks")
        for name in _TIMES:
            check_number(name, getattr(self, name), "must be more than 0")
        check_number("lease_grace", self.lease_grace, "must be 0 or more", above=-1e-9)
        self._check_observation()
        self._check_lease_ttl()
        self._check_agents()

    def _check_observation(self) -> None:
        check_number("live_output_mb", self.live_output_mb, "must be 0 or more", above=-1e-9, unit="MB")
        if not isinstance(self.metrics_port, int) or not 0 <= self.metrics_port < 1 << 16:
            raise ConfigError(f"metrics_port={self.metrics_port!r}: must be a port from 1 to 65535, or 0 for none")

    def _check_agents(self) -> None:
        for name in ("max_agents", "agent_starts"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name}={value!r} agents: must be a whole number, 1 or more")
        if self.max_agents_mb is not None:
            check_number("max_agents_mb", self.max_agents_mb, "must be more than 0, or None for no limit", unit="MB")

    @property
    def agent_limit(self) -> GroupLimit:
        """What the agents of this node may take up."""
        weight = None if self.max_agents_mb is None else 1e6 * self.max_agents_mb
        return GroupLimit(self.max_agents, weight, self.agent_starts)

    def _check_lease_ttl(self) -> None:
        check_number(
            "lease_ttl",
            self.lease_ttl,
            f"must be more than 2 x lease_heartbeat={self.lease_heartbeat!r} s, or one late heartbeat loses the shards",
            above=2 * self.lease_heartbeat,
        )
        if self.lease_ttl > MAX_LEASE_TTL:
            raise ConfigError(
                f"lease_ttl={self.lease_ttl!r} s: must be at most {MAX_LEASE_TTL:g}: so long a dead node's tasks wait"
            )

    @property
    def leased(self) -> bool:
        """Whether the shards of this node come and go by leases."""
        return self.node_shards is None

    @property
    def tasks_at_once(self) -> int:
        """Concurrency of the execution pool."""
        return self.concurrency or (32 if self.execution == "threads" else 1)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Self:
        """Read ``POOL_*`` variables. Raises `ConfigError` that names the variable, its value and the rule."""
        env = _Environment(os.environ if environ is None else environ)
        shards = env.integer("POOL_SHARDS", 64)
        pool = env.guard(
            PoolConfig,
            idle_timeout=env.seconds("POOL_IDLE_TIMEOUT", 300.0),
            max_backends=env.integer("POOL_MAX_BACKENDS", 200),
            acquire_timeout=env.seconds("POOL_ACQUIRE_TIMEOUT", 30.0),
        )
        hosts_file = env.text("POOL_HOSTS_FILE")
        data_dir = env.text("POOL_DATA_DIR")
        settings: Self = env.guard(
            cls,
            broker_url=env.text("POOL_BROKER_URL"),
            redis_url=env.text("POOL_REDIS_URL"),
            result_url=env.text("POOL_RESULT_URL"),
            namespace=env.text("POOL_NAMESPACE") or "pool",
            shards=shards,
            node_shards=env.ranges("POOL_NODE_SHARDS"),
            lease_ttl=env.seconds("POOL_LEASE_TTL", 5.0),
            lease_heartbeat=env.seconds("POOL_LEASE_HEARTBEAT", 1.0),
            lease_grace=env.seconds("POOL_LEASE_GRACE", 120.0),
            handoff_timeout=env.seconds("POOL_HANDOFF_TIMEOUT", 300.0),
            execution=env.text("POOL_EXECUTION") or "threads",
            concurrency=env.integer("POOL_CONCURRENCY", None),
            key_concurrency=env.integer("POOL_KEY_CONCURRENCY", 4),
            hosts_file=Path(hosts_file) if hosts_file else None,
            data_dir=Path(data_dir).absolute() if data_dir else Path.cwd() / ".pool",
            sweep_interval=env.seconds("POOL_SWEEP_INTERVAL", 60.0),
            close_interval=env.seconds("POOL_CLOSE_INTERVAL", 60.0),
            chat_ttl=env.seconds("POOL_CHAT_TTL", 1800.0),
            max_agents=env.integer("POOL_MAX_AGENTS", 20),
            max_agents_mb=env.number("POOL_MAX_AGENTS_MB", None, "a number of megabytes"),
            agent_starts=env.integer("POOL_AGENT_STARTS", 2),
            consumer_timeout=env.seconds("POOL_CONSUMER_TIMEOUT", 1800.0),
            live_output_mb=env.number("POOL_LIVE_OUTPUT_MB", 4.0, "a number of megabytes"),
            live_ttl=env.seconds("POOL_LIVE_TTL", 3600.0),
            metrics_port=env.integer("POOL_METRICS_PORT", 0),
            metrics_host=env.text("POOL_METRICS_HOST") or "127.0.0.1",
            pool=pool,
        )
        return settings


class _Environment:
    """Typed reads of environment variables with errors that name the variable."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.environ = environ

    def text(self, name: str) -> str | None:
        return self.environ.get(name, "").strip() or None

    def integer(self, name: str, default: Any) -> Any:
        value = self.text(name)
        if value is None:
            return default
        try:
            return int(value)
        except ValueError:
            raise ConfigError(f"{name}={value!r}: must be a whole number") from None

    def seconds(self, name: str, default: float) -> float:
        return float(self.number(name, default, "a number of seconds", " s"))

    def number(self, name: str, default: Any, rule: str, unit: str = "") -> Any:
        value = self.text(name)
        if value is None:
            return default
        try:
            return float(value)
        except ValueError:
            raise ConfigError(f"{name}={value!r}{unit}: must be {rule}") from None

    def ranges(self, name: str) -> tuple[int, ...] | None:
        """``"0-31,40"`` -> (0, ..., 31, 40)."""
        value = self.text(name)
        if value is None:
            return None
        found: set[int] = set()
        for part in value.split(","):
            match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
            if match is None or (match[2] and int(match[2]) < int(match[1])):
                raise ConfigError(f"{name}={value!r}: must be shards and ranges such as 0-31,40; {part!r} is neither")
            last = int(match[2] or match[1])
            if last >= MAX_SHARDS:  # said before a slip of the finger fills the memory
                raise ConfigError(f"{name}={value!r}: shard {last}: must be from 0 to {MAX_SHARDS - 1}")
            found.update(range(int(match[1]), last + 1))
        return tuple(sorted(found))

    def guard(self, make: Any, **values: Any) -> Any:
        """Make a config object; name the variable in its error, where there is one."""
        try:
            return make(**values)
        except ConfigError as error:
            field_name = re.match(r"\w+", str(error))
            variable = f"POOL_{field_name[0].upper()}" if field_name else ""
            raise ConfigError(f"{variable}: {error}" if variable in self.environ else str(error)) from None
