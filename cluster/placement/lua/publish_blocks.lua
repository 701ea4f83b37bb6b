-- Records which blocks a worker holds and which it dropped, if its lease is held under this epoch.
-- KEYS: lease, then the blocks held, then the blocks dropped
-- ARGV: worker id, epoch, block ttl ms, number of blocks held
-- Returns 1, or 0 where the lease is lost.
if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[2] then
  return 0
end
local last_held = 1 + tonumber(ARGV[4])
for i = 2, last_held do
  redis.call('HSET', KEYS[i], ARGV[1], ARGV[2])
  redis.call('PEXPIRE', KEYS[i], ARGV[3])
end
for i = last_held + 1, #KEYS do
  redis.call('HDEL', KEYS[i], ARGV[1])
end
return 1
