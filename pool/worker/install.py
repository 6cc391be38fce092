"""`install`: what turns a Celery app into one whose workers host a backend pool."""

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from celery import Celery, signals

from pool.agents import GROUP, NO_AGENTS
from pool.backends.base import Backend, Claim
from pool.config import Settings
from pool.hosts import Hosts, make_backend
from pool.manager import BackendPoolManager
from pool.observer import Observer
from pool.sharding.hashing import shard_of
from pool.sharding.ownership import FOREVER, Ownership
from pool.worker import rabbitmq
from pool.worker.agreement import Agreement
from pool.worker.board import Board
from pool.worker.chats import chats_for
from pool.worker.consumption import Consumption
from pool.worker.gauges import gauges_for
from pool.worker.host import Host
from pool.worker.hub import HubCalls
from pool.worker.line import Line
from pool.worker.router import ShardRouter
from pool.worker.running import Running
from pool.worker.steps import Events, Steps
from pool.worker.takeover import takeover_for
from pool.worker.tenant import Tenant
from pool.worker.transport import ShardConnection, ShardTransport

PREFETCH = {"threads": 2, "prefork": 1, "solo": 1}
"""Messages per place for a running task. With threads as many again may wait for their key's turn (see `Turns`)."""


def install(
    app: Celery,
    settings: Settings | None = None,
    *,
    backend_class: Callable[..., Backend] | None = None,
    default_config: Mapping[str, Any] | None = None,
) -> "WarmPool":
    """Add keyed routing, shard queues, the backend pool and its beat entries to *app*; returns what was added.

    Call it after the app was configured, in code that producers, workers and beat all import. *settings*: None reads
    the environment. Backends come from the hosts file of the settings, or from *backend_class* with *default_config*.

    What the app has of its own stays: its routes (ours come first and concern keyed tasks only), queues, beat
    entries. ``worker_pool``, ``worker_concurrency`` and ``worker_prefetch_multiplier`` are set from the settings, and
    ``result_backend_always_retry`` is on.
    Raises `ConfigError`.
    """
    settings = settings or Settings.from_env()
    broker = app.conf.broker_url or settings.broker_url  # the one that is used
    settings = replace(settings, broker_url=broker, redis_url=settings.redis_url or _coordination(broker))
    extension = WarmPool(app, settings, backend_class, default_config)
    app.warm_pool = extension
    own_routes = app.conf.task_routes or ()
    if not isinstance(own_routes, list | tuple):
        own_routes = (own_routes,)
    app.conf.update(
        task_routes=(extension.router, *own_routes),
        worker_pool=settings.execution,
        worker_concurrency=settings.tasks_at_once,
        worker_prefetch_multiplier=PREFETCH[settings.execution],
        result_backend_always_retry=True,  # or a task fails that cannot say it has started, before it has run
        beat_schedule={**extension.beat_schedule(), **app.conf.beat_schedule},
    )
    app.amqp.Connection = ShardConnection
    if app.connection_for_write().get_transport_cls() is ShardTransport:
        # Producers, too: nodes look at one list for each queue, not at those that messages with a priority go to.
        app.conf.broker_transport_options = {"priority_steps": [0], **(app.conf.broker_transport_options or {})}
    elif rabbitmq.is_amqp(settings.broker_url):
        rabbitmq.configure(app, settings)
    for queue in extension.router.queues:
        app.amqp.queues.add(queue)  # known by name (a retry names it); consumed only where the bootstep says so
    from pool.worker import control, maintenance  # noqa: F401 - registers remote control commands and shared tasks
    from pool.worker.bootsteps import BackendPoolStep, ClaimsStep, ConsumptionStep, OwnershipStep

    app.steps["worker"].update((BackendPoolStep, OwnershipStep))
    app.steps["consumer"].update((ClaimsStep, ConsumptionStep))
    return extension


def _coordination(broker: Any) -> str | None:
    """The broker, if leases can be kept there."""
    plain = isinstance(broker, str) and broker.startswith(("redis", "valkey")) and ";" not in broker
    return broker if plain else None


