-- KEYS job, index
-- ARGV id, channel, schema, owner, rev, cancel, pod, status, ended (epoch or 0), ttl us, retention ms, record, workflow_sum, workflow
local job, index = KEYS[1], KEYS[2]
if redis.call('EXISTS', job) == 1 then
  return answer('there', job)
end
local id, ended = ARGV[1], ARGV[9]
local lease = '0'
if ended == '0' then
  lease = int(now() + tonumber(ARGV[10]))
end
redis.call('HSET', job, 'schema', ARGV[3], 'owner', ARGV[4], 'epoch', '1', 'rev', ARGV[5], 'cancel', ARGV[6], 'pod', ARGV[7],
  'status', ARGV[8], 'ended', ended, 'lease', lease, 'record', ARGV[12])
if ended == '0' then
  if ARGV[14] ~= '' then
    redis.call('HSET', job, 'workflow_sum', ARGV[13], 'workflow', ARGV[14])
  end
  redis.call('ZADD', index, lease, id)
else
  expire(job, ARGV[11])
end
tell(ARGV[2], '1', ARGV[5], ARGV[12])
return {'written', {ARGV[4], '1', ARGV[5], lease, ARGV[6]}}
