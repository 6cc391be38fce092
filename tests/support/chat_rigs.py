"""What the conformance suite of the chat store does behind the store's back, over the fake and over real servers."""

import json
import uuid
from contextlib import contextmanager
from dataclasses import replace

from redis import Redis, RedisCluster

from pool.sessions import RedisChats
from pool.sharding.hashing import shard_of
from tests.support.chat_store import FakeChats
from tests.support.lease_rigs import DebianServer, EmbeddedServer

SHARDS = 64


class FakeChatRig:
    fake = True

    def __init__(self) -> None:
        self.chats = FakeChats(SHARDS)

    def leased(self) -> FakeChats:
        """A store of a process whose shards come by leases."""
        chats = FakeChats(SHARDS, leased=True)
        chats.chats = self.chats.chats
        return chats

    def close(self) -> None:
        pass

    def lease(self, shard: int, epoch: int) -> None:
        """Let the lease table name *epoch* for *shard*."""
        self.chats.leases[shard] = epoch

    def age(self, chat: str, seconds: float) -> None:
        """Let the chat have been active so much earlier."""
        records = self.chats.chats[chat]
        records.update({a: replace(r, last_active=r.last_active - seconds) for a, r in records.items()})

    def spoil(self, chat: str, agent: str) -> None:
        """Let the record be one that cannot be decoded."""
        self.chats.chats.setdefault(chat, {})[agent] = None

    def mark_lives_for(self, turn: str) -> float:
        """Seconds until the mark of a cancelled turn expires."""
        return self.chats.marks[turn] - self.chats.now


class RealChatRig:
    """One namespace of a real server."""

    fake = False

    def __init__(self, server: EmbeddedServer | DebianServer) -> None:
        self.server = server
        self.namespace = f"test-{uuid.uuid4().hex}"
        self.admin = Redis.from_url(server.url, decode_responses=True)
        self.made = []
        self.chats = self._store()

    def _store(self, *, leased: bool = False) -> RedisChats:
        if self.server.cluster:
            client = RedisCluster.from_url(self.server.url, decode_responses=True)
            chats = RedisChats(client, self.namespace, SHARDS, leased=leased)
        else:
            chats = RedisChats.from_url(self.server.url, self.namespace, SHARDS, leased=leased)
        self.made.append(chats)
        return chats

    def leased(self) -> RedisChats:
        return self._store(leased=True)

    def close(self) -> None:
        for chats in self.made:
            chats.close()
        self.admin.close()

    def key(self, name: str) -> str:
        return f"{{{self.namespace}}}:{name}"

    def keys(self) -> list[str]:
        return sorted(key for key in self.admin.scan_iter(count=1000) if key.startswith(self.key("")))

    def lease(self, shard: int, epoch: int) -> None:
        self.admin.hset(self.key("leases"), str(shard), f"{epoch} somebody#1")

    def stored(self, chat: str, agent: str) -> dict:
        return json.loads(self.admin.hget(self.key(f"chat:{chat}"), agent))

    def store(self, chat: str, agent: str, record: str | bytes) -> None:
        """Write a record by hand."""
        self.admin.hset(self.key(f"chat:{chat}"), agent, record)

    def age(self, chat: str, seconds: float) -> None:
        for agent in self.admin.hkeys(self.key(f"chat:{chat}")):
            record = self.stored(chat, agent)
            record["last_active"] = str(int(record["last_active"]) - round(seconds * 1e6))
            self.store(chat, agent, json.dumps(record))
        self.admin.zincrby(self.key(f"chats:{shard_of(chat, SHARDS)}"), -seconds * 1e6, chat)

    def spoil(self, chat: str, agent: str) -> None:
        self.store(chat, agent, "{nonsense")

    def mark_lives_for(self, turn: str) -> float:
        return self.admin.ttl(self.key(f"cancel:{turn}"))

    @contextmanager
    def round_trips(self):
        """Collect the commands that are sent."""
        client, sent = self.chats.client, []
        real = client.execute_command

        def counted(*command, **options):
            sent.append(command[0])
            return real(*command, **options)

        client.execute_command = counted
        try:
            yield sent
        finally:
            del client.execute_command
