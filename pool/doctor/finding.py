"""What the doctor found: a value that was seen, what comes of it, and what to do."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "info", "warning", "error"]

LEVELS: tuple[Level, ...] = ("ok", "info", "warning", "error")
"""From harmless to harmful."""


@dataclass(frozen=True)
class Finding:
    """One result of a check. A documented interface (`docs/doctor.md`): codes and fields stay."""

    code: str
    level: Level
    what: str
    """One sentence that names the value seen."""
    why: str = ""
    """What comes of it."""
    fix: str = ""
    """What to do: a command, or a setting with its value."""
    fixed: bool = False
    """The doctor has done that, and it worked."""


def ok(code: str, what: str) -> Finding:
    """It is as it should be."""
    return Finding(code, "ok", what)


def info(code: str, what: str, why: str, fix: str = "") -> Finding:
    """Good to know; nothing needs to be done."""
    return Finding(code, "info", what, why, fix)


def warning(code: str, what: str, why: str, fix: str, *, fixed: bool = False) -> Finding:
    """It works now, and will not always."""
    return Finding(code, "warning", what, why, fix, fixed)


def error(code: str, what: str, why: str, fix: str, *, fixed: bool = False) -> Finding:
    """Something does not work."""
    return Finding(code, "error", what, why, fix, fixed)


def many(number: int, noun: str) -> str:
    """Return ``1 node``, ``2 nodes``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def said(problem: BaseException) -> str:
    """Return the text of an error without a full stop at its end, which is the sentence's."""
    return str(problem).rstrip(". ")


def worst(findings: Iterable[Finding]) -> Level:
    """Return the level of the worst finding that was not fixed; ``ok`` if there is none."""
    return max((found.level for found in findings if not found.fixed), key=LEVELS.index, default="ok")
