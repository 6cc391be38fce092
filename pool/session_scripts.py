"""The scripts that `pool.sessions` runs in Redis; its docstring has the keys and what a record is.

A script of a chat gets the keys of its record, of its shard's index and of the lease table, and as its first arguments
chat, shard and epoch. It answers with a verdict: ``ok`` and what was asked for, ``stale`` and the epoch that has
followed, ``broken`` and the agent, ``turn`` and the one that runs.
"""


def _script(body: str) -> str:
    return PRELUDE + body


# Reads the chat, refuses the stale. Epochs are compared as texts: whole numbers without leading zeros, of any length.
PRELUDE = r"""
local key, index, leases = unpack(KEYS)
local chat, shard, epoch = ARGV[1], ARGV[2], ARGV[3]
local time = redis.call('TIME')
local now = string.format('%d%06d', tonumber(time[1]), tonumber(time[2]))

local function above(a, b)
  if #a ~= #b then return #a > #b end
  return a > b
end
local function sound(record)
  if type(record) ~= 'table' then return false end
  for name, value in pairs(record) do
    if type(name) ~= 'string' then return false end
  end
  for _, name in ipairs({'session_id', 'worktree', 'branch', 'version', 'turn', 'call', 'repeated'}) do
    if record[name] ~= nil and type(record[name]) ~= 'string' then return false end
  end
  for _, name in ipairs({'created', 'last_active', 'epoch'}) do
    local value = record[name]
    if value ~= nil and not (type(value) == 'string' and string.match(value, '^%d+$')) then return false end
  end
  return record.state == nil or record.state == 'open' or record.state == 'closing'
end

local records, agents, broken = {}, {}, {}
local highest = string.match(redis.call('HGET', leases, shard) or '', '^%d+') or '0'
local stored = redis.call('HGETALL', key)
for i = 1, #stored, 2 do
  local good, record = pcall(cjson.decode, stored[i + 1])
  if good and sound(record) and string.match(stored[i + 1], '^%s*{') then
    records[stored[i]] = record
    agents[#agents + 1] = stored[i]
    if above(record.epoch or '0', highest) then highest = record.epoch end
  else
    broken[#broken + 1] = stored[i]
    broken[stored[i]] = true
  end
end
if epoch ~= '0' and above(highest, epoch) then return {'stale', highest} end

local function write(agent)
  local record = records[agent]
  if epoch ~= '0' then record.epoch = epoch end
  local text = cjson.encode(record)
  redis.call('HSET', key, agent, text)
  return text
end
local function list()
  local latest, closing, count = '0', false, #broken
  for _, record in pairs(records) do
    count = count + 1
    if above(record.last_active or '0', latest) then latest = record.last_active end
    closing = closing or record.state == 'closing'
  end
  if count == 0 then
    redis.call('ZREM', index, chat)
  else
    local score = tonumber(latest)
    if closing then score = score - 9e15 end
    redis.call('ZADD', index, string.format('%.0f', score), chat)
  end
end
"""

BEGIN = _script(r"""
local agent, turn, call = ARGV[4], ARGV[5], ARGV[6]
if broken[agent] then return {'broken', agent} end
local record = records[agent] or {created = now}
local repeated = nil
if record.turn == turn and (record.repeated or record.call ~= call) then repeated = '1' end
if record.state ~= 'closing' then
  record.state, record.turn, record.call, record.repeated, record.last_active = 'open', turn, call, repeated, now
  records[agent] = record
  write(agent)
  list()
end
return {'ok', repeated and 1 or 0, cjson.encode(record)}
""")

SAVE = _script(r"""
local agent, turn = ARGV[4], ARGV[5]
if broken[agent] then return {'broken', agent} end
local record = records[agent]
if not record or record.turn ~= turn then return {'turn', record and record.turn or ''} end
record.session_id, record.worktree, record.branch, record.version = ARGV[6], ARGV[7], ARGV[8], ARGV[9]
record.last_active = now
local text = write(agent)
list()
return {'ok', text}
""")

FINISH = _script(r"""
local agent, turn = ARGV[4], ARGV[5]
if broken[agent] then return {'broken', agent} end
local record = records[agent]
if record then
  if record.turn == turn then record.turn, record.call, record.repeated = nil, nil, nil end
  record.last_active = now
  write(agent)
  list()
end
return {'ok'}
""")

MARK_CLOSING = _script(r"""
local marked = {}
for _, agent in ipairs(agents) do
  records[agent].state = 'closing'
  marked[#marked + 1] = agent
  marked[#marked + 1] = write(agent)
end
list()
if #broken > 0 then return {'broken', broken[1]} end
return {'ok', marked}
""")

DELETE = _script(r"""
local agent = ARGV[4]
redis.call('HDEL', key, agent)
records[agent] = nil
if broken[agent] then table.remove(broken) end
list()
return {'ok'}
""")

RECORDS = _script(r"""
if #broken > 0 then return {'broken', broken[1]} end
local found = {}
for _, agent in ipairs(agents) do
  found[#found + 1] = agent
  found[#found + 1] = cjson.encode(records[agent])
end
return {'ok', found}
""")

REQUEST_CANCEL = _script(r"""
local agent, prefix, expires = ARGV[4], ARGV[5], ARGV[6]
local asked = {}
for _, each in ipairs(agents) do
  local turn = records[each].turn or ''
  if turn ~= '' and (agent == '' or agent == each) then
    redis.call('SET', prefix .. turn, '1', 'EX', expires)
    asked[#asked + 1] = turn
  end
end
if broken[agent] or (agent == '' and #broken > 0) then return {'broken', agent ~= '' and agent or broken[1]} end
return {'ok', asked}
""")

IDLE = r"""
local time = redis.call('TIME')
local before = tonumber(time[1]) * 1000000 + tonumber(time[2]) - tonumber(ARGV[1])
return {'ok', redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', string.format('%.0f', before), 'LIMIT', 0, ARGV[2])}
"""
