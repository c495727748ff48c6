-- KEYS index, jobs...
-- ARGV owner, ttl us, ids...
local lease, lost = int(now() + tonumber(ARGV[2])), {}
for i = 2, #KEYS do
  local was = redis.call('HMGET', KEYS[i], 'owner', 'ended')
  if was[1] == ARGV[1] and was[2] == '0' then
    redis.call('HSET', KEYS[i], 'lease', lease)
    redis.call('ZADD', KEYS[1], lease, ARGV[i + 1])
  else
    lost[#lost + 1] = ARGV[i + 1]
  end
end
return lost
