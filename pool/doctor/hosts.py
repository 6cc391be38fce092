"""The hosts file: whether it can be read, and what of this machine its entries need."""

import os
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pool.backends.secrets import read_secrets
from pool.doctor.checks import Check
from pool.doctor.deployment import Deployment
from pool.doctor.finding import Finding, error, many, ok, warning
from pool.doctor.ssh import Target, check_host
from pool.errors import ConfigError
from pool.hosts import Hosts

PROBE = "doctor"
"""The key that stands for all that a pattern fits."""


def hosts_checks(deployment: Deployment) -> list[Check]:
    """One for the file, and one for each host in it."""
    checks = [Check("hosts file", partial(check_file, deployment))]
    try:
        targets = ssh_targets(hosts_of(deployment))
    except Exception:  # the check of the file says it
        return checks
    return [*checks, *(Check(f"host {each}", partial(check_host, each, deployment)) for each in targets)]


def hosts_of(deployment: Deployment) -> Hosts:
    """Read the hosts file as it is now. Raises `ConfigError`."""
    settings = deployment.settings
    return Hosts.load(settings.hosts_file) if settings.hosts_file else Hosts.local(settings.data_dir)


def rules_of(hosts: Hosts) -> Iterator[tuple[str, Mapping[str, Any], str]]:
    """Each rule: where it stands, its fields, a key that it fits."""
    for pattern, rule in hosts.matches:
        yield f"[[match]] key = {pattern!r}", rule, PROBE if any(sign in pattern for sign in "*?[") else pattern
    if hosts.default is not None:
        yield "[default]", hosts.default, PROBE


def ssh_targets(hosts: Hosts) -> list[Target]:
    """The distinct logins of the file."""
    found = [Target.of(rule, where, key) for where, rule, key in rules_of(hosts) if rule["backend"] == "ssh"]
    return list({target.login: target for target in reversed(found)}.values())[::-1]


def variables(hosts: Hosts) -> list[str]:
    """Environment variables whose values are secrets."""
    found = [
        rule[name] for _, rule, _ in rules_of(hosts) for name in ("password_env", "passphrase_env") if name in rule
    ]
    for table in hosts.agents.tables.values():
        sources = [*dict(table.get("secrets", {})).values(), table.get("password", {})]
        found += [source["env"] for source in sources if "env" in source]
    return found


def check_file(deployment: Deployment) -> Iterator[Finding]:
    """The file, the folders and commands of this machine that it names."""
    file = deployment.settings.hosts_file
    try:
        hosts = hosts_of(deployment)
    except ConfigError as problem:
        yield error(
            "hosts-file",
            f"{problem}",
            "Nodes refuse to start.",
            "Correct the file; docs/hosts.md has every field.",
        )
        return
    found = [*_folders(hosts), *_agents(hosts)]
    yield from found
    if not found:
        rules = len(hosts.matches) + (hosts.default is not None)
        what = (
            f"Hosts file {file}: {many(rules, 'rule')}, {many(len(hosts.agents.tables), 'agent')}."
            if file
            else f"Keys work in {hosts.source}."
        )
        yield ok("hosts-file", what)


def _folders(hosts: Hosts) -> Iterator[Finding]:
    """Folders are made on connect; here is only looked at where."""
    for where, rule, _ in rules_of(hosts):
        if rule["backend"] != "local" or not isinstance(rule.get("root_dir"), str):
            continue
        folder = Path(rule["root_dir"].partition("{key}")[0]).expanduser().absolute()
        there = next((path for path in (folder, *folder.parents) if path.exists()), folder)
        if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
            yield error(
                "folder",
                f"{where}: root_dir={rule['root_dir']!r}: {there} is no folder that this user may write to.",
                "Tasks of these keys fail, if the nodes run as the same user.",
                f"mkdir -p {folder}; give it to the user that the nodes run as; or another root_dir.",
            )


def _agents(hosts: Hosts) -> Iterator[Finding]:
    for name, table in hosts.agents.tables.items():
        command = table.get("command") or []
        if command and table.get("where", "worker") == "worker":
            path = dict(table.get("env", {})).get("PATH", os.environ.get("PATH"))
            if shutil.which(str(command[0]), path=path) is None:
                yield error(
                    "agent-command",
                    f"[agents.{name}]: there is no program {command[0]!r} on this machine's PATH.",
                    "Turns of this agent fail on nodes where it is missing.",
                    f"Install it, or give its full path: command = ['/path/to/{command[0]}', ...].",
                )
        try:
            read_secrets(table.get("secrets", {}))
        except ConfigError as problem:
            yield warning(
                "agent-secret",
                f"[agents.{name}]: {problem}.",
                "The agent does not start on a node that lacks it, too.",
                "Set the variable, or make the file readable, where nodes run.",
            )
