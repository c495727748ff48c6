-- KEYS index, jobs...
-- ARGV ids...
-- Returns the ids of the unfinished jobs whose cancel is requested, and errors.
local found = {}
for i = 2, #KEYS do
  local was = redis.pcall('HMGET', KEYS[i], 'cancel', 'ended')
  if was.err then
    found[#found + 1] = was
  elseif was[1] == '1' and was[2] == '0' then
    found[#found + 1] = ARGV[i - 1]
  end
end
return found
