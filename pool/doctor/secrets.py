"""Keeping passwords out of findings: whatever text an error of a server or library brings along."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from pool.doctor.finding import Finding

MASK = "**"

_SHORTEST = 6
"""Characters of a password that is replaced wherever it stands; a shorter one, only where a URL has it."""
_IN_URL = re.compile(r"(?P<before>\w://[^\s/:@]*:)[^\s/@]+(?=@)")
_NAMES = re.compile(r"pass(word|phrase|wd)?$|secret|token", re.IGNORECASE)


class Secrets:
    """Everything in the app's configuration, and named by its hosts file, that must not be shown."""

    def __init__(self, values: Iterable[str]) -> None:
        self._values = sorted({value for value in values if len(value) >= _SHORTEST}, key=len, reverse=True)

    @classmethod
    def of(cls, conf: Mapping[str, Any], urls: Iterable[Any], variables: Iterable[str] = ()) -> "Secrets":
        """Those in URLs, in settings whose name says so, and in environment variables of these names."""
        found = [value for url in urls for value in _in_url(url)]
        for name in ("broker_password", "broker_transport_options", "result_backend_transport_options"):
            found += _named({name: conf.get(name)})
        found += _named({name: conf.get(name) for name in ("redis_password", "redis_backend_settings")})
        return cls([*found, *(os.environ[name] for name in variables if name in os.environ)])

    def hide(self, text: str) -> str:
        """Return *text* without them."""
        for value in self._values:
            text = text.replace(value, MASK)
        return _IN_URL.sub(rf"\g<before>{MASK}", text)

    def clean(self, finding: Finding) -> Finding:
        """Return the finding without them."""
        return replace(finding, what=self.hide(finding.what), why=self.hide(finding.why), fix=self.hide(finding.fix))


def _in_url(url: Any) -> Iterator[str]:
    if isinstance(url, list | tuple):
        for each in url:
            yield from _in_url(each)
        return
    for part in str(url or "").split(";"):
        try:
            split = urlsplit(part)
        except ValueError:
            continue
        values = [split.password or "", *(value for name, value in parse_qsl(split.query) if _NAMES.search(name))]
        for value in values:
            yield value
            yield unquote(value)


def _named(table: Mapping[str, Any]) -> list[str]:
    found = []
    for name, value in table.items():
        if isinstance(value, Mapping):
            found += _named(value)
        elif isinstance(value, str) and _NAMES.search(str(name)):
            found.append(value)
    return found
