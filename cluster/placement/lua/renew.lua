-- Extends a lease and publishes status, if the lease is still held under this epoch.
-- KEYS: lease, epoch counter, worker ids
-- ARGV: worker id, epoch, status, lease ttl ms, memory ttl ms
-- Returns 1, or 0 where the lease is lost.
if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[2] then
  return 0
end
redis.call('HSET', KEYS[1], 'status', ARGV[3])
redis.call('PEXPIRE', KEYS[1], ARGV[4])
-- Written again rather than extended: an evicted key heals here.
redis.call('SET', KEYS[2], ARGV[2], 'PX', ARGV[5])
redis.call('SADD', KEYS[3], ARGV[1])
redis.call('PEXPIRE', KEYS[3], ARGV[5])
return 1
