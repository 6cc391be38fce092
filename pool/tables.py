"""Checking the tables of a hosts file: each field against the constructor that it goes to."""

import difflib
import inspect
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from pool.errors import ConfigError

TYPES: Mapping[str, tuple[tuple[type, ...], str]] = {
    "auth_method": ((str,), "text"),
    "base": ((str,), "the name of a branch or commit"),
    "cancel_timeout": ((int, float), "a number of seconds"),
    "client_keys": ((str, list), "a file or a list of files"),
    "command": ((list,), "a list: the program and its arguments"),
    "connect_timeout": ((int, float), "a number of seconds"),
    "cwd": ((str,), "a folder"),
    "env": ((dict,), "a table of names and texts"),
    "exec_mode": ((str,), "text"),
    "hang_timeout": ((int, float), "a number of seconds"),
    "host": ((str,), "text"),
    "insecure": ((bool,), "true or false"),
    "keepalive_count": ((int,), "a whole number"),
    "keepalive_interval": ((int, float), "a number of seconds"),
    "known_hosts": ((str,), "a file"),
    "max_channels": ((int,), "a whole number"),
    "max_connects": ((int,), "a whole number"),
    "max_line": ((int,), "a whole number of bytes"),
    "max_output": ((int,), "a whole number of bytes"),
    "passphrase_env": ((str,), "the name of an environment variable"),
    "password": ((dict,), "a table: { env = ... } or { file = ... }"),
    "password_env": ((str,), "the name of an environment variable"),
    "permissions": ((str, dict), "'deny', 'allow' or a table of kinds"),
    "port": ((int,), "a whole number"),
    "repository": ((str,), "the path of a git repository"),
    "root_dir": ((str,), "text"),
    "secrets": ((dict,), "a table of names, each { env = ... } or { file = ... }"),
    "session_timeout": ((int, float), "a number of seconds"),
    "startup_files": ((bool,), "true or false"),
    "start_timeout": ((int, float), "a number of seconds"),
    "url": ((str,), "an address such as http://127.0.0.1:4096"),
    "username": ((str,), "text"),
    "where": ((str,), "'worker' or 'host'"),
}


def check_table(
    table: Mapping[str, Any], makers: Iterable[type], what: str, where: str, hidden: Collection[str]
) -> None:
    """Check that each field is an argument of one of *makers*, of the right type, and that none is missing.

    *hidden*: arguments that only code can give. *what* and *where* are for errors. Raises `ConfigError`.
    """
    signatures = [inspect.signature(maker).parameters for maker in makers]
    known = sorted({name for signature in signatures for name in signature if name not in hidden})
    for name, value in table.items():
        if name not in known:
            raise ConfigError(f"{where}: unknown field {name!r} for {what}{did_you_mean(name, known)}")
        types, rule = TYPES[name]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise ConfigError(f"{where}: field {name!r} = {value!r}: must be {rule}")
    for signature in signatures:
        for name, parameter in signature.items():
            if parameter.default is inspect.Parameter.empty and name not in table and name not in hidden:
                raise ConfigError(f"{where}: field {name!r} is missing: {what} needs it")


def fields_for(maker: type, table: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a checked table that *maker* takes."""
    parameters = inspect.signature(maker).parameters
    return {name: value for name, value in table.items() if name in parameters}


def did_you_mean(name: str, known: list[str]) -> str:
    """The end of an error message about *name*, which is not *known*."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"
