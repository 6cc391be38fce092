"""The records of chats in Redis. Each method is one script call.

Keys, all with the hash tag of the namespace, so that they share one slot of a Redis Cluster::

    {pool}:chat:<chat>    hash    agent -> record
    {pool}:chats:<shard>  zset    chat -> when it was last active (microseconds since 1970); closing: 9e15 less
    {pool}:cancel:<turn>  string  the running turn was asked to be cancelled; expires after an hour
    {pool}:leases         hash    shard -> "epoch incarnation": of the lease table (`redis_store`), only read here

A record is a JSON object of texts: Lua's JSON keeps 14 digits of a number, and epochs and times have 16. Fields of a
newer version that are texts survive a write by an older one. Two are not in `Chat`: ``call`` tells a command that the
client has sent again, because the connection broke, from another attempt of the same turn; ``repeated`` notes that one.
"""

import hashlib
import json
import uuid
from collections.abc import Collection, Iterable
from functools import cache
from operator import attrgetter
from typing import Any, Self

from redis import Redis, RedisCluster
from redis.backoff import NoBackoff
from redis.client import NEVER_DECODE
from redis.exceptions import (
    AuthenticationError,
    ClusterDownError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from pool.chats import Begun, Chat, ChatStore
from pool.errors import BackendUnavailable, ConfigError, NotOwner, PoolError
from pool.keys import check_key
from pool.session_scripts import (
    BEGIN,
    DELETE,
    FINISH,
    IDLE,
    MARK_CLOSING,
    RECORDS,
    REQUEST_CANCEL,
    SAVE,
)
from pool.sharding.hashing import shard_of
from pool.sharding.redis_store import keys_of, plain_url

REPLY_TIMEOUT = 5.0
"""Seconds for Redis to answer, and again for a second attempt over another connection."""
CONNECT_TIMEOUT = 3.0
"""Seconds for a connection to be made."""
CANCEL_EXPIRES = 3600
"""Seconds for which a turn stays asked to be cancelled."""
RETRY_AFTER = 1.0
"""Seconds until a task that could not reach Redis is tried again."""

OUT_OF_REACH = (
    RedisConnectionError, RedisTimeoutError, ClusterDownError, RedisClusterException,
    ReadOnlyError, OutOfMemoryError, TryAgainError,  # it answers, but cannot write at this moment
)  # fmt: skip
TEXTS = ("session_id", "worktree", "branch", "version")


class RedisChats(ChatStore):
    """The `ChatStore` of one namespace, over a client of redis-py for one server or a cluster.

    *shards*: number of shards of the namespace. *leased*: this process's epochs come from leases, so 0 means that it
    does not hold the shard, and is refused with `NotOwner`.
    """

    def __init__(self, client: "Redis | RedisCluster", namespace: str, shards: int, *, leased: bool = False) -> None:
        self.client = client
        self.namespace = namespace
        self.shards = shards
        self.leased = leased
        (self._leases,) = keys_of(namespace, "leases")
        (self._cancel,) = keys_of(namespace, "cancel:")

    @classmethod
    def from_url(cls, url: str, namespace: str, shards: int, *, leased: bool = False) -> Self:
        """Make the client too; it connects when it is first used. Raises `ConfigError` for a URL that is none."""
        client = Redis.from_url(
            plain_url(url),
            decode_responses=True,
            socket_timeout=REPLY_TIMEOUT,
            socket_connect_timeout=CONNECT_TIMEOUT,
            # Every command here can be repeated, so a connection that the server has closed is no reason to fail.
            retry=Retry(NoBackoff(), 1),
            max_connections=1024,
        )
        return cls(client, namespace, shards, leased=leased)

    def close(self) -> None:
        """Close the client's connections."""
        if isinstance(self.client, RedisCluster):  # its close() leaves those that no command uses
            self.client.disconnect_connection_pools()  # type: ignore[no-untyped-call]
        self.client.close()

    # -- turns

    def begin(self, chat: str, agent: str, epoch: int, turn: str) -> Begun:
        if not turn:
            raise ConfigError("turn is empty: it is the id of the task whose turn begins")
        repeated, record = self._write(BEGIN, chat, epoch, check_key(agent), turn, uuid.uuid4().hex)
        return Begun(_decoded(chat, agent, record), bool(repeated))

    def save(self, chat: Chat, epoch: int) -> Chat:
        texts = [getattr(chat, name) for name in TEXTS]
        (record,) = self._write(SAVE, chat.chat, epoch, check_key(chat.agent), chat.turn, *texts)
        return _decoded(chat.chat, chat.agent, record)

    def finish(self, chat: str, agent: str, epoch: int, turn: str) -> None:
        self._write(FINISH, chat, epoch, check_key(agent), turn)

    # -- closing

    def mark_closing(self, chat: str, epoch: int) -> list[Chat]:
        (records,) = self._write(MARK_CLOSING, chat, epoch)
        return _all_decoded(chat, records)

    def delete(self, chat: str, agent: str, epoch: int) -> None:
        self._write(DELETE, chat, epoch, check_key(agent))

    # -- looking

    def records(self, chat: str) -> list[Chat]:
        (records,) = self._chat(RECORDS, chat, 0)
        return _all_decoded(chat, records)

    def idle(self, shard: int, idle_for: float, limit: int = 100) -> list[str]:
        if not 0 <= shard < self.shards:
            raise ConfigError(f"shard={shard!r}: must be from 0 to {self.shards - 1}")
        if limit < 1:  # Redis reads a negative one as none
            raise ConfigError(f"limit={limit!r} chats: must be 1 or more")
        index = keys_of(self.namespace, f"chats:{shard}")
        _, chats = self._run(IDLE, index, round(idle_for * 1e6), limit)
        return [chat.decode() for chat in chats]

    # -- cancelling

    def request_cancel(self, chat: str, agent: str | None = None) -> list[str]:
        which = "" if agent is None else check_key(agent)
        (turns,) = self._chat(REQUEST_CANCEL, chat, 0, which, self._cancel, CANCEL_EXPIRES)
        return [turn.decode() for turn in turns]

    def cancelled(self, turns: Collection[str]) -> set[str]:
        asked = list(turns)
        if not asked:
            return set()
        marks = self._command("MGET", *(self._cancel + turn for turn in asked))
        return {turn for turn, mark in zip(asked, marks, strict=True) if mark is not None}

    # -- the way to Redis

    def _write(self, script: str, chat: str, epoch: int, *arguments: Any) -> list[Any]:
        """Run a script that writes, under *epoch*."""
        if epoch < 0:
            raise ConfigError(f"epoch={epoch!r}: must be that of a lease, or 0 for static placement")
        if self.leased and not epoch:
            raise NotOwner(f"chat {chat!r}: shard {shard_of(check_key(chat), self.shards)} is not held: epoch 0")
        return self._chat(script, chat, epoch, *arguments)

    def _chat(self, script: str, chat: str, epoch: int, *arguments: Any) -> list[Any]:
        """Run a script of a chat; raise what it has found, or return what follows its verdict."""
        shard = shard_of(check_key(chat), self.shards)
        keys = [*keys_of(self.namespace, f"chat:{chat}", f"chats:{shard}"), self._leases]
        verdict, *found = self._run(script, keys, chat, shard, epoch, *arguments)
        if verdict == b"stale":
            raise NotOwner(
                f"chat {chat!r}: epoch {epoch} of shard {shard} is over: epoch {found[0].decode()} has followed"
            )
        if verdict == b"broken":
            raise _broken(chat, found[0].decode())
        if verdict == b"turn":
            running = f"turn {found[0].decode()!r} does" if found[0] else "none does"
            raise PoolError(f"chat {chat!r} of agent {arguments[0]!r}: turn {arguments[1]!r} does not run: {running}")
        return found

    def _run(self, script: str, keys: list[str], *arguments: Any) -> list[Any]:
        rest = len(keys), *keys, *arguments
        try:
            found = self._command("EVALSHA", _sha(script), *rest)
        except NoScriptError:  # a server that does not know it yet, or was restarted
            found = self._command("EVAL", script, *rest)
        return list(found)

    def _command(self, *command: Any) -> Any:
        """One round trip. Answers are bytes: a record that is no UTF-8 must not hide which one it is."""
        try:
            client: Any = self.client
            return client.execute_command(*command, **{NEVER_DECODE: True})
        except AuthenticationError as error:
            raise BackendUnavailable(f"chat store: {error}", "store", None) from error
        except OUT_OF_REACH as error:
            raise BackendUnavailable(f"chat store: {error}", "store", RETRY_AFTER) from error


@cache
def _sha(script: str) -> str:
    return hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()


def _decoded(chat: str, agent: str, record: bytes) -> Chat:
    try:
        fields = json.loads(record.decode())
    except ValueError as error:
        raise _broken(chat, agent) from error
    return Chat(
        chat,
        agent,
        **{name: fields.get(name, "") for name in (*TEXTS, "turn")},
        created=int(fields.get("created", 0)) / 1e6,
        last_active=int(fields.get("last_active", 0)) / 1e6,
        epoch=int(fields.get("epoch", 0)),
        state=fields.get("state", "open"),
    )


def _all_decoded(chat: str, records: Iterable[bytes]) -> list[Chat]:
    pairs = iter(records)
    return sorted(
        (_decoded(chat, agent.decode(), record) for agent, record in zip(pairs, pairs, strict=True)),
        key=attrgetter("agent"),
    )


def _broken(chat: str, agent: str) -> PoolError:
    return PoolError(f"chat {chat!r}: the record of agent {agent!r} cannot be decoded; delete it", chat, agent)
