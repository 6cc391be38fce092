"""The messages that a node has taken and not settled: kept in the broker's Redis, so that they outlive the node.

A *claimant* is one incarnation of a node. In the database of the broker:

``{namespace}.claimants``          claimant -> ``alive``, or ``fenced``: it may take nothing any more
``{namespace}.claims.{claimant}``  claim id -> queue, newline, payload, byte for byte as it was on the list

A claim's id is a decimal number that grows in the order of receipt. A message is in its queue or in exactly one of
these hashes at any moment: each move is one script. A script that fails is not rolled back, so each step is written
down where it leads to before it is taken away where it comes from.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from hashlib import sha1
from typing import Any, NamedTuple

import redis
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, ResponseError
from redis.retry import Retry

logger = logging.getLogger(__name__)

REPLY_TIMEOUT = 20.0
"""Seconds for the answer to a command, where the transport options do not say (``socket_timeout``)."""
CONNECT_TIMEOUT = 5.0
"""Seconds for connecting, where they do not say (``socket_connect_timeout``)."""

OUT_OF_REACH = (redis.RedisError, OSError)
"""What keeps something from being told now. A server that refuses (no memory, no disk, a replica) is no better."""

_REGISTER = """
if redis.call('HGET', KEYS[1], ARGV[1]) == 'fenced' then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], 'alive')
return 1
"""

# LLEN comes last: it has the server tell us of the next change of the queue, and our own RPOP would undo that.
_TAKE = """
local state = redis.call('HGET', KEYS[1], ARGV[1])
if state ~= 'alive' then return redis.error_reply('FENCED it is ' .. (state or 'not registered')) end
local id, credit, limit = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local taken, more = {}, {}
for i = 3, #KEYS do
  for _ = 1, math.min(limit, credit) do
    local payload = redis.call('LINDEX', KEYS[i], -1)
    if not payload then break end
    local name = string.format('%.0f', id)
    redis.call('HSET', KEYS[2], name, KEYS[i] .. '\\n' .. payload)
    redis.call('RPOP', KEYS[i])
    taken[#taken + 1] = {name, i - 3, payload}
    id, credit = id + 1, credit - 1
  end
  if redis.call('LLEN', KEYS[i]) > 0 then more[#more + 1] = i - 3 end
end
return {taken, more}
"""

# ARGV: claimant, the state it must be in (or any), then id and payload of each message, in order of pushing.
_MOVE = """
if ARGV[2] ~= 'any' and redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then return 0 end
local moved = 0
for i = 3, #ARGV, 2 do
  local held = redis.call('HGET', KEYS[2], ARGV[i])
  if held then
    redis.call('RPUSH', string.sub(held, 1, string.find(held, '\\n', 1, true) - 1), ARGV[i + 1])
    redis.call('HDEL', KEYS[2], ARGV[i])
    moved = moved + 1
  end
end
if ARGV[2] == 'fenced' and redis.call('EXISTS', KEYS[2]) == 0 then redis.call('HDEL', KEYS[1], ARGV[1]) end
return moved
"""

_LEAVE = """
local held = redis.call('HLEN', KEYS[2])
if held == 0 then redis.call('HDEL', KEYS[1], ARGV[1]) else redis.call('HSET', KEYS[1], ARGV[1], 'fenced') end
return held
"""


class Fenced(RedisConnectionError):
    """Others have taken over, or are about to, what this claimant held: it needs a new name to go on.

    To the worker it is a lost connection: it stops consuming and connects again, with the claimant that the
    transport options name by then.
    """


class Claim(NamedTuple):
    """A message that was taken. ``id`` is its delivery tag, too."""

    id: str
    queue: str
    payload: bytes


class Claims:
    """What one claimant holds. `of` gives the one of this process; it outlives channels and reconnects.

    What takes a *client* is one call to the server and raises what that raises. The rest is for the channel: it uses
    a client of its own, from any thread, and what cannot be told to Redis now is told by `catch_up`.
    """

    def __init__(self, namespace: str, claimant: str) -> None:
        self.namespace = namespace
        self.claimant = claimant
        self.delivered: dict[str, Claim] = {}
        """Delivery tag -> claim, of all messages that this process has in hand."""
        self.running: Callable[[], Collection[str]] = tuple
        """Tells the delivery tags whose tasks run in this process: they are not given back when a channel closes."""
        self.on_fenced: Callable[[str], None] = lambda claimant: None  # noqa: ARG005
        """Called with the claimant before `Fenced` is raised."""
        self.behind = True
        """Whether `catch_up` has something to do: at the start, and after each reconnect."""
        self._keys = _keys(namespace, claimant)
        self._next_id = time.time_ns() // 1000  # no id is used twice, though a claimant may be restarted by its name
        self._joined = False
        self._settled: set[str] = set()  # ... in vain, so far
        self._lock = threading.Lock()  # what was taken is in `delivered` before anyone looks for left-overs
        self._params: Mapping[str, Any] = {}
        self._client: Any = None

    # -- one call each

    def register(self, client: Any) -> None:
        """Enter the registry as alive. Raises `Fenced`."""
        if not _call(client, _REGISTER, self._keys, [self.claimant]):
            self.on_fenced(self.claimant)
            raise Fenced(f"claimant {self.claimant} is fenced")

    def take(self, client: Any, queues: Sequence[str], credit: int, limit: int = 1) -> tuple[list[Claim], set[str]]:
        """Claim up to *limit* messages of each queue, in the given order, *credit* in all.

        Returns them, and those of the queues that have more. Raises `Fenced` unless the claimant is registered as
        alive. If the answer is lost, the claims are recorded all the same: `catch_up` gives them back.
        """
        with self._lock:
            first, self._next_id = self._next_id, self._next_id + credit
            try:
                keys = [*self._keys, *queues]
                taken, more = _call(client, _TAKE, keys, [self.claimant, first, credit, limit])
            except Exception as error:
                self.behind = True
                if isinstance(error, ResponseError) and str(error).startswith("FENCED"):
                    self.on_fenced(self.claimant)
                    raise Fenced(f"claimant {self.claimant} may take nothing: {str(error)[7:]}") from None
                if isinstance(error, ResponseError):
                    raise _refusal(error) from error
                raise
            claims = [Claim(name.decode(), queues[queue], payload) for name, queue, payload in taken]
            self.delivered.update({claim.id: claim for claim in claims})
        return claims, {queues[index] for index in more}

    def settle(self, client: Any, id: str) -> bool:
        """The message is done. Returns False if it was not held any more."""
        return bool(client.hdel(self._keys[1], id))

    def give_back(self, client: Any, messages: Iterable[tuple[str, bytes]]) -> int:
        """Put messages (id, payload) that are still held at the front of their queues again, marked as redelivered.

        The oldest is the next one out. Returns how many were moved.
        """
        return _move(client, self._keys, self.claimant, messages)

    def leave(self, client: Any) -> int:
        """End gracefully: leave the registry, or be fenced for others to `restore`. Returns how many are still held."""
        return int(_call(client, _LEAVE, self._keys, [self.claimant]))

    # -- for the channel

    @classmethod
    def of(cls, namespace: str, claimant: str) -> "Claims":
        """Return the claims of *claimant* in this process."""
        with _of_lock:
            return _of.setdefault((namespace, claimant), cls(namespace, claimant))

    def connect(self, params: Mapping[str, Any]) -> None:
        """Use a Redis of these connection parameters from here on; each new channel says which."""
        if params != self._params:
            self._params = params
            # Every command here can be repeated, so a connection that the server has closed is no reason to fail.
            own = {**with_timeouts(params), "retry": Retry(NoBackoff(), 1), "max_connections": 1024}
            pool = redis.ConnectionPool(**own)
            self._client = redis.Redis(connection_pool=pool)
        self.behind = True

    @property
    def client(self) -> Any:
        """A client for any thread, whatever becomes of channels. None before the first channel."""
        return self._client

    def done(self, tag: str) -> None:
        """Settle; now, or when Redis can be reached again: the task is over and need not run once more."""
        try:
            self.settle(self._client, tag)
        except OUT_OF_REACH as error:
            logger.warning("message %s is acknowledged when Redis is back: %s", tag, error)
            self._settled.add(tag)
            self.behind = True
        self.delivered.pop(tag, None)  # after it is known as settled: `catch_up` reads them in the other order

    def requeue(self, tags: Iterable[str]) -> None:
        """Give back what of it is in hand; now, or when Redis can be reached again."""
        held = [claim for tag in tags if (claim := self.delivered.get(tag))]
        if not held:
            return
        try:
            self.give_back(self._client, [(claim.id, claim.payload) for claim in held])
        except OUT_OF_REACH as error:
            logger.warning("%d messages go back when Redis is back: %s", len(held), error)
            self.behind = True
        for claim in held:
            self.delivered.pop(claim.id, None)

    def catch_up(self) -> int:
        """Register, settle what could not be settled, give back what is held and not in hand; returns how many.

        The first time in a process that includes all that a predecessor of this name has left. Raises `Fenced`, and
        what the server or the way to it raises.
        """
        with self._lock:
            self.behind = False  # first: another thread may fail meanwhile
            try:
                left = 0 if self._joined else restore(self._client, self.namespace, self.claimant)
                self.register(self._client)
                self._joined = True
                for tag in tuple(self._settled):
                    self.settle(self._client, tag)
                    self._settled.discard(tag)
                in_hand = set(self.delivered)
                left += restore(self._client, self.namespace, self.claimant, keep=in_hand | self._settled)
            except Exception as error:
                self.behind = True
                if isinstance(error, ResponseError):
                    raise _refusal(error) from error
                raise
        if left:
            logger.info("%d messages that %s had not finished went back to their queues", left, self.claimant)
        return left


_of: dict[tuple[str, str], Claims] = {}
_of_lock = threading.Lock()


def claimants(client: Any, namespace: str) -> dict[str, str]:
    """Return who is registered: claimant -> ``alive`` or ``fenced``."""
    return {_text(name): _text(state) for name, state in client.hgetall(f"{namespace}.claimants").items()}


def restore(client: Any, namespace: str, claimant: str, keep: Collection[str] | None = None) -> int:
    """Give back all that *claimant* holds, in order, and strike it off the registry. Returns how many were moved.

    It is fenced first, so that nothing is added meanwhile. Any number of nodes may do this at once, and die under
    way: each message is moved once, and what one has not finished, another can. *keep*: ids that stay; then it is the
    claimant itself that looks for left-overs, and it stays registered as it is.
    """
    keys = _keys(namespace, claimant)
    if keep is None:
        client.hset(keys[0], claimant, "fenced")
    held = [
        (_text(name), _bytes(value).partition(b"\n")[2])
        for name, value in client.hgetall(keys[1]).items()
        if keep is None or _text(name) not in keep
    ]
    if keep is not None and not held:
        return 0
    return _move(client, keys, claimant, held, state="any" if keep is not None else "fenced")


def with_timeouts(params: Mapping[str, Any]) -> dict[str, Any]:
    """Connection parameters whose commands come to an end, also where the server went away without a word."""
    found = dict(params)
    if found.get("socket_timeout") is None:
        found["socket_timeout"] = REPLY_TIMEOUT
    if "path" not in found and found.get("socket_connect_timeout") is None:
        found["socket_connect_timeout"] = CONNECT_TIMEOUT
    return found


def redelivered(payload: bytes) -> bytes:
    """Mark a message as kombu does; one that nobody can read stays as it is."""
    try:
        message = json.loads(payload)
        message["headers"]["redelivered"] = True
        message["properties"]["delivery_info"]["redelivered"] = True
    except (ValueError, KeyError, TypeError):
        return payload
    return json.dumps(message).encode()


def _refusal(error: ResponseError) -> RedisConnectionError:
    """To the worker it is a lost connection: Celery connects again, until the server takes what it is told."""
    return RedisConnectionError(f"Redis refuses: {error}")


def _keys(namespace: str, claimant: str) -> list[str]:
    return [f"{namespace}.claimants", f"{namespace}.claims.{claimant}"]


def _move(
    client: Any,
    keys: Sequence[str],
    claimant: str,
    messages: Iterable[tuple[str, bytes]],
    *,
    state: str = "any",
) -> int:
    # Consumers take from the right, so the oldest is pushed last.
    ordered = sorted(messages, key=lambda message: int(message[0]), reverse=True)
    pushes = [part for name, payload in ordered for part in (name, redelivered(payload))]
    return int(_call(client, _MOVE, keys, [claimant, state, *pushes]))


def _call(client: Any, script: str, keys: Sequence[str], args: Sequence[Any]) -> Any:
    digest = _DIGESTS[script]
    try:
        return client.evalsha(digest, len(keys), *keys, *args)
    except NoScriptError:
        return client.eval(script, len(keys), *keys, *args)


_DIGESTS = {script: sha1(script.encode()).hexdigest() for script in (_REGISTER, _TAKE, _MOVE, _LEAVE)}  # noqa: S324


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value
