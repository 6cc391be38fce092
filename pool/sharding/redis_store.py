"""The lease table in Redis: one script call tells and asks everything that a node has to say at a heartbeat.

Keys, all with the hash tag of the namespace, so that they share one slot of a Redis Cluster::

    {pool}:meta     hash    born, version, clock, real, epoch, quarantine, shards, run_id
    {pool}:alive    zset    incarnation -> when its membership ends (lease clock, ms)
    {pool}:members  hash    incarnation -> "state node"
    {pool}:leases   hash    shard -> "epoch incarnation"; an owner that is no member counts as nobody
    {pool}:changes  zset    shard -> version of its last change: what a node reads back is what it has not seen
    {pool}:dead     hash    incarnation that ended without a farewell -> its node, until its messages were put back

**Lease clock.** Memberships end by a clock of the table's own. From one request to the next it advances as much as
Redis ``TIME`` does, but never backwards, never by more than the asking member's own clock has since it asked before (a
node that is no member yet: by ``margin``), and never by more than half a TTL. So it is never faster than the slower of
two independent clocks: a jump of the server's clock, or a server that was frozen, ends no lease early.

**Epochs** only grow: each is above the last one the table knows, above every one the asking node knows, and at least
``TIME`` in microseconds. So none is used again after the table was lost, unless the clock went back as well and no node
that remembers survived.

**A table that was lost or set back** (flushed, restarted or failed over to a replica that lags: the server's
``run_id`` is another one) is *born* again: for one TTL nothing is taken from it, and the nodes that still trust their
leases assert them; the higher epoch wins. What it gives to a node that does not hold it, that node releases: there may
have been later owners. An empty table that no node claims to have known (a first start) is quarantined for a little
more than a heartbeat only, so that survivors can speak up.
"""

import contextlib
import json
import math
import re
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import NoScriptError

from pool.errors import ConfigError
from pool.sharding.lease import Answer, Lease, Member, Request, Terms
from pool.sharding.table import KEYS, LOOK, Table

