-- KEYS index, jobs...
-- ARGV owner, ttl us, ids...
-- Returns the ids that are lost, and errors.
local lease, lost = int(now() + tonumber(ARGV[2])), {}
for i = 2, #KEYS do
  local mine, unfinished, err = holds(KEYS[i], ARGV[1])
  if err then
    lost[#lost + 1] = err
  elseif mine and unfinished then
    spare(KEYS[i])
    redis.call('HSET', KEYS[i], 'lease', lease)
    redis.call('ZADD', KEYS[1], lease, ARGV[i + 1])
  else
    lost[#lost + 1] = ARGV[i + 1]
  end
end
return lost
