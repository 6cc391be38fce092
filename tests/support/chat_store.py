"""The records of chats in plain Python: what the scripts of `pool.sessions` do, over a clock that a test can set."""

import threading
from collections.abc import Collection
from dataclasses import replace

from pool.chats import Begun, Chat, ChatStore
from pool.errors import ConfigError, NotOwner, PoolError
from pool.keys import check_key
from pool.sharding.hashing import shard_of

CANCEL_EXPIRES = 3600.0


class FakeChats(ChatStore):
    """A `ChatStore`. Set ``now`` (seconds since 1970) and ``leases`` (shard -> epoch) as a test needs them."""

    def __init__(self, shards: int = 64, *, leased: bool = False) -> None:
        self.shards = shards
        self.leased = leased
        self.now = 1_800_000_000.0
        self.leases: dict[int, int] = {}
        self.chats: dict[str, dict[str, Chat | None]] = {}
        """Chat -> agent -> record; None: one that cannot be decoded."""
        self.marks: dict[str, float] = {}
        """Turn -> when its mark expires."""
        self.unreachable: PoolError | None = None
        """Raised by every method while it is set."""
        self._lock = threading.RLock()

    def begin(self, chat: str, agent: str, epoch: int, turn: str) -> Begun:
        if not turn:
            raise ConfigError("turn is empty")
        check_key(agent)
        with self._lock:
            self._fence(chat, epoch)
            before = self._record(chat, agent) or Chat(chat, agent, created=self._tick())
            if before.state == "closing":
                return Begun(before, before.turn == turn)
            return Begun(self._write(before, epoch, turn=turn), before.turn == turn)

    def save(self, chat: Chat, epoch: int) -> Chat:
        check_key(chat.agent)
        with self._lock:
            self._fence(chat.chat, epoch)
            before = self._record(chat.chat, chat.agent)
            if before is None or not chat.turn or before.turn != chat.turn:
                raise PoolError(f"chat {chat.chat!r} of agent {chat.agent!r}: turn {chat.turn!r} does not run")
            return self._write(
                before,
                epoch,
                session_id=chat.session_id,
                worktree=chat.worktree,
                branch=chat.branch,
                version=chat.version,
            )

    def finish(self, chat: str, agent: str, epoch: int, turn: str) -> None:
        check_key(agent)
        with self._lock:
            self._fence(chat, epoch)
            if before := self._record(chat, agent):
                self._write(before, epoch, turn="" if before.turn == turn else before.turn)

    def mark_closing(self, chat: str, epoch: int) -> list[Chat]:
        with self._lock:
            self._fence(chat, epoch)
            for record in self._sound(chat):
                self._write(record, epoch, state="closing", last_active=record.last_active)
            return self.records(chat)

    def delete(self, chat: str, agent: str, epoch: int) -> None:
        check_key(agent)
        with self._lock:
            self._fence(chat, epoch)
            records = self.chats.get(chat, {})
            records.pop(agent, None)
            if not records:
                self.chats.pop(chat, None)

    def records(self, chat: str) -> list[Chat]:
        self._reach()
        with self._lock:
            agents = sorted(self.chats.get(check_key(chat), {}))
            return [record for agent in agents if (record := self._record(chat, agent))]

    def idle(self, shard: int, idle_for: float, limit: int = 100) -> list[str]:
        self._reach()
        if not 0 <= shard < self.shards or limit < 1:
            raise ConfigError(f"shard={shard!r}, limit={limit!r}")
        with self._lock:
            found = []
            for chat in self.chats:
                records = self._sound(chat)
                closing = any(record.state == "closing" for record in records)
                active = max((record.last_active for record in records), default=0.0)
                if shard_of(chat, self.shards) == shard and (closing or active <= self._tick() - idle_for):
                    found.append((not closing, active, chat))
            return [chat for _, _, chat in sorted(found)][:limit]

    def request_cancel(self, chat: str, agent: str | None = None) -> list[str]:
        self._reach()
        if agent is not None:
            check_key(agent)
        with self._lock:
            check_key(chat)
            turns = [record.turn for record in self._sound(chat) if record.turn and agent in (None, record.agent)]
            self.marks.update(dict.fromkeys(turns, self.now + CANCEL_EXPIRES))
            for each in self.chats.get(chat, {}):
                if agent in (None, each):
                    self._record(chat, each)
            return sorted(turns)

    def cancelled(self, turns: Collection[str]) -> set[str]:
        self._reach()
        with self._lock:
            return {turn for turn in turns if self.marks.get(turn, 0.0) > self.now}

    def _reach(self) -> None:
        if self.unreachable:
            raise self.unreachable

    def _tick(self) -> float:
        """The clock never says the same twice."""
        self.now += 1e-6
        return self.now

    def _sound(self, chat: str) -> list[Chat]:
        return [record for record in self.chats.get(chat, {}).values() if record]

    def _record(self, chat: str, agent: str) -> Chat | None:
        record = self.chats.get(chat, {}).get(agent, ...)
        if record is None:
            raise PoolError(f"chat {chat!r}: the record of agent {agent!r} cannot be decoded", chat, agent)
        return None if record is ... else record

    def _fence(self, chat: str, epoch: int) -> None:
        self._reach()
        shard = shard_of(check_key(chat), self.shards)
        if epoch < 0:
            raise ConfigError(f"epoch={epoch!r}")
        if self.leased and not epoch:
            raise NotOwner(f"chat {chat!r}: shard {shard} is not held: epoch 0")
        highest = max([self.leases.get(shard, 0), *(record.epoch for record in self._sound(chat))])
        if epoch and highest > epoch:
            raise NotOwner(f"chat {chat!r}: epoch {epoch} of shard {shard} is over: epoch {highest} has followed")

    def _write(self, before: Chat, epoch: int, **changes: object) -> Chat:
        changes.setdefault("last_active", self._tick())
        record = replace(before, epoch=epoch or before.epoch, **changes)  # type: ignore[arg-type]
        self.chats.setdefault(record.chat, {})[record.agent] = record
        return record
