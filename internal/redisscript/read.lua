-- KEYS jobs...
-- ARGV fields...
-- A plain read costs half; this is for clients that would route one to a replica, which may lag.
local values = {}
for i = 1, #KEYS do
  values[i] = redis.pcall('HMGET', KEYS[i], unpack(ARGV))
end
return values
