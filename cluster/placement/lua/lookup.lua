-- Walks a prompt's chain while a live worker holds all of it so far.
-- KEYS: the prompt's full blocks, first to last; then the session, if there is one
-- ARGV: prefix of lease keys, number of blocks, most holders to consider
-- Returns: the session's record or false, then worker id and leading blocks held, of each holder.
local num_blocks = tonumber(ARGV[2])
local reply = {false}
if #KEYS > num_blocks then
  reply[1] = redis.call('GET', KEYS[num_blocks + 1])
end
if num_blocks == 0 then
  return reply
end

-- An entry counts only while its worker's lease is alive under the same epoch. One that does not count
-- never will again (publishing is fenced, epochs only rise), so a popular block sheds it here.
local holders, epochs = {}, {}
local entries = redis.call('HGETALL', KEYS[1])
for i = 1, #entries, 2 do
  local worker, epoch = entries[i], entries[i + 1]
  if redis.call('HGET', ARGV[1] .. worker, 'epoch') ~= epoch then
    redis.call('HDEL', KEYS[1], worker)
  elseif #holders < tonumber(ARGV[3]) then
    holders[#holders + 1] = worker
    epochs[worker] = epoch
  end
end

local function report(worker, blocks)
  reply[#reply + 1] = worker
  reply[#reply + 1] = blocks
end

-- Most blocks lose no holder: the list is rebuilt only where one does.
local function keep_holders_of(block)
  local found = redis.call('HMGET', KEYS[block], unpack(holders))
  for i = 1, #holders do
    if found[i] ~= epochs[holders[i]] then
      local remaining = {}
      for j, worker in ipairs(holders) do
        if found[j] == epochs[worker] then
          remaining[#remaining + 1] = worker
        else
          report(worker, block - 1)
        end
      end
      holders = remaining
      return
    end
  end
end

for block = 2, num_blocks do
  if #holders == 0 then
    return reply
  end
  keep_holders_of(block)
end
for _, worker in ipairs(holders) do
  report(worker, num_blocks)
end
return reply
