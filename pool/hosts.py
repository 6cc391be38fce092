"""The hosts file: which backend a key gets, and its config.

::

    [default]                   # for every key that no [[match]] names
    backend = "local"
    root_dir = "/srv/work/{key}"

    [[match]]                   # tried in order, the first one wins
    key = "acme:*"
    backend = "ssh"
    host = "build.acme.example"
    username = "acme"
    root_dir = "work/{key}"
    client_keys = "/etc/pool/acme_ed25519"
    known_hosts = "/etc/pool/known_hosts"

A ``[[match]]`` inherits nothing from ``[default]``. Besides ``ssh``, ``local`` and ``memory``, ``backend`` may name a
class of your own, ``"package.module:ClassName"``; then every other field goes to its constructor.
"""

import importlib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Self

from pool.agents import NO_AGENTS, Agents
from pool.backends.acp import AcpBackend
from pool.backends.base import Backend
from pool.backends.opencode import OpencodeBackend
from pool.backends.opencode_server import OpencodeServer
from pool.errors import ConfigError
from pool.keys import SHARED, fill_key
from pool.tables import check_table, did_you_mean

KINDS: Mapping[str, str] = {
    "local": "pool.backends.local:LocalFilesystemBackend",
    "memory": "pool.backends.memory:MemoryBackend",
    "ssh": "pool.backends.ssh:RemoteFilesystemBackend",
}
"""Kind -> its class, imported when a rule names it: asyncssh takes a third of a second."""

_AGENT_KINDS: Mapping[str, type[Backend]] = {kind.kind: kind for kind in (AcpBackend, OpencodeBackend, OpencodeServer)}
_TABLES = ["default", "match", "agents"]
_TEMPLATES = ("root_dir", "username")

_NOT_IN_FILES = ("handler",)  # a function: only Python code can give it


@dataclass(frozen=True)
class Hosts:
    """Rules that give each key its backend. Made by `load`, or `local` without a file."""

    default: Mapping[str, Any] | None
    matches: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    source: str = "hosts"
    agents: Agents = NO_AGENTS

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read and check a hosts file. Raises `ConfigError` that names file, table, field and rule."""
        try:
            document = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"hosts file {str(path)!r}: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"hosts file {str(path)!r}: not TOML: {error}") from None
        return cls.parse(document, str(path))

    @classmethod
    def parse(cls, document: Mapping[str, Any], source: str) -> Self:
        """Check a hosts document; *source* names it in errors."""
        for name in document:
            if name not in _TABLES:
                raise ConfigError(f"{source}: unknown table [{name}]{did_you_mean(name, _TABLES)}")
        default = document.get("default")
        if default is not None:
            default = _checked(default, f"{source}: [default]")
        matches = []
        tables = document.get("match", [])
        if not isinstance(tables, list):
            raise ConfigError(f"{source}: [match]: must be written [[match]], with double brackets")
        for number, given in enumerate(tables, start=1):
            if not isinstance(given, Mapping):
                raise ConfigError(f"{source}: [[match]] number {number}: must be a table")
            table = dict(given)
            pattern = table.pop("key", None)
            where = f"{source}: [[match]] number {number} (key = {pattern!r})"
            if not isinstance(pattern, str) or not pattern:
                raise ConfigError(f"{where}: field 'key': must be a key or a pattern such as \"acme:*\"")
            matches.append((pattern, _checked(table, where)))
        return cls(default, tuple(matches), source, Agents.parse(document.get("agents", {}), source))

    @classmethod
    def local(cls, data_dir: Path) -> Self:
        """Without a hosts file: a folder of this machine for each key."""
        return cls(
            {"backend": "local", "root_dir": str(data_dir / "work" / "{key}")}, (), f"folders in {data_dir / 'work'}"
        )

    def config_for(self, primary: str, agent: str) -> dict[str, Any]:
        """Return ``{"backend": kind, ...}`` for a key, or for one of its agents.

        Raises `ConfigError` when no rule names it, `InvalidKey` when it cannot stand where its rule has ``{key}``.
        """
        if agent in self.agents:
            return self.agents.config_for(primary, agent)
        rule = next((rule for pattern, rule in self.matches if fnmatchcase(primary, pattern)), self.default)
        if rule is None or primary == SHARED:
            raise ConfigError(f"{self.source}: no [[match]] fits key {primary!r}, and there is no [default]")
        return {
            name: fill_key(value, primary, name) if name in _TEMPLATES and isinstance(value, str) else value
            for name, value in rule.items()
        }


def make_backend(backend: str, **config: Any) -> Backend:
    """Make the backend that a rule describes."""
    return (_AGENT_KINDS.get(backend) or _kind(backend, "backend"))(**config)


def _kind(name: Any, where: str) -> type[Backend]:
    if not isinstance(name, str) or (name not in KINDS and ":" not in name):
        known = ", ".join(sorted(KINDS))
        hint = did_you_mean(str(name), list(KINDS))
        raise ConfigError(f"{where}: field 'backend' = {name!r}: must be one of {known}, or \"module:Class\"{hint}")
    module, _, attribute = KINDS.get(name, name).partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise ConfigError(f"{where}: field 'backend' = {name!r}: cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Backend)):
        raise ConfigError(f"{where}: field 'backend' = {name!r}: is not a subclass of pool.Backend")
    return found


def _checked(table: Any, where: str) -> dict[str, Any]:
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where}: must be a table")
    config = dict(table)
    if "backend" not in config:
        raise ConfigError(
            f"{where}: field 'backend' is missing: one of {', '.join(sorted(KINDS))}, or \"module:Class\""
        )
    kind = _kind(config["backend"], where)
    if config["backend"] not in KINDS:
        return config
    fields = {name: value for name, value in config.items() if name != "backend"}
    check_table(fields, [kind], f"backend {kind.kind!r}", where, _NOT_IN_FILES)
    try:
        kind(**fields)  # it connects nothing
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return config
