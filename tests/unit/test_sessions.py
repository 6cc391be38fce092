"""The edge of the chat store: what becomes of a Redis that cannot be reached, and of redis-py's errors."""

import socket
import time

import pytest
from redis import Redis
from redis import exceptions as foreign

from pool.chats import Chat, ChatStore
from pool.errors import BackendUnavailable, ConfigError
from pool.sessions import CONNECT_TIMEOUT, REPLY_TIMEOUT, RedisChats
from tests.support.chat_store import FakeChats

CALLS = {
    "begin": lambda chats: chats.begin("c", "a", 5, "t"),
    "save": lambda chats: chats.save(Chat("c", "a", turn="t"), 5),
    "finish": lambda chats: chats.finish("c", "a", 5, "t"),
    "mark_closing": lambda chats: chats.mark_closing("c", 5),
    "delete": lambda chats: chats.delete("c", "a", 5),
    "records": lambda chats: chats.records("c"),
    "idle": lambda chats: chats.idle(0, 0),
    "request_cancel": lambda chats: chats.request_cancel("c"),
    "cancelled": lambda chats: chats.cancelled(["t"]),
}
EACH = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


class Failing:
    """A client of which every command fails."""

    def __init__(self, error):
        self.error = error

    def execute_command(self, *_command, **_options):
        raise self.error


def unavailable(chats, call):
    with pytest.raises(BackendUnavailable) as raised:
        call(chats)
    assert str(raised.value).startswith("chat store: ")
    assert raised.value.reason == "store"
    return raised.value


def test_the_calls_are_all_methods_that_there_are():
    """Who adds a method adds it here; both stores have it."""
    methods = {name for name in vars(ChatStore) if not name.startswith("_")}
    assert methods == set(CALLS)
    for store in (RedisChats, FakeChats):
        assert methods <= set(vars(store))


@EACH
def test_a_redis_that_is_not_there_is_unavailable_for_a_second(call):
    """So that the task is tried again."""
    with socket.socket() as bound:  # and does not listen
        bound.bind(("127.0.0.1", 0))
        chats = RedisChats.from_url(f"redis://127.0.0.1:{bound.getsockname()[1]}/0", "pool", 64)
        error = unavailable(chats, call)
    assert error.retry_after == 1.0
    assert isinstance(error.__cause__, foreign.ConnectionError)
    chats.close()


def test_a_redis_that_does_not_answer_is_unavailable():
    """Nobody waits for ever."""
    with socket.create_server(("127.0.0.1", 0)) as listener:  # its backlog accepts, and nobody reads
        url = f"redis://127.0.0.1:{listener.getsockname()[1]}/0"
        chats = RedisChats(Redis.from_url(url, socket_timeout=0.05, retry=None), "pool", 64)
        begun = time.monotonic()
        error = unavailable(chats, CALLS["begin"])
        assert isinstance(error.__cause__, foreign.TimeoutError)
        assert time.monotonic() - begun < 5
        chats.close()


def test_a_store_from_a_url_has_timeouts():
    """Also one from kombu's spelling of a URL; a command is sent twice at most."""
    chats = RedisChats.from_url("valkey://localhost:1/3", "pool", 64)
    options = chats.client.connection_pool.connection_kwargs
    assert (options["db"], options["socket_timeout"]) == (3, REPLY_TIMEOUT)
    assert options["socket_connect_timeout"] == CONNECT_TIMEOUT
    assert options["retry"].get_retries() == 1
    chats.close()
    RedisChats.from_url("redis+socket:///tmp/nowhere.sock", "pool", 64).close()


def test_a_url_of_another_server_is_refused():
    """With the setting that it comes from."""
    with pytest.raises(ConfigError, match="POOL_REDIS_URL"):
        RedisChats.from_url("amqp://localhost", "pool", 64)


@pytest.mark.parametrize(
    "error",
    [
        foreign.ConnectionError("gone"),
        foreign.TimeoutError("late"),
        foreign.BusyLoadingError("loading"),
        foreign.ClusterDownError("down"),
        foreign.RedisClusterException("no node"),
        foreign.ReadOnlyError("a replica"),
        foreign.OutOfMemoryError("full"),
        foreign.TryAgainError("slots move"),
    ],
    ids=lambda error: type(error).__name__,
)
@EACH
def test_what_passes_is_tried_again(call, error):
    """Failovers, restarts, a full server."""
    assert unavailable(RedisChats(Failing(error), "pool", 64), call).retry_after == 1.0


@EACH
def test_a_wrong_login_does_not_pass(call):
    """Only a person can help."""
    error = foreign.AuthenticationError("wrong")
    assert unavailable(RedisChats(Failing(error), "pool", 64), call).retry_after is None


@EACH
def test_a_fault_of_the_script_is_not_hidden(call):
    """It would be tried again for ever."""
    with pytest.raises(foreign.ResponseError):
        call(RedisChats(Failing(foreign.ResponseError("ERR user_script")), "pool", 64))


@EACH
def test_the_fake_can_be_out_of_reach_too(call):
    """For the tests of those who use it."""
    chats = FakeChats()
    chats.unreachable = BackendUnavailable("chat store: gone", "store", 1.0)
    unavailable(chats, call)
