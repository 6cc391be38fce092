"""What is a key, and where a key may be put."""

import re
import unicodedata
from typing import Any

from pool.errors import InvalidKey

MAX_BYTES = 256
"""Length of a key at most, in bytes of its UTF-8 form."""

SHARED = "\x00shared"
"""The primary of backends that many keys share: never a valid key, so no ``close_key`` of a chat reaches them."""

_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+=:-]*")


def check_key(key: Any) -> str:
    """Return *key* if it is usable: text, not empty, at most 256 bytes of UTF-8, no control characters.

    Raises `InvalidKey` that says which rule is broken.
    """
    if not isinstance(key, str):
        raise InvalidKey(f"key {key!r} is of type {type(key).__name__}: a key is text, such as {str(key)!r}")
    if not key:
        raise InvalidKey("key is empty: a key is at least one character")
    try:
        size = len(key.encode())
    except UnicodeEncodeError:
        raise InvalidKey(f"key {key!r} cannot be written as UTF-8: it holds half of a surrogate pair") from None
    if size > MAX_BYTES:
        raise InvalidKey(f"key {key[:32]!r}... is {size} bytes long: at most {MAX_BYTES} bytes of UTF-8")
    if not key.isprintable():
        for character in key:
            if unicodedata.category(character) in ("Cc", "Zl", "Zp"):
                raise InvalidKey(f"key {key!r} holds the control character {character!r}")
    return key


def shown(primary: str, *, pooled: bool = True) -> str:
    """Return whose a backend is, for people to read."""
    if not pooled:
        return "(none)"
    return "(shared)" if primary == SHARED else primary


def fill_key(template: str, key: str, field: str) -> str:
    """Put *key* in place of ``{key}`` in a path or user name; a key that could escape from there is refused.

    Allowed there: letters, digits and ``_ . @ + = : -``, the first one a letter, a digit or ``_``.
    Raises `InvalidKey`.
    """
    if "{key}" not in template:
        return template
    if not _PLAIN.fullmatch(key):
        raise InvalidKey(
            f"key {key!r} cannot stand in {field} = {template!r}: only letters, digits and _ . @ + = : - may,"
            " and the first one must be a letter, a digit or _"
        )
    return template.replace("{key}", key)
