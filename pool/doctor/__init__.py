"""The doctor: looks at a deployment from outside and says what is, or will be, wrong with it, and what to do.

`docs/doctor.md` lists all that it may find.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from pool.doctor.broker import check_broker
from pool.doctor.checks import Check, examine
from pool.doctor.deployment import Deployment
from pool.doctor.finding import LEVELS, Finding, Level, error, worst
from pool.doctor.hosts import hosts_checks, hosts_of, variables
from pool.doctor.leftovers import check_embedded, check_processes
from pool.doctor.messages import check_messages
from pool.doctor.nodes import check_nodes
from pool.doctor.redis import redis_checks
from pool.doctor.secrets import Secrets
from pool.doctor.settings import check_results, check_settings

__all__ = ["LEVELS", "TIMEOUT", "Finding", "Level", "diagnose", "worst"]

TIMEOUT = 5.0
"""Seconds for each check."""


def diagnose(app: Any, fix: bool = False, timeout: float = TIMEOUT) -> list[Finding]:
    """Examine *app*, its servers, hosts and nodes, and this machine; return what was found, in a fixed order.

    *fix*: also do what is safe to do: end left-over processes, have Redis evict nothing, put back the messages of dead
    nodes. *timeout*: seconds for each check; they run side by side. Never raises for what it finds, and no finding
    holds a password. *app* need not have been given to `pool.install`: that is a finding, too.
    """
    if getattr(app, "warm_pool", None) is None:
        return [
            error(
                "not-installed",
                f"pool.install was not called for the app {app.main!r}.",
                "It has no shard queues, and its workers no backend pool.",
                "pool.install(app), where the app is configured.",
            )
        ]
    deployment = Deployment(app, fix=fix, timeout=timeout)
    secrets = _secrets(deployment)
    simple: dict[str, Callable[[Deployment], Iterable[Finding]]] = {
        "settings": check_settings,
        "results": check_results,
        "nodes": check_nodes,
        "messages": check_messages,
        "processes": check_processes,
        "embedded Valkey": check_embedded,
    }
    checks = [
        Check("broker", partial(check_broker, deployment)),
        *redis_checks(deployment),
        *hosts_checks(deployment),
        *(Check(name, partial(check, deployment)) for name, check in simple.items()),
    ]
    return [secrets.clean(finding) for finding in examine(checks, timeout)]


def _secrets(deployment: Deployment) -> Secrets:
    conf, settings = deployment.app.conf, deployment.settings
    urls = (
        settings.broker_url,
        settings.redis_url,
        settings.result_url,
        *(conf[name] for name in ("broker_url", "broker_read_url", "broker_write_url", "result_backend")),
    )
    try:
        named = variables(hosts_of(deployment))
    except Exception:  # a hosts file that cannot be read names none
        named = []
    return Secrets.of(conf, urls, named)
