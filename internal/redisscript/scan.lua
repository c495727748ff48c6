-- KEYS index
-- ARGV cursor, count. A script, and not a plain read, so that no client routes it to a replica that lags.
-- The next cursor and the ids alone. An index that is one page is read whole: ZSCAN prints a score for each id, which takes longer.
if ARGV[1] == '0' and redis.call('ZCARD', KEYS[1]) <= tonumber(ARGV[2]) then
  return {'0', redis.call('ZRANGE', KEYS[1], 0, -1)}
end
local page = redis.call('ZSCAN', KEYS[1], ARGV[1], 'COUNT', ARGV[2])
local ids = {}
for i = 1, #page[2], 2 do
  ids[#ids + 1] = page[2][i]
end
return {page[1], ids}
