-- KEYS job, index
-- ARGV id, channel, schema, owner, epoch, rev, cancel, pod, status, terminal (0 or 1), retention ms, record, workflow_sum,
--   workflow ('': not sent, the stored one may be the same)
local job, index = KEYS[1], KEYS[2]
local was = redis.call('HMGET', job, 'epoch', 'owner', 'rev', 'ended', 'cancel', 'lease', 'schema', 'workflow_sum')
if not was[1] then
  return {'absent'}
end
if tonumber(was[7]) > tonumber(ARGV[3]) then
  return {'schema', was[7]}
end
local id, owner, epoch, rev = ARGV[1], ARGV[4], tonumber(ARGV[5]), tonumber(ARGV[6])
local stored = tonumber(was[1])
if epoch < stored or (epoch == stored and owner ~= was[2]) then
  return answer('fenced', job)
end
if epoch == stored and rev <= tonumber(was[3]) then
  return answer('there', job)
end
if epoch == stored and tonumber(was[4]) == stored then
  return answer('fenced', job)
end

if ARGV[14] == '' then
  spare(job)
end
local cancel, lease, ended = was[5], was[6], '0'
if ARGV[10] == '1' then
  if ARGV[7] == '1' then
    cancel = '1'
  end
  lease, ended = '0', ARGV[5]
  redis.call('HDEL', job, 'workflow', 'workflow_sum')
  redis.call('ZREM', index, id)
  expire(job, ARGV[11])
else
  if ARGV[13] ~= (was[8] or '') then
    if ARGV[13] == '' then
      redis.call('HDEL', job, 'workflow', 'workflow_sum')
    elseif ARGV[14] == '' then
      return {'workflow'}
    else
      redis.call('HSET', job, 'workflow_sum', ARGV[13], 'workflow', ARGV[14])
    end
  end
  if was[4] ~= '0' then
    cancel = '0'
    redis.call('PERSIST', job)
    redis.call('ZADD', index, lease, id)
  elseif ARGV[7] == '1' then
    cancel = '1'
  end
end
redis.call('HSET', job, 'schema', ARGV[3], 'owner', owner, 'epoch', ARGV[5], 'rev', ARGV[6], 'cancel', cancel, 'pod', ARGV[8],
  'status', ARGV[9], 'ended', ended, 'lease', lease, 'record', ARGV[12])
tell(ARGV[2], ARGV[5], ARGV[6], ARGV[12])
return {'written', {owner, ARGV[5], ARGV[6], lease, cancel}}
