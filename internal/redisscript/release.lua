-- KEYS index, jobs...
-- ARGV owner, ids...
for i = 2, #KEYS do
  local was = redis.call('HMGET', KEYS[i], 'owner', 'ended')
  if was[1] == ARGV[1] then
    redis.call('HSET', KEYS[i], 'lease', '0')
    if was[2] == '0' then
      redis.call('ZADD', KEYS[1], '0', ARGV[i])
    end
  end
end
return #KEYS - 1
