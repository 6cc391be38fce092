"""Settings of the Celery app that bite: each works until it does not."""

from collections.abc import Iterator
from typing import Any

from celery.backends.base import DisabledBackend
from kombu.exceptions import ContentDisallowed
from kombu.utils.url import maybe_sanitize_url

from pool.doctor.broker import longest_limit
from pool.doctor.deployment import Deployment
from pool.doctor.finding import Finding, error, info, ok, warning
from pool.errors import CommandFailed
from pool.worker.install import PREFETCH
from pool.worker.task import PooledTask

_OWN = "pool."
"""Names of the tasks that come with the pool begin so."""


def check_settings(deployment: Deployment) -> Iterator[Finding]:
    """Those of the app as it is configured here; workers with other code or variables are not seen."""
    conf = deployment.app.conf
    found = [*_running(deployment, conf), *_limits(deployment, conf), *_tasks(deployment, conf)]
    yield from found
    if not any(finding.level in ("warning", "error") for finding in found):
        yield ok("settings", f"Nothing in the settings bites; {len(deployment.tasks)} tasks were looked at.")


def check_results(deployment: Deployment) -> Iterator[Finding]:
    """Where results go, for how long, and whether a failure gets through."""
    app, conf = deployment.app, deployment.app.conf
    if isinstance(app.backend, DisabledBackend):
        yield warning(
            "result-backend",
            f"result_backend is {maybe_sanitize_url(conf.result_backend)!r}.",
            "Nobody can read what a task returned, whether it failed, or wait for it.",
            "POOL_RESULT_URL=redis://... (of an app of your own: result_backend).",
        )
        return
    if not conf.result_expires:
        yield warning(
            "result-expiry",
            f"result_expires is {conf.result_expires!r}.",
            "Results are kept for ever: the result backend fills up.",
            "result_expires=3600 (seconds).",
        )
    problem = _round_trip(app)
    if problem:
        yield error(
            "result-serializer",
            f"result_serializer={conf.result_serializer!r} does not carry a failure: {problem}",
            "A task that fails looks as if its result were lost.",
            "result_serializer='json', with 'json' in accept_content (and result_accept_content, if set).",
        )


def _round_trip(app: Any) -> str:
    """Write down a failure as a worker does, and read it as a producer does; return what is wrong."""
    given = CommandFailed("exit code 1")
    backend = app.backend
    try:
        stored = backend.decode(backend.encode({"result": backend.prepare_exception(given)}))
        found = backend.exception_to_python(stored["result"])
    except (ContentDisallowed, TypeError, ValueError, KeyError) as problem:
        return f"{type(problem).__name__}: {problem}"
    return "" if str(given) in str(found) else f"it came back as {found!r}"


def _running(deployment: Deployment, conf: Any) -> Iterator[Finding]:
    settings = deployment.settings
    usual, prefetch = PREFETCH[settings.execution], conf.worker_prefetch_multiplier
    if not prefetch or prefetch > usual:
        yield warning(
            "prefetch",
            f"worker_prefetch_multiplier={prefetch!r}; install sets {usual} for {settings.execution}.",
            "A node takes more than it can run soon: other nodes idle, and a handoff has more to give back.",
            f"Leave it to install, or worker_prefetch_multiplier={usual}.",
        )
    forked = str(conf.worker_pool) in ("prefork", "processes")
    if forked and (conf.worker_concurrency or 2) > 1:
        yield error(
            "prefork-concurrency",
            f"worker_pool={conf.worker_pool!r} with worker_concurrency={conf.worker_concurrency!r}.",
            "Tasks of one key land in different processes: each has a backend of its own. Nodes refuse to start.",
            "POOL_EXECUTION=threads, or several nodes with POOL_CONCURRENCY=1.",
        )
    if conf.task_always_eager:
        yield error(
            "always-eager",
            "task_always_eager is on.",
            "Tasks run in the process that sends them: nothing is routed, no backend is shared.",
            "task_always_eager=False; it is for unit tests.",
        )
    if not conf.worker_send_task_events:
        yield info(
            "task-events",
            "worker_send_task_events is off.",
            "Flower and celery events see nodes, but no tasks.",
            "worker_send_task_events=True, or celery worker -E.",
        )
    if not conf.enable_utc:
        yield warning(
            "utc-off",
            f"enable_utc is off (timezone={conf.timezone!r}).",
            "An ETA means another moment on a machine in another zone, and in the hour when clocks change.",
            "enable_utc=True; set timezone for the schedule of beat.",
        )
    yield from _formats(conf)


def _formats(conf: Any) -> Iterator[Finding]:
    for name in ("accept_content", "result_accept_content"):
        risky = sorted(
            str(kind) for kind in conf[name] or () if "pickle" in str(kind) or "python-serialize" in str(kind)
        )
        if risky:
            yield warning(
                "pickle-accepted",
                f"{name} allows {', '.join(risky)}.",
                "Whoever can write to the broker or the result backend can run code in nodes and producers.",
                f"{name}=['json']",
            )
    if not any(str(conf.task_serializer) in kind for kind in map(str, conf.accept_content or ())):
        yield error(
            "task-serializer",
            f"task_serializer={conf.task_serializer!r} is not in accept_content={list(conf.accept_content or ())!r}.",
            "Nodes refuse what producers send.",
            "task_serializer='json' and accept_content=['json']",
        )


def _limits(deployment: Deployment, conf: Any) -> Iterator[Finding]:
    hard, soft = conf.task_time_limit, conf.task_soft_time_limit
    if hard and soft and soft >= hard:
        yield warning(
            "soft-limit",
            f"task_soft_time_limit={soft:g} s is not below task_time_limit={hard:g} s.",
            "The hard limit comes first: tasks get no chance to clean up.",
            f"task_soft_time_limit below {hard:g}.",
        )
    limit, whose = longest_limit(deployment)
    if limit > deployment.settings.handoff_timeout:
        yield info(
            "handoff-timeout",
            f"POOL_HANDOFF_TIMEOUT={deployment.settings.handoff_timeout:g} s is below {whose}={limit:g} s.",
            "A task that runs for longer when its shard moves to another node is ended, and runs again there.",
            f"POOL_HANDOFF_TIMEOUT={limit:g}, and as much time for nodes to stop.",
        )


def _tasks(deployment: Deployment, conf: Any) -> Iterator[Finding]:
    pooled = {name: task for name, task in deployment.tasks.items() if isinstance(task, PooledTask)}
    early = sorted(name for name, task in pooled.items() if not task.acks_late)
    if early:
        yield warning(
            "acks-early",
            f"acks_late is off for {', '.join(early)}.",
            "Their messages are gone when they start: a task whose node dies does not run again.",
            "Take acks_late=False out: PooledTask has it on.",
        )
    silent = sorted(name for name, task in pooled.items() if task.ignore_result and not name.startswith(_OWN))
    if conf.task_ignore_result or "tasks.builds.run_build" in silent:
        yield warning(
            "ignore-result",
            f"Results are ignored (task_ignore_result={conf.task_ignore_result}) of {', '.join(silent) or 'tasks'}.",
            "Nobody can read what they returned, or that they failed.",
            "task_ignore_result=False, and ignore_result=True for the tasks that need none.",
        )
