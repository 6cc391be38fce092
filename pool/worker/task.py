"""`PooledTask`: base class of tasks that have a key."""

import inspect
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

from celery import Task, signals
from celery.exceptions import Ignore, Reject

from pool.backends.base import Backend
from pool.borrowing import Borrowed, Borrowing
from pool.errors import (
    AcquireTimeout,
    BackendClosed,
    BackendUnavailable,
    ConfigError,
    InvalidKey,
    NotOwner,
    PoolError,
    TaskCancelled,
)
from pool.keys import check_key
from pool.manager import BackendPoolManager
from pool.sharding.hashing import shard_of
from pool.worker.masking import masked
from pool.worker.router import KEY_HEADER

if TYPE_CHECKING:
    from pool.worker.chats import ChatTurn

_Parameter = inspect.Parameter

MIN_RETRY_DELAY = 0.5
"""Seconds before a task whose backend was unavailable is tried again, at least."""


EXHAUSTED_DELAY = 1.0
"""Seconds before a task that got no backend in time is tried again (`PooledTask.retry_exhausted`), more each time."""


class PooledTask(Task):
    """``@shared_task(base=PooledTask, bind=True, key="user_id")``.

    *key* names the argument by which the task is routed: tasks with the same key run in the same worker process and
    share one warm backend, ``self.backend()``. Without *key* the producer sends the header ``pool_key``.

    Messages are acknowledged late: a task whose worker dies runs again. One whose backend is unavailable is retried
    after the error's ``retry_after``, at most ``max_retries`` times; ``retry_unavailable = False`` turns that off.
    """

    abstract = True
    acks_late = True
    reject_on_worker_lost = True
    max_retries = 8
    retry_unavailable = True
    retry_exhausted = False
    """Try again later when there was no backend in time (`AcquireTimeout`: the pool is full, or was full for so long
    that the backend could not be ready in time), as often as when one is unavailable."""

    lane: str | None = None
    """Tasks of one key in the same lane run one at a time, in order; those that wait hold no thread (with threads)."""
    progress = False
    """Store the state ``PROGRESS`` while it runs, with ``bytes`` and ``lines`` of output and seconds ``elapsed``."""
    key: str | None = None
    durable: str | None = None
    """Names an argument: if it is true, all that the task writes is the output of one durable command, the same each
    time that the task is delivered. Who follows its live output is shown each byte once."""
    shard: str | None = None
    """Instead of *key*: names an argument that is the number of a shard; for maintenance."""
    secrets: Sequence[str] = ()
    """Names arguments whose values logs, events, Flower and ``inspect`` show as ``***``; see `pool.worker.masking`."""

    Request = "pool.worker.masked_request:MaskedRequest"  # imported by workers only

    @classmethod
    def on_bound(cls, app: Any) -> None:
        """Check at start that the arguments exist. Raises `ConfigError`."""
        super().on_bound(app)
        known = list(_arguments(cls))
        one_each = [("key", cls.key), ("shard", cls.shard), ("durable", cls.durable)]
        named = [*one_each, *(("secrets", name) for name in cls.secrets)]
        for field, name in named:
            if name is not None and name not in known:
                raise ConfigError(f"task {cls.name}: {field}={name!r} is not one of its arguments ({', '.join(known)})")

    # -- routing

    def key_argument(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return the key among the arguments, or None for a task that is keyed by header only."""
        return None if self.key is None else self._argument(self.key, args, kwargs)

    @property
    def shard_argument(self) -> Any:
        """A function like `key_argument`, for tasks that are routed by the number of a shard; else None."""
        return None if self.shard is None else lambda args, kwargs: self._argument(self.shard, args, kwargs)

    def _argument(self, name: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        value = self._value(name, args, kwargs)
        if value is _Parameter.empty:
            raise InvalidKey(
                f"task {self.name} needs its argument {name!r}: it is the {'key' if self.key else 'shard'}"
            )
        return value

    def _value(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What the argument is, given or by default; `inspect.Parameter.empty`: neither."""
        if name in kwargs:
            return kwargs[name]
        position, default = _arguments(type(self))[name]
        return args[position] if position is not None and position < len(args) else default

    @property
    def pool_key(self) -> str:
        """The key of the message that is being worked on. Raises `InvalidKey`."""
        return self._key_of(self.request)

    def _key_of(self, request: Any) -> str:
        key = self.key_argument(request.args or (), request.kwargs or {})
        return check_key(request.get(KEY_HEADER) if key is None else key)

    def same_output(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
        """Return the id under which every attempt writes the same output; None: each one writes its own."""
        value = None if self.durable is None else self._value(self.durable, args, kwargs)
        return "durable" if value and value is not _Parameter.empty else None

    def masked(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Return the arguments as they may be shown; None: as they are, there is no secret among them."""
        return masked(self.secrets, list(_arguments(type(self))), args, kwargs) if self.secrets else None

    # -- the backend

    @property
    def pool(self) -> BackendPoolManager[Any]:
        """The backend pool of this worker process."""
        pool: BackendPoolManager[Any] = self._extension.pool
        return pool

    @property
    def _extension(self) -> Any:
        extension = getattr(self.app, "warm_pool", None)
        if extension is None:
            raise ConfigError(f"task {self.name}: call pool.install(app, settings) for app {self.app.main!r} first")
        return extension

    def acquire_backend(self, agent: str | None = None, config: Mapping[str, Any] | None = None) -> Borrowed[Any]:
        """Borrow the key's backend: a handle with ``backend``, ``warm`` and ``release()``.

        Raises `NotOwner` when this node does not own the key's shard (any more), and what
        `BackendPoolManager.acquire_backend` raises.
        """
        request, extension = self.request, self._extension
        key = self._key_of(request)
        shard = self._owned_shard(key, request, extension)
        if agent is not None:
            extension.running.uses(str(request.id), agent)
        borrowed: Borrowed[Any] = extension.pool.acquire_backend(key, agent, config)
        # Again: a backend that was made after the shard was dropped is nobody's to close.
        if shard is not None and not extension.ownership.owns(shard):
            borrowed.release()
            raise _not_owner(key, extension)
        return borrowed

    def chat(self, agent: str) -> AbstractContextManager["ChatTurn"]:
        """``with self.chat(agent) as chat:`` borrows the agent of the task's chat, with its session ready to `prompt`.

        Raises `ConfigError` for an agent that the hosts file does not name, and what `acquire_backend` raises.
        """
        extension = self._extension
        turn: AbstractContextManager[ChatTurn] = extension.chats.turn(
            self, agent, extension.settings.pool.acquire_timeout
        )
        return turn

    def _owned_shard(self, key: str, request: Any, extension: Any) -> int | None:
        """The key's shard, which this node owns; None: the task runs outside of a worker. Raises `NotOwner`."""
        if request.is_eager or request.called_directly:
            return None
        shard = shard_of(key, extension.settings.shards)
        if not extension.ownership.owns(shard):
            raise _not_owner(key, extension)
        came_by = extension.router.shard_in(request.delivery_info)
        if came_by not in (None, shard):
            raise NotOwner(
                f"key {key!r} belongs to {extension.queue_for(key)}, but came by shard {came_by}: does its producer"
                f" count other than {extension.settings.shards} shards?"
            )
        return shard

    @property
    def backend(self) -> Any:
        """``with self.backend() as backend:`` borrows the key's backend (``agent=``, ``config=``).

        Celery keeps its result backend under this very name; everything but the call is passed on to that.
        """
        return _BackendDoor(self)

    @backend.setter
    def backend(self, value: Any) -> None:
        self._backend = value

    @property
    def result_backend(self) -> Any:
        """Celery's result backend itself."""
        return super().backend

    def AsyncResult(self, task_id: str, **kwargs: Any) -> Any:  # noqa: N802 - Celery's name
        """As Celery's, on the result backend itself."""
        return self.app.AsyncResult(task_id, backend=self.result_backend, task_name=self.name, **kwargs)

    # -- running

    def _lost_its_place(self) -> bool:
        """Whether the message came the right way, and it is this node that may not work on it any more."""
        extension = self._extension
        if extension.closing:
            return True
        shard = extension.router.shard_in(self.request.delivery_info)
        if shard is None or extension.ownership.owns(shard):
            return False
        return self.shard is not None or bool(shard == shard_of(self.pool_key, extension.settings.shards))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the task's code; decide what a backend that is not there means for the message."""
        request = self.request
        if request.called_directly:  # as a plain function: Celery gives it a request of its own
            return super().__call__(*args, **kwargs)
        if request.is_eager:
            return self._run(args, kwargs)
        try:
            key = None if self.shard else self._key_of(request)
        except InvalidKey:  # it is told when the task asks for its backend
            key = None
        try:
            with self._extension.running.task(self, key):
                return self._run(args, kwargs)
        except TaskCancelled as error:  # stored when the run has ended: no report of its progress comes later
            self._revoked(str(error))
            raise Ignore from None

    def _losses(self) -> int:
        """How often this node has lost the message's shard so far."""
        shard = self._extension.router.shard_in(self.request.delivery_info)
        return 0 if shard is None else self._extension.ownership.losses(shard)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        losses = self._losses()
        try:
            return self.run(*args, **kwargs)
        except TaskCancelled:
            raise
        except PoolError as error:
            # A node that shuts down at once, or has lost the shard, ends what runs: the messages go back unharmed.
            # It may own the shard again by now, when the end of what ran has taken longer.
            ended = isinstance(error, BackendClosed | NotOwner) and self._losses() != losses
            if ended or self._lost_its_place() or (isinstance(error, NotOwner) and error.epoch):
                raise Reject(str(error), requeue=True) from None
            delay = self._retry_delay(error)
            if delay is None:
                raise
            raise self.retry(exc=error, countdown=delay) from None

    def _revoked(self, reason: str) -> None:
        """Store and tell what Celery does of a task that it terminates."""
        request = self.request
        self.result_backend.mark_as_revoked(request.id, reason, request=request, store_result=not request.ignore_result)
        self.send_event("task-revoked", terminated=True, signum=None, expired=False)
        signals.task_revoked.send(sender=self, request=request, terminated=True, signum=None, expired=False)

    def _retry_delay(self, error: PoolError) -> float | None:
        """Seconds until the task is to be tried again; None: it has failed."""
        if isinstance(error, AcquireTimeout) and self.retry_exhausted:
            return EXHAUSTED_DELAY * (1 + int(self.request.retries))
        if isinstance(error, BackendUnavailable) and self.retry_unavailable and error.retry_after is not None:
            return max(MIN_RETRY_DELAY, error.retry_after)
        return None


class _BackendDoor:
    """Celery's result backend of a task, which can also be called to borrow the key's backend."""

    __slots__ = ("_task",)

    def __init__(self, task: PooledTask) -> None:
        self._task = task

    def __call__(
        self, agent: str | None = None, config: Mapping[str, Any] | None = None
    ) -> AbstractContextManager[Backend]:
        return Borrowing(self._task.acquire_backend, (agent, config))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task.result_backend, name)

    def __reduce__(self) -> Any:
        return self._task.result_backend.__reduce__()


def _not_owner(key: str, extension: Any) -> NotOwner:
    return NotOwner(f"key {key!r} belongs to {extension.queue_for(key)}, which this node does not own")


class _Argument(NamedTuple):
    """A parameter of a task's function."""

    position: int | None
    """None: it is given by name only."""
    default: Any


def _arguments(task: type[PooledTask]) -> dict[str, _Argument]:
    """The task function's parameters by name, in order, without ``self``; looked up once per task."""
    cached: dict[str, _Argument] | None = task.__dict__.get("_pool_arguments")
    if cached is None:
        found = list(inspect.signature(task.run).parameters.values())
        if not isinstance(inspect.getattr_static(task, "run"), staticmethod):
            found = found[1:]
        by_position = (_Parameter.POSITIONAL_ONLY, _Parameter.POSITIONAL_OR_KEYWORD)
        cached = {
            each.name: _Argument(position if each.kind in by_position else None, each.default)
            for position, each in enumerate(found)
        }
        task._pool_arguments = cached
    return cached
