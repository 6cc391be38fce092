"""The worker's view of a message, for tasks with secrets among their arguments."""

from typing import Any

from celery.worker.request import Request

from pool.worker.masking import shown


class MaskedRequest(Request):
    """A worker's view of a message, with the secrets of its task hidden, whoever sent it and however."""

    _argsrepr: str
    _kwargsrepr: str

    def __init__(self, message: Any, **options: Any) -> None:
        super().__init__(message, **options)
        if not self._sound:
            return
        texts = shown(self._task, self._args, self._kwargs)
        self._request_dict.update(texts)
        self._argsrepr = texts.get("argsrepr", self._argsrepr)
        self._kwargsrepr = texts.get("kwargsrepr", self._kwargsrepr)

    @property
    def _sound(self) -> bool:
        """Whether the arguments are what they should be; a task that came with others fails when it is run."""
        return isinstance(self._args, list | tuple) and isinstance(self._kwargs, dict)

    def info(self, safe: bool = False) -> dict[str, Any]:
        """As Celery's, for ``inspect active``, ``reserved``, ``scheduled`` and ``query_task``."""
        found: dict[str, Any] = super().info(safe)
        hidden = self._task.masked(self._args, self._kwargs) if self._sound and not safe else None
        if hidden is not None:
            found["args"], found["kwargs"] = hidden
        return found
