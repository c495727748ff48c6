-- KEYS index, jobs...
-- ARGV pod ('': every one), ids...
-- Unfinished jobs as answer gives them, each under its id. An index entry without a job (somebody deleted the key) goes.
local found = {}
for i = 2, #KEYS do
  local was = redis.call('HMGET', KEYS[i], 'ended', 'pod')
  if not was[1] then
    redis.call('ZREM', KEYS[1], ARGV[i])
  elseif was[1] == '0' and (ARGV[1] == '' or ARGV[1] == was[2]) then
    found[#found + 1] = answer(ARGV[i], KEYS[i])
  end
end
return found