class WarmPool:
    """What `install` adds to an app; reachable as ``app.warm_pool``."""

    def __init__(
        self,
        app: Celery,
        settings: Settings,
        backend_class: Callable[..., Backend] | None,
        default_config: Mapping[str, Any] | None,
    ) -> None:
        self.settings = settings
        self._app = app
        self.router = ShardRouter(settings, lambda name: app.tasks.get(name))  # noqa: PLW0108 - tasks may come later
        self.router.agreed = Agreement(settings).check
        self.closing = False
        self.node = ""  # the name of this worker, if it is one
        self.in_process = True  # the pool lives in the worker's main process
        self.tenant: Tenant | None = None
        self.turns: Any = None  # whose turn it is, where the execution pool keeps that
        self.ownership = Ownership(settings.shards, settings.lease_grace)
        self.host: Host | None = None  # of this process, if it has the backends of a worker
        if not settings.leased:
            self.ownership.trust(FOREVER)
            for shard in settings.node_shards or ():
                self.ownership.hold(shard, 1)
        self._lock = threading.Lock()
        self._pid = 0
        self._pool: BackendPoolManager[Any] | None = None
        self._running = Running()
        self._make_pool: Callable[[Observer | None], BackendPoolManager[Any]]
        agents = NO_AGENTS
        trust = self.ownership.remaining if settings.leased else None
        claim_for = self._claim_for if settings.leased else None
        if backend_class is not None:
            self.backends_from = getattr(backend_class, "__qualname__", repr(backend_class))
            self._make_pool = lambda observer: BackendPoolManager(
                backend_class,
                default_config,
                settings=settings.pool,
                trust=trust,
                observer=observer,
                claim_for=claim_for,
            )
        else:
            hosts = Hosts.load(settings.hosts_file) if settings.hosts_file else Hosts.local(settings.data_dir)
            self.backends_from = hosts.source
            agents = hosts.agents
            pool_settings = settings.pool.changed(groups={**settings.pool.groups, GROUP: settings.agent_limit})
            self._make_pool = lambda observer: BackendPoolManager(
                make_backend,
                default_config,
                config_for=hosts.config_for,
                group_for=agents.group_for,
                settings=pool_settings,
                trust=trust,
                observer=observer,
                claim_for=claim_for,
            )
        self.chats = chats_for(self, agents)
        signals.worker_process_init.connect(self._on_process_init, weak=False)
        signals.worker_process_shutdown.connect(self._on_process_shutdown, weak=False)

    def lane_of(self, task: str) -> str | None:
        """The lane of the tasks of this name; see `PooledTask.lane`."""
        lane: str | None = getattr(self._app.tasks.get(task), "lane", None)
        return lane

    # -- ownership

    def _claim_for(self, key: str) -> Claim | None:
        """Under which epoch this node owns the key; None: this process is no node."""
        if self.host is None:
            return None
        ownership, shard = self.ownership, shard_of(key, self.settings.shards)
        epoch = ownership.epoch(shard) if ownership.owns(shard) else 0
        grace = ownership.grace if epoch or ownership.may_go_on(shard) else 0.0
        return Claim(f"{self.settings.namespace}:{key}", epoch, grace)

    def queue_for(self, key: str) -> str:
        """Return the name of the queue that the key's tasks go to."""
        name: str = self.router.queues[shard_of(key, self.settings.shards)].name
        return name

    # -- a worker

    def prepare_worker(self, worker: Any, *, in_process: bool = True) -> None:
        """Make what a worker needs before it forks children. *in_process*: it does not."""
        settings = self.settings
        self.node, self.in_process = worker.hostname, in_process
        self.line, self.board = Line(), Board()
        self.steps = Steps(self, Events(worker.app, self.node, enabled=worker.task_events))
        self.limits = (worker.time_limit, worker.soft_time_limit) if in_process else None
        self.turns = None
        self.calls = HubCalls()
        self.consumption = Consumption(self.router)
        self.gauges = gauges_for(self)
        self.takeover = takeover_for(worker.app, settings)
        self.router.agreed = lambda: None  # a node agrees with the others when it joins
        if settings.leased:
            self.tenant = Tenant(self, worker.hostname)
        else:
            self.takeover.adopt(worker.hostname)
            self.consumption.add(settings.node_shards or ())

    def pressed(self, queue: str, full: bool) -> None:
        """Too many tasks of a queue wait for their turn (told on the hub's thread), or they do no longer."""
        if full:
            self.consumption.press(queue)
        else:
            self.calls.post(lambda: self.consumption.press(queue))

    # -- the pool of this process

    @property
    def pool(self) -> BackendPoolManager[Any]:
        """The pool of this process, made on first use; it connects nothing until a task asks."""
        if self._pid != os.getpid():
            with self._lock:
                if self._pid != os.getpid():
                    self.host = Host(self) if self.node else None
                    self._pool = self._make_pool(None if self.host is None else self.host.observer)
                    self._pid = os.getpid()
                    self.chats.prepare()
                    if self.host is not None:
                        self.host.begin(self._pool)
        assert self._pool is not None
        return self._pool

    @property
    def running(self) -> Running:
        """The tasks that run in this process."""
        _ = self.pool
        return self._running if self.host is None else self.host.running

    def close(self, grace: float) -> None:
        """Close the pool of this process; tasks that still use it get *grace* seconds."""
        if self._pid == os.getpid() and self._pool is not None:
            self.closing = True
            self._pool.destroy_all(grace)
            if self.host is not None:
                self.host.close()

    def _on_process_init(self, **_kwargs: Any) -> None:
        """Celery started a worker process (prefork child, or solo): a pool of its own, which connects nothing yet."""
        self._lock = threading.Lock()  # the parent's may have been held while it forked
        self.closing = False
        self._pid = 0
        _ = self.pool

    def _on_process_shutdown(self, **_kwargs: Any) -> None:
        """Celery ends a prefork child, which has no task any more; a hard time limit leaves it 0.1 s."""
        self.close(grace=0.0)

    # -- beat

    def beat_schedule(self) -> dict[str, dict[str, Any]]:
        """A sweep and a close pass for each shard; each message expires before the next one is due."""
        schedule: dict[str, dict[str, Any]] = {}
        passes = (
            ("pool-sweep", "pool.sweep_shard", self.settings.sweep_interval),
            ("pool-close-idle", "pool.close_idle_chats", self.settings.close_interval),
        )
        for shard in range(self.settings.shards):
            for entry, task, interval in passes:
                schedule[f"{entry}-{shard:03d}"] = {
                    "task": task,
                    "schedule": interval,
                    "args": (shard,),
                    "options": {"expires": interval, "ignore_result": True},
                }
        return schedule
