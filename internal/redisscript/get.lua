-- KEYS job. A script, and not a plain read, so that no client routes it to a replica that lags.
if redis.call('EXISTS', KEYS[1]) == 0 then
  return {'absent'}
end
return answer('there', KEYS[1])