SCRIPT = r"""
local meta, alive, members, leases, changes, dead = unpack(KEYS)
local req = cjson.decode(ARGV[1])
local me = req.incarnation

local function number(field) return tonumber(redis.call('HGET', meta, field) or '0') end
local function integer(value) return string.format('%.0f', value) end

-- The server, the lease clock, and whether this is the table that everybody knew.
local time = redis.call('TIME')
local micros = tonumber(time[1]) * 1000000 + tonumber(time[2])
local real = math.floor(micros / 1000)
local info = redis.pcall('INFO', 'server')
local run_id = type(info) == 'string' and string.match(info, 'run_id:(%w+)') or ''
local born = redis.call('HGET', meta, 'born')
local clock = number('clock')
if born then
  local step = math.max(0, math.min(real - number('real'), req.ttl / 2))
  local ends = redis.call('ZSCORE', alive, me)
  if ends then
    clock = math.max(clock, math.min(clock + step, tonumber(ends) - req.ttl + req.elapsed))
  else
    clock = clock + math.min(step, req.margin)
  end
end
if not born or redis.call('HGET', meta, 'run_id') ~= run_id then
  local wait = req.ttl
  if not born then
    -- Without its clock and version the rest means nothing. The dead stay: their messages are still to be put back.
    redis.call('DEL', alive, members, leases, changes)
    if req.born == '' then wait = req.settle end
  end
  born = run_id .. ':' .. integer(micros)
  redis.call('HSET', meta, 'born', born, 'run_id', run_id, 'quarantine', clock + wait)
end
redis.call('HSET', meta, 'clock', clock, 'real', real)
if req.born ~= '' and req.born ~= born and redis.call('HEXISTS', members, me) == 0 then
  -- A survivor of a table that is gone: there may be more of them.
  redis.call('HSET', meta, 'quarantine', math.max(number('quarantine'), clock + req.ttl))
end

-- Whose membership has ended?
local version = number('version')
local bumped = false
local function bump()
  if not bumped then
    bumped = true
    version = version + 1
    redis.call('HSET', meta, 'version', version)
  end
  return version
end
local function members_changed() redis.call('HSET', meta, 'members_version', bump()) end
local function node_of(record) return string.match(record, '^%S+ (.*)$') end

for _, gone in ipairs(redis.call('ZRANGEBYSCORE', alive, '-inf', clock)) do
  local record = redis.call('HGET', members, gone)
  redis.call('ZREM', alive, gone)
  redis.call('HDEL', members, gone)
  redis.call('HSET', dead, gone, record and node_of(record) or '')
  members_changed()
end
local member = redis.call('HEXISTS', members, me) == 1
if redis.call('HEXISTS', dead, me) == 1 or (not member and req.born == born) then return {'dead', ''} end

-- May this node take part?
if not member then
  local others = redis.call('HGETALL', members)
  for i = 1, #others, 2 do
    if node_of(others[i + 1]) == req.node then
      return {'name', others[i] .. ' ' .. redis.call('ZSCORE', alive, others[i])}
    end
  end
  local shards = number('shards')
  if #others > 0 and shards ~= req.shards then
    return {'shards', integer(shards) .. ' ' .. node_of(others[2])}
  end
  if shards ~= req.shards then
    redis.call('DEL', leases, changes)
    redis.call('HSET', meta, 'shards', req.shards)
  end
end

local epoch = math.max(number('epoch'), tonumber(req.floor))
local function owner_of(shard)
  local lease = redis.call('HGET', leases, shard)
  if not lease then return '', 0 end
  local e, owner = string.match(lease, '^(%d+) (.*)$')
  return owner, tonumber(e)
end
local function give(shard, owner, e)
  redis.call('HSET', leases, shard, integer(e) .. ' ' .. owner)
  redis.call('ZADD', changes, bump(), shard)
end
local function next_epoch()
  epoch = math.max(epoch + 1, micros)
  return epoch
end
local function lives(incarnation) return redis.call('ZSCORE', alive, incarnation) end

local handed = {}
for _, release in ipairs(req.releases) do
  local shard, successor = release[1], release[3]
  local owner, e = owner_of(shard)
  if owner == me and e == tonumber(release[2]) then
    if successor == '' or not lives(successor) then
      give(shard, '', e)
    elseif clock >= number('quarantine') then -- else a later owner may still have to speak up: it is asked again
      give(shard, successor, next_epoch())
      handed[successor] = true
    end
  end
end

if req.state == 'bye' then
  redis.call('ZREM', alive, me)
  if redis.call('HDEL', members, me) == 1 then members_changed() end
else
  redis.call('ZADD', alive, clock + req.ttl, me)
  local record = req.state .. ' ' .. req.node
  if redis.call('HGET', members, me) ~= record then
    redis.call('HSET', members, me, record)
    members_changed()
  end
  for _, held in ipairs(req.asserts) do
    local owner, e = owner_of(held[1])
    local claimed = tonumber(held[2])
    if e < claimed or (e == claimed and owner == '') then give(held[1], me, claimed) end
    epoch = math.max(epoch, claimed)
  end
  if clock >= number('quarantine') then
    for _, shard in ipairs(req.takes) do
      local owner = owner_of(shard)
      if owner == '' or not lives(owner) then give(shard, me, next_epoch()) end
    end
  end
end
redis.call('HSET', meta, 'epoch', integer(epoch))
if #req.buried > 0 then redis.call('HDEL', dead, unpack(req.buried)) end
for successor in pairs(handed) do redis.call('PUBLISH', ARGV[2] .. successor, 'handed') end

-- What it has not seen.
local seen = req.seen
if req.born ~= born then seen = -1 end
local changed = {}
for _, shard in ipairs(redis.call('ZRANGEBYSCORE', changes, '(' .. seen, '+inf')) do
  local owner, e = owner_of(shard)
  changed[#changed + 1] = shard
  changed[#changed + 1] = integer(e)
  changed[#changed + 1] = owner
end
local everybody = false
if number('members_version') > seen then everybody = redis.call('HGETALL', members) end
return {'ok', '', born, version, math.max(0, number('quarantine') - clock), everybody or '', changed,
        redis.call('HKEYS', dead)}
"""


