-- Every script touches the keys of one shard. A job is a hash:
--   schema, record, workflow, workflow_sum, pod, status   what its owner wrote
--   owner, epoch, rev, lease, cancel                      what Record keeps outside of its JSON
--   ended                                                 the epoch in which the job ended; 0: unfinished
-- Leases end at microseconds since 1970 by this server's clock; 0: free. The index has the unfinished jobs, by lease end.
-- Numbers are written with %.0f: Lua's own form of a time is 1.79e+15.

local function now()
  local t = redis.call('TIME')
  return tonumber(t[1]) * 1000000 + tonumber(t[2])
end

local function int(n)
  return string.format('%.0f', n)
end

-- spare lets the writes that follow go on in a Redis that has reached its maxmemory: it judges a script by its first write, and this
-- one takes no memory. What drives a job to its end, which gives memory back, must not wait for memory.
local function spare(job)
  redis.call('HDEL', job, '')
end

-- holds tells whether a job is the owner's, and whether it is unfinished; or the error where another program has made something
-- else of the key: that must not cost the other jobs of a script theirs.
local function holds(job, owner)
  local was = redis.pcall('HMGET', job, 'owner', 'ended')
  if was.err then
    return false, false, was
  end
  return was[1] == owner, was[2] == '0'
end

-- answer is a verdict and the record as it stands.
local function answer(verdict, job)
  return {verdict, redis.call('HMGET', job, 'owner', 'epoch', 'rev', 'lease', 'cancel', 'record', 'workflow')}
end

-- expire lets the job's key live for that many milliseconds; 0: for good.
local function expire(job, ms)
  if tonumber(ms) > 0 then
    redis.call('PEXPIRE', job, ms)
  else
    redis.call('PERSIST', job)
  end
end

-- tell those who watch. A long record they get for themselves.
local function tell(channel, epoch, rev, record)
  if #record > 8192 then
    record = ''
  end
  redis.call('PUBLISH', channel, epoch .. ' ' .. rev .. '\n' .. record)
end
