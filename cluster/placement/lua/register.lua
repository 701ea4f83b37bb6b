-- Takes a worker's lease under a new epoch, higher than any remembered and at least the floor.
-- KEYS: lease, epoch counter, worker ids
-- ARGV: worker id, floor, identity, status, lease ttl ms, memory ttl ms
-- Returns the epoch as text: a Lua number is exact to 2^53, which epochs (microseconds) stay below.
local remembered = tonumber(redis.call('GET', KEYS[2]) or '0')
local epoch = string.format('%.0f', math.max(remembered + 1, tonumber(ARGV[2])))
redis.call('SET', KEYS[2], epoch, 'PX', ARGV[6])
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], 'epoch', epoch, 'identity', ARGV[3], 'status', ARGV[4])
redis.call('PEXPIRE', KEYS[1], ARGV[5])
redis.call('SADD', KEYS[3], ARGV[1])
redis.call('PEXPIRE', KEYS[3], ARGV[6])
return epoch
