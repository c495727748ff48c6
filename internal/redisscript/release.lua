-- KEYS index, jobs...
-- ARGV owner, ids...
-- Returns errors. Those who follow an unfinished job are told to look, with an empty message.
local errors, shard = {}, string.match(KEYS[1], '^{.-}:')
for i = 2, #KEYS do
  local mine, unfinished, err = holds(KEYS[i], ARGV[1])
  if err then
    errors[#errors + 1] = err
  elseif mine then
    spare(KEYS[i])
    redis.call('HSET', KEYS[i], 'lease', '0')
    if unfinished then
      redis.call('ZADD', KEYS[1], '0', ARGV[i])
      redis.call('PUBLISH', shard .. 'watch:' .. ARGV[i], '')
    end
  end
end
return errors
