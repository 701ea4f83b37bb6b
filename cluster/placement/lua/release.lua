-- Gives a lease back; the epoch counter stays, so that the next incarnation's epoch is higher.
-- KEYS: lease, worker ids
-- ARGV: worker id, epoch
-- Returns 1, or 0 where another epoch holds the lease or none does.
if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[2] then
  return 0
end
redis.call('DEL', KEYS[1])
redis.call('SREM', KEYS[2], ARGV[1])
return 1
