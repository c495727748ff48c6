-- KEYS index
-- ARGV cursor, count. A script, and not a plain read, so that no client routes it to a replica that lags.
return redis.call('ZSCAN', KEYS[1], ARGV[1], 'COUNT', ARGV[2])
