"""The agents of a hosts file: ``[agents.NAME]`` -> what a chat gets when it asks for NAME.

::

    [agents.codex]
    kind = "acp"                              # one process for each chat
    command = ["codex-acp"]
    where = "host"                            # on the chat's build host, over its warm connection
    secrets = { OPENAI_API_KEY = { env = "CODEX_KEY" } }
    permissions = { default = "deny", read = "allow" }

    [agents.opencode]
    kind = "opencode"                         # one server for all chats of a worker process
    command = ["opencode", "serve"]
    root_dir = "/srv/chats/{key}"
"""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from pool.backends.acp import AcpBackend
from pool.backends.agent import AgentBackend
from pool.backends.base import Backend
from pool.backends.opencode import OpencodeBackend
from pool.backends.opencode_server import OpencodeServer
from pool.errors import ConfigError, InvalidKey
from pool.keys import SHARED, check_key, fill_key
from pool.manager import DEFAULT_AGENT
from pool.tables import check_table, did_you_mean, fields_for

GROUP = "agents"
"""The group of the pool's backends that are processes of agents."""

_KINDS: Mapping[str, tuple[type[AgentBackend], type[Backend] | None, str]] = {
    "acp": (AcpBackend, None, "acp"),
    "opencode": (OpencodeBackend, OpencodeServer, "httpx"),
}
"""Kind -> what each chat has, what a worker process has once, the package that it needs."""

_HIDDEN = ("chat", "agent")
_TEMPLATES = ("root_dir", "cwd", "repository")
_TRIAL = "chat"  # a key that may stand everywhere


@dataclass(frozen=True)
class Agents:
    """Checked tables by name."""

    tables: Mapping[str, Mapping[str, Any]]
    source: str = "hosts"

    @classmethod
    def parse(cls, given: Any, source: str) -> Self:
        """Check the table ``agents`` of a hosts document. Raises `ConfigError` that names file, table, field, rule."""
        if not isinstance(given, Mapping):
            raise ConfigError(f"{source}: [agents]: must hold a table for each agent, [agents.NAME]")
        return cls({name: _checked(name, table, f"{source}: [agents.{name}]") for name, table in given.items()}, source)

    def __contains__(self, agent: object) -> bool:
        return agent in self.tables

    def __bool__(self) -> bool:
        return bool(self.tables)

    @property
    def speak_acp(self) -> bool:
        """Whether any of them needs the SDK of the protocol."""
        return any(table["kind"] == AcpBackend.kind for table in self.tables.values())

    def check(self, agent: Any) -> str:
        """Return *agent*, or raise `ConfigError` that names those there are."""
        if not isinstance(agent, str) or agent not in self.tables:
            known = sorted(self.tables)
            raise ConfigError(f"{self.source}: there is no agent {agent!r}{did_you_mean(str(agent), known)}")
        return agent

    def config_for(self, primary: str, agent: str) -> dict[str, Any]:
        """Return ``{"backend": kind, ...}`` for a chat, or for what all chats of an agent share (`SHARED`).

        Raises `InvalidKey` for a chat that cannot stand where the table has ``{key}``.
        """
        table = self.tables[agent]
        of_chat, shared, _ = _KINDS[table["kind"]]
        if primary == SHARED:
            if shared is None:
                raise ConfigError(f"{self.source}: agent {agent!r} has no server that chats share")
            return {"backend": shared.kind, **fields_for(shared, table)}
        filled = {
            name: fill_key(value, primary, name) if name in _TEMPLATES else value
            for name, value in fields_for(of_chat, table).items()
        }
        named = {"agent": agent} if shared is not None else {}
        return {"backend": of_chat.kind, "chat": primary, **named, **filled}

    def group_for(self, primary: str, agent: str) -> str | None:
        """`GROUP` for a backend that is a process of an agent."""
        table = self.tables.get(agent)
        if table is None:
            return None
        return GROUP if (primary == SHARED) == (_KINDS[table["kind"]][1] is not None) else None

    def make(self, chat: str, agent: str) -> AgentBackend:
        """Return the agent of a chat, not connected and in no pool."""
        config = self.config_for(chat, agent)
        of_chat = _KINDS[self.tables[agent]["kind"]][0]
        return of_chat(**{name: value for name, value in config.items() if name != "backend"})


NO_AGENTS = Agents({})


def _checked(name: str, table: Any, where: str) -> dict[str, Any]:
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where}: must be a table")
    try:
        check_key(name)
    except InvalidKey as error:
        raise ConfigError(f"{where}: its name: {error}") from None
    if name == DEFAULT_AGENT:
        raise ConfigError(f"{where}: the name {name!r} is taken: it is the chat's own backend")
    kind = table.get("kind")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ConfigError(f"{where}: field 'kind' = {kind!r}: must be one of {', '.join(sorted(_KINDS))}")
    of_chat, shared, package = _KINDS[kind]
    fields = {field: value for field, value in table.items() if field != "kind"}
    makers: list[type] = [of_chat] if shared is None else [of_chat, shared]
    check_table(fields, makers, f"agent kind {kind!r}", where, _HIDDEN)
    if importlib.util.find_spec(package) is None or importlib.util.find_spec("psutil") is None:
        raise ConfigError(f"{where}: agents need more packages: pip install 'celery-warm-pool[agents]'")
    trial = {field: fill_key(value, _TRIAL, field) if field in _TEMPLATES else value for field, value in fields.items()}
    try:
        for maker in makers:
            maker(**fields_for(maker, {**trial, "chat": _TRIAL, "agent": name}))  # connects nothing
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return dict(table)
