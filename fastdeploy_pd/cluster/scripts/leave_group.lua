-- Takes consumers out of the group that have claimed nothing: one that ends, and those that have been silent for long.
-- KEYS[1] {fd:T}:requests
-- ARGV[1] group   ARGV[2] consumer that ends, or ''   ARGV[3] how long the others have been silent, in ms
-- Returns how many.
local consumers = redis.pcall('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])
if consumers.err then
  return 0 -- there is no such group
end
local count = 0
for _, fields in ipairs(consumers) do
  local consumer = {}
  for i = 1, #fields, 2 do
    consumer[fields[i]] = fields[i + 1]
  end
  if consumer.pending == 0 and (consumer.name == ARGV[2] or consumer.idle > tonumber(ARGV[3])) then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], consumer.name)
    count = count + 1
  end
end
return count
