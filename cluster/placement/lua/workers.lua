-- All workers whose lease is alive; ids without one are forgotten on the way.
-- KEYS: worker ids
-- ARGV: prefix of lease keys
-- Returns a flat list: epoch, identity, status of each.
local found = {}
for _, worker in ipairs(redis.call('SMEMBERS', KEYS[1])) do
  local lease = redis.call('HMGET', ARGV[1] .. worker, 'epoch', 'identity', 'status')
  if lease[1] and lease[2] and lease[3] then
    found[#found + 1] = lease[1]
    found[#found + 1] = lease[2]
    found[#found + 1] = lease[3]
  else
    redis.call('SREM', KEYS[1], worker)
  end
end
return found
