"""How values are put for people: durations, counts, and text from elsewhere that must not act on a terminal."""

import re
import unicodedata
from typing import Any

_HIDDEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""Control characters, except tab, line feed and carriage return; and those that turn the direction of writing."""


def harmless(text: str) -> str:
    """Return output with every character that acts on a terminal made visible: ESC as ``^[``."""
    return _HIDDEN.sub(lambda found: _caret(found[0]), text)


def plain(value: Any) -> str:
    """Return a value from elsewhere as one line."""
    text = str(value).replace("\r\n", " ").replace("\n", " ").replace("\t", " ")
    return harmless(text).replace("\r", "^M")


def _caret(character: str) -> str:
    number = ord(character)
    if number < 0x20 or number == 0x7F:
        return "^" + chr(number ^ 0x40)
    return f"<{number:02x}>" if unicodedata.category(character) == "Cc" else f"<U+{number:04X}>"


def duration(seconds: Any) -> str:
    """Return ``0.3 s``, ``12 s``, ``3 min``, ``2.5 h``, ``4 d``; nothing for what is no number."""
    if not isinstance(seconds, int | float):
        return ""
    for limit, size, unit in ((10, 1, "s"), (100, 1, "s"), (6000, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / size:.1f} {unit}" if unit == "h" or limit == 10 else f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"


def count(number: Any) -> str:
    """Return ``12,345``; nothing for what is no number."""
    return f"{number:,}" if isinstance(number, int) else ""


def percent(part: Any) -> str:
    """Return ``97 %``; nothing for what is no number."""
    return f"{100 * part:.0f} %" if isinstance(part, int | float) else ""


def many(number: int, noun: str) -> str:
    """Return ``1 node``, ``2 nodes``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
