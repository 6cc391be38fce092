"""Every error survives the way through a Celery result, and a pickle."""

import json
import pickle

import pytest
from celery import Celery

from pool import errors
from pool.errors import FileMissing, FileOperationFailed, PoolError

SAMPLES = [
    errors.PoolError("m"),
    errors.AcquireTimeout("late", "connect", {"total": 2, "busy": 1}),
    errors.PoolExhausted("full", "room", {"total": 2}),
    errors.BackendUnavailable("down", "refused", 1.5),
    errors.BackendUnavailable("changed", "host_key", None),
    errors.BackendClosed("closed"),
    errors.CommandFailed("exit code 3", 3, "the end of stderr: \u65e5"),
    errors.CommandTimeout("too long", 2.5, "tail"),
    errors.CommandLost("nobody knows"),
    errors.TaskCancelled("somebody had enough"),
    errors.TurnFailed("agent died", "died", "the end of stderr"),
    errors.TurnTimeout("cancelled after 1 s", "timeout", "so far"),
    errors.FileOperationFailed("write 'a'", 13, "a"),
    errors.FileMissing("read 'a'", 2, "a"),
    errors.PathEscapeError("'../a'"),
    errors.ConfigError("port='x'"),
    errors.InvalidKey("key is empty"),
    errors.NotOwner("key 'a'"),
]
EACH = pytest.mark.parametrize("error", SAMPLES, ids=lambda error: type(error).__name__)


@pytest.fixture(scope="module")
def app() -> Celery:
    app = Celery("errors", broker="memory://", backend="cache+memory://", set_as_current=False)
    app.conf.update(result_serializer="json", accept_content=["json"])
    return app


def same(one: Exception, two: Exception) -> None:
    assert type(one) is type(two)
    assert one.args == two.args
    assert str(one) == str(two)
    assert vars(one) == vars(two)
    for name in ("errno", "filename"):
        assert getattr(one, name, None) == getattr(two, name, None)


def test_the_samples_are_all_errors_that_there_are():
    """Who adds an error adds it here."""
    assert {type(error).__name__ for error in SAMPLES} == set(errors.__all__)


@EACH
def test_an_error_survives_a_pickle(error):
    """Type, message and fields."""
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        same(pickle.loads(pickle.dumps(error, protocol)), error)


@EACH
def test_the_args_of_an_error_are_its_constructors_and_plain_json(error):
    """That is how Celery stores it; the message comes first."""
    args = json.loads(json.dumps(error.args))
    assert args == list(error.args)
    assert error.args[0] == str(error)
    same(type(error)(*args), error)


@EACH
def test_an_error_survives_a_json_result_backend(error, app):
    """The caller of ``result.get()`` catches what the task raised."""
    stored = json.loads(json.dumps(app.backend.prepare_exception(error, serializer="json")))
    same(app.backend.exception_to_python(stored), error)


@EACH
def test_an_error_survives_a_stored_result(error, app):
    """The whole way: store it as a failure, read it back."""
    app.backend.store_result("id-1", error, "FAILURE")
    assert app.backend.get_state("id-1") == "FAILURE"
    same(app.backend.get_result("id-1"), error)
    app.backend.forget("id-1")


@EACH
def test_every_error_can_be_made_from_a_message_alone(error):
    """And is a `PoolError`."""
    made = type(error)("only this")
    assert str(made) == "only this"
    assert isinstance(made, PoolError)


def test_errors_can_be_caught_as_the_builtin_ones():
    """Code that knows nothing of the pool catches what it expects."""
    assert issubclass(errors.ConfigError, ValueError)
    assert issubclass(errors.InvalidKey, ValueError)
    assert issubclass(FileOperationFailed, OSError)
    assert issubclass(FileMissing, FileNotFoundError)
    assert issubclass(errors.PoolExhausted, errors.AcquireTimeout)


@pytest.mark.parametrize(("code", "kind"), [(2, FileMissing), (13, FileOperationFailed), (0, FileOperationFailed)])
def test_a_file_error_has_the_class_of_its_errno(code, kind):
    """Message, errno and filename are told."""
    error = FileOperationFailed.of(code, "read", "a/b")
    assert type(error) is kind
    assert (error.errno, error.filename) == (code, "a/b")
    assert str(error).startswith("read 'a/b': ")


def test_the_tree_at_the_top_of_the_file_is_complete():
    """Each error is named there."""
    for name in errors.__all__:
        assert name in (errors.__doc__ or "")
