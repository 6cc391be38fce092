"""Secrets among a task's arguments: ``***`` in place of their values wherever Celery shows arguments.

A task names them, `PooledTask.secrets`. Celery shows arguments in its log, its events (which Flower lists), the answers
of ``inspect``, and in a broker's message beside the arguments themselves: those are there, for the worker needs them.
Celery's setting ``result_extended`` puts arguments into results as they are: leave it off (the default).
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from celery.utils.saferepr import saferepr

HIDDEN = "***"


def masked(
    secrets: Sequence[str], names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Return *args* and *kwargs* with the values of *secrets* hidden; None when they hold none.

    *names*: the task's parameters, in order. Of a mapping the keys stay; None, which is no secret, stays.
    """
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if all(given.get(name) is None for name in secrets):
        return None
    shown = (_hide(value) if name in secrets else value for name, value in zip(names, args, strict=False))
    return (
        (*shown, *args[len(names) :]),
        {name: _hide(value) if name in secrets else value for name, value in kwargs.items()},
    )


def _hide(value: Any) -> Any:
    if value is None:
        return None
    return dict.fromkeys(value, HIDDEN) if isinstance(value, Mapping) else HIDDEN


def shown(task: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, str]:
    """Return the options ``argsrepr`` and ``kwargsrepr`` for a message of *task*; none when it holds no secrets."""
    hidden = getattr(task, "masked", _nothing)(args, kwargs)
    return (
        {} if hidden is None else {name: saferepr(each, _LENGTH) for name, each in zip(_OPTIONS, hidden, strict=True)}
    )


def _nothing(_args: Any, _kwargs: Any) -> None:
    """For tasks that are not ours."""


_OPTIONS = ("argsrepr", "kwargsrepr")
_LENGTH = 1024
"""Characters; as Celery's `AMQP.argsrepr_maxsize`."""


def without_arguments(record: logging.LogRecord) -> bool:
    """A filter for the logger ``celery.pool``: at DEBUG it writes down messages, cut off at 1024 characters."""
    if isinstance(record.msg, str) and record.msg.startswith("TaskPool: Apply") and isinstance(record.args, tuple):
        record.args = (record.args[0], HIDDEN, HIDDEN)
    return True
