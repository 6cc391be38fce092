"""What is shown of a task's arguments when some of them are secrets."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from celery.worker.request import Request as CelerysRequest

from pool import ConfigError, PooledTask, Settings, install
from pool.worker.masked_request import MaskedRequest
from pool.worker.masking import masked, shown, without_arguments

NAMES = ["user", "env", "token"]


@pytest.fixture
def app(tmp_path) -> Any:
    app = Celery("masking", broker="memory://", set_as_current=False)
    install(app, Settings(data_dir=tmp_path))
    return app


@pytest.fixture
def task(app: Celery) -> Any:
    @app.task(shared=False, base=PooledTask, key="user", secrets=("env", "token"), name="tests.masking.build")
    def build(user: str, env: Any = None, token: Any = None, note: str = "") -> None: ...

    return build


def request(task: Any, args: Any, kwargs: Any) -> CelerysRequest:
    """What a worker makes of a message from a producer that shows everything."""
    headers = {"id": "1", "task": task.name, "argsrepr": repr(args), "kwargsrepr": repr(kwargs)}
    message = SimpleNamespace(
        headers=headers,
        body=b"",
        payload=(args, kwargs, {}),
        content_type="application/json",
        content_encoding="utf-8",
        delivery_info={},
        properties={},
    )
    return MaskedRequest(message, app=task.app, task=task)


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        (("u", {"A": "x", "B": "y"}), {}, (("u", {"A": "***", "B": "***"}), {})),
        (("u",), {"env": {"A": "x"}, "note": "n"}, (("u",), {"env": {"A": "***"}, "note": "n"})),
        (("u", None, "x"), {}, (("u", None, "***"), {})),
        (("u", None, ["x", "y"], "one too many"), {}, (("u", None, "***", "one too many"), {})),
        (("u",), {"env": {}, "token": 5}, (("u",), {"env": {}, "token": "***"})),
    ],
)
def test_values_of_secrets_are_hidden(args, kwargs, expected):
    """Wherever they stand; names of variables, and all that is no secret, stay."""
    assert masked(["env", "token"], NAMES, args, kwargs) == expected


@pytest.mark.parametrize(("args", "kwargs"), [((), {}), (("u",), {"note": "n"}), (("u", None), {"token": None})])
def test_arguments_without_secrets_are_left_to_celery(args, kwargs):
    """None: there is nothing to hide."""
    assert masked(["env", "token"], NAMES, args, kwargs) is None


def test_a_secret_must_be_an_argument(app):
    """A ConfigError where the task is made, not a secret shown."""
    with pytest.raises(ConfigError, match="secrets='tokne' is not one of its arguments"):

        @app.task(shared=False, base=PooledTask, key="user", secrets=("tokne",), name="tests.masking.slip", lazy=False)
        def slip(user: str, token: str) -> None: ...


def test_a_worker_hides_what_the_producer_showed(task):
    """In what it logs, sends as events and tells ``inspect``; the task still gets its arguments."""
    found = request(task, ["u"], {"token": "canary"})
    shown_by_celery = [found.argsrepr, found.kwargsrepr, repr(found), found.info(), found.info(safe=True)]
    assert "canary" not in repr(shown_by_celery)
    assert "'u'" in found.argsrepr
    assert found.info()["kwargs"] == {"token": "***"}
    assert found.request_dict["kwargsrepr"] == found.kwargsrepr
    assert found.kwargs == {"token": "canary"}


@pytest.mark.parametrize(("args", "kwargs"), [("text", {}), (["u"], None), (None, [])])
def test_arguments_that_are_none_do_not_stop_the_worker(task, args, kwargs):
    """A message with nonsense for arguments is taken like any other; its task fails when it runs."""
    assert request(task, args, kwargs).info()["kwargs"] == kwargs


def test_other_tasks_are_shown_as_ever():
    """A task that is not ours, or that this process does not know, has no secrets."""
    assert shown(None, ("a",), {}) == shown(object(), ("a",), {}) == {}


def test_celerys_pool_does_not_log_messages():
    """Its line at DEBUG stays, without what a message holds."""
    told = logging.LogRecord("celery.pool", 10, "", 0, "TaskPool: Apply %s (args:%s kwargs:%s)", ("f", "x", "y"), None)
    other = logging.LogRecord("celery.pool", 10, "", 0, "%s ended", ("x",), None)
    assert without_arguments(told)
    assert told.getMessage() == "TaskPool: Apply f (args:*** kwargs:***)"
    assert without_arguments(other)
    assert other.getMessage() == "x ended"
