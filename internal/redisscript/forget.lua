-- KEYS index, jobs...
-- ARGV ids...
-- Index entries whose job is not there (somebody deleted the key) go.
local gone = 0
for i = 2, #KEYS do
  if redis.call('EXISTS', KEYS[i]) == 0 then
    gone = gone + redis.call('ZREM', KEYS[1], ARGV[i - 1])
  end
end
return gone