class RedisStore:
    """The lease table of one namespace, through an asyncio client with ``decode_responses=True``."""

    def __init__(self, client: "Redis", namespace: str, shards: int, terms: Terms) -> None:
        self.client = client
        self.namespace = namespace
        self.shards = shards
        self.terms = terms
        self._keys = keys_of(namespace, "meta", "alive", "members", "leases", "changes", "dead")
        self._channel = f"{{{namespace}}}:handed:"
        self._sha = ""

    @contextlib.asynccontextmanager
    async def handed(self, incarnation: str) -> AsyncIterator[Callable[[], Coroutine[Any, Any, None]]]:
        """A function that waits until somebody has handed a shard to *incarnation*. Raises what redis-py raises."""
        async with self.client.pubsub(ignore_subscribe_messages=True) as pubsub:
            await pubsub.subscribe(self._channel + incarnation)

            async def following() -> None:
                while await pubsub.get_message(timeout=None) is None:
                    pass

            yield following

    async def check(self) -> None:
        """Raise `ConfigError` for a server that may throw the table away."""
        policy = (await self.client.info("memory")).get("maxmemory_policy", "noeviction")
        if policy != "noeviction":
            raise ConfigError(
                f"Redis maxmemory-policy={policy}: a full server would throw leases or tasks away. Set it to noeviction"
            )

    async def beat(self, request: Request) -> Answer:
        """Tell and ask, in one call. Raises what redis-py raises; then it is unknown whether the store has heard."""
        asked = json.dumps(self._wire(request))
        arguments: list[Any] = [*self._keys, asked, self._channel]
        try:
            if not self._sha:
                self._sha = await self.client.script_load(SCRIPT)
            answer = await self.client.evalsha(self._sha, len(self._keys), *arguments)
        except NoScriptError:  # a server that was restarted
            answer = await self.client.eval(SCRIPT, len(self._keys), *arguments)
        return self._read(answer)

    async def read(self) -> Table:
        """Return the whole table and change nothing. Raises what redis-py raises."""
        call: Any = self.client.eval(LOOK, len(KEYS), *keys_of(self.namespace, *KEYS))
        return Table.of(await call)

    def _wire(self, request: Request) -> dict[str, Any]:
        """Epochs travel as text: they have 16 digits, and Lua's JSON keeps 14."""
        terms = self.terms
        return {
            "incarnation": request.incarnation,
            "node": request.node,
            "state": request.state,
            "shards": self.shards,
            "ttl": _milliseconds(terms.ttl),
            "margin": _milliseconds(terms.margin),
            "settle": _milliseconds(1.2 * terms.heartbeat),
            "born": request.born,
            "seen": request.seen,
            "elapsed": _milliseconds(request.elapsed),
            "floor": str(request.floor),
            "takes": request.takes,
            "releases": [[release.shard, str(release.epoch), release.successor] for release in request.releases],
            "asserts": [[shard, str(epoch)] for shard, epoch in request.asserts],
            "buried": request.buried,
        }

    @staticmethod
    def _read(answer: Any) -> Answer:
        if answer[0] != "ok":
            return Answer(answer[0], answer[1])
        _, _, born, version, quarantine, everybody, changed, dead = answer
        members = leases = None
        if isinstance(everybody, list):
            pairs = zip(everybody[::2], everybody[1::2], strict=True)
            members = {incarnation: Member(*reversed(record.split(" ", 1))) for incarnation, record in pairs}
        if changed:
            triples = zip(changed[::3], changed[1::3], changed[2::3], strict=True)
            leases = {int(shard): Lease(int(epoch), owner) for shard, epoch, owner in triples}
        return Answer("ok", "", born, int(version), int(quarantine) / 1000, members, leases, tuple(sorted(dead)))


def keys_of(namespace: str, *names: str) -> list[str]:
    """Return the store's keys of these names."""
    return [f"{{{namespace}}}:{name}" for name in names]


def plain_url(url: str) -> str:
    """Return kombu's URL of a Redis as redis-py spells it. Raises `ConfigError` for one that it cannot use."""
    url = re.sub(r"^redis\+socket://", "unix://", re.sub(r"^valkey", "redis", url))
    if not url.startswith(("redis://", "rediss://", "unix://")):
        scheme = url.partition("://")[0]
        raise ConfigError(f"POOL_REDIS_URL: leases need a redis:// or rediss:// URL, not {scheme}://")
    return url


def _milliseconds(seconds: float) -> int:
    return math.ceil(1000 * seconds)
