-- KEYS job
-- ARGV schema
local was = redis.call('HMGET', KEYS[1], 'ended', 'schema')
if not was[1] then
  return {'absent'}
end
if tonumber(was[2]) > tonumber(ARGV[1]) then
  return {'schema', was[2]}
end
if was[1] == '0' then
  spare(KEYS[1])
  redis.call('HSET', KEYS[1], 'cancel', '1')
end
return answer('there', KEYS[1])
