"""Secrets of an agent's environment: named in the hosts file, read when the agent is started, kept nowhere."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pool.backends.shell import check_env
from pool.errors import ConfigError


def check_secrets(given: Any) -> dict[str, dict[str, str]]:
    """Check ``{NAME = {env = "VARIABLE"}}`` and ``{NAME = {file = "/path"}}``. Raises `ConfigError`."""
    if not isinstance(given, Mapping):
        raise ConfigError("secrets: must be a table of names, each { env = ... } or { file = ... }")
    for name, source in given.items():
        if not isinstance(source, Mapping) or set(source) not in ({"env"}, {"file"}):
            raise ConfigError(f"secrets: {name} must be {{ env = 'VARIABLE' }} or {{ file = '/path' }}")
        if not all(isinstance(value, str) and value for value in source.values()):
            raise ConfigError(f"secrets: {name}: must name a variable or a file")
    try:
        check_env(dict.fromkeys(given, ""))  # they become variables
    except ConfigError as error:
        raise ConfigError(f"secrets: {error}") from None
    return {name: dict(source) for name, source in given.items()}


def read_secret(name: str, source: Mapping[str, str]) -> str:
    """Return the secret. Raises `ConfigError` that names where it should have been."""
    if "env" in source:
        if source["env"] not in os.environ:
            raise ConfigError(f"secrets: {name}: the worker has no environment variable {source['env']!r}")
        return os.environ[source["env"]]
    try:
        return Path(source["file"]).expanduser().read_text(encoding="utf-8").rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(f"secrets: {name}: file {source['file']!r}: {why}") from None


def read_secrets(secrets: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Return all of them."""
    return {name: read_secret(name, source) for name, source in secrets.items()}
