-- KEYS job, index
-- ARGV id, schema, owner, ttl us
local job, index = KEYS[1], KEYS[2]
local was = redis.call('HMGET', job, 'epoch', 'owner', 'lease', 'ended', 'schema')
if not was[1] then
  return {'absent'}
end
if tonumber(was[5]) > tonumber(ARGV[2]) then
  return {'schema', was[5]}
end
spare(job)
local time, ttl = now(), tonumber(ARGV[4])
if tonumber(was[3]) > time then
  if was[2] ~= ARGV[3] then
    return answer('held', job)
  end
else
  redis.call('HSET', job, 'owner', ARGV[3], 'epoch', int(tonumber(was[1]) + 1))
end
local lease = int(time + ttl)
redis.call('HSET', job, 'lease', lease)
if was[4] == '0' then
  redis.call('ZADD', index, lease, ARGV[1])
else
  local left, ms = redis.call('PTTL', job), math.ceil(ttl / 1000)
  if left >= 0 and left < ms then
    redis.call('PEXPIRE', job, int(ms))
  end
end
return answer('there', job)
