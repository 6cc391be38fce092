"""What an agent may do: the answer to its permission requests. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from pool.errors import ConfigError

KINDS = ("read", "edit", "delete", "move", "search", "execute", "think", "fetch", "switch_mode", "other")
"""Kinds of tool calls, as the Agent Client Protocol names them."""

ANSWERS = ("deny", "allow")


@dataclass(frozen=True)
class Policy:
    """``"allow"`` or ``"deny"`` for each kind of tool call; *default* for those that *kinds* does not name."""

    default: str = "deny"
    kinds: Mapping[str, str] | None = None

    @classmethod
    def parse(cls, given: Any) -> Self:
        """Read ``"deny"``, ``"allow"`` or ``{default = "deny", read = "allow"}``. Raises `ConfigError`."""
        if isinstance(given, str):
            given = {"default": given}
        if not isinstance(given, Mapping):
            raise ConfigError(f"permissions={given!r}: must be 'deny', 'allow' or a table of kinds")
        for kind, answer in given.items():
            if kind != "default" and kind not in KINDS:
                raise ConfigError(f"permissions: unknown kind {kind!r}: known are default, {', '.join(KINDS)}")
            if answer not in ANSWERS:
                raise ConfigError(f"permissions: {kind}={answer!r}: must be 'deny' or 'allow'")
        return cls(given.get("default", "deny"), {kind: given[kind] for kind in given if kind != "default"})

    def answer(self, kind: str | None) -> str:
        """Return ``"allow"`` or ``"deny"`` for a tool call of this kind."""
        return (self.kinds or {}).get(kind or "other", self.default)

    def choose(self, kind: str | None, options: Sequence[tuple[str, str]]) -> str | None:
        """Return the id of the option to take, of ``(id, kind of option)``; None: refuse without one.

        Once rather than always: the policy is asked each time.
        """
        wanted = ("allow_once", "allow_always") if self.answer(kind) == "allow" else ("reject_once", "reject_always")
        for each in wanted:
            for option, option_kind in options:
                if option_kind == each:
                    return option
        return None
