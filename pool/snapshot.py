"""What a pool holds at one moment, read from its `Lifecycle` under the pool's lock."""

from typing import NamedTuple

from pool.entry import Entry, Tell
from pool.keys import shown
from pool.lifecycle import Lifecycle
from pool.observer import Step
from pool.stats import PoolStats


class BackendInfo(NamedTuple):
    """One live backend. Times in seconds."""

    key: str
    """``(none)``: it has no key; ``(shared)``: many keys share it."""
    agent: str
    kind: str
    """As `Backend.kind`; "" while it connects for the first time."""
    state: str
    """``connecting``, ``idle``, ``busy`` or ``retired``."""
    status: str
    """As `Backend.status`; "" while it connects for the first time."""
    users: int
    waiters: int
    uses: int
    """How often it was acquired."""
    age: float
    """Since it was connected, or, while it connects, since that was begun."""
    idle: float | None
    busy: float | None
    """Since when nobody, or somebody, uses it."""
    group: str | None
    weight: int
    """Bytes, as last measured."""
    mode: str
    """As `Backend.mode`."""


def stats_of(life: Lifecycle, now: float) -> PoolStats:
    """Count everything; see `BackendPoolManager.get_stats`."""
    live, totals = life.live, life.counters
    by_key: dict[str, int] = {}
    for primary, _ in life.entries:
        by_key[primary] = by_key.get(primary, 0) + 1
    modes: dict[str, int] = {}
    for entry in live:
        if entry.backend is not None and (mode := entry.backend.mode):
            word = mode.partition(":")[0]
            modes[word] = modes.get(word, 0) + 1
    return PoolStats(
        total_backends=life.total,
        active_backends=sum(1 for entry in live if entry.users),
        idle_backends=len(life.idle),
        backends_by_key=by_key,
        modes=modes,
        connecting=sum(1 for entry in live if entry.state == "connecting"),
        retired=sum(1 for entry in live if entry.state == "retired"),
        waiting=life.counts["waiting"],
        hits=totals.hits,
        connects=totals.connects,
        connect_failures=totals.connect_failures,
        failures=dict(totals.failures),
        evicted_idle=totals.evicted_idle,
        evicted_lru=totals.evicted_lru,
        retired_total=totals.retired,
        oldest_busy=max((now - entry.busy_since for entry in live if entry.users), default=0.0),
        groups=life.groups.counts(life.config),
    )


def infos_of(life: Lifecycle, now: float, key: str | None = None) -> list[BackendInfo]:
    """Describe each live backend, of one key or of all."""
    return [info_of(entry, now) for entry in life.live if key is None or (entry.pooled and entry.identity[0] == key)]


def step_of(tell: Tell) -> Step:
    """Return what an observer gets to see."""
    kind = "" if tell.backend is None else tell.backend.kind
    key = shown(tell.identity[0], pooled=tell.pooled)
    return Step(tell.what, key, tell.identity[1], kind, tell.reason, tell.seconds)


def info_of(entry: Entry, now: float) -> BackendInfo:
    """Describe one."""
    backend = entry.backend
    return BackendInfo(
        key=shown(entry.identity[0], pooled=entry.pooled),
        agent=entry.identity[1],
        kind="" if backend is None else backend.kind,
        state=entry.state,
        status="" if backend is None else str(backend.status),
        users=entry.users,
        waiters=len(entry.waiters),
        uses=entry.uses,
        age=now - (entry.began if backend is None else entry.born),
        idle=now - entry.idle_since if entry.state == "idle" else None,
        busy=now - entry.busy_since if entry.users else None,
        group=entry.group,
        weight=0 if backend is None else backend.weight,
        mode="" if backend is None else backend.mode,
    )
