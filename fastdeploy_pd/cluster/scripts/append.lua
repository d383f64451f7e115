-- Adds output, each token index once, and only by the claim's present owner.
-- KEYS[1] {fd:T}:requests   KEYS[2] {fd:T}:out:REQUEST
-- ARGV[1] group   ARGV[2] entry id of the request   ARGV[3] consumer   ARGV[4] TTL in ms
-- ARGV[5] "1": this is the end   ARGV[6], ARGV[7], ... pairs of stream id and payload, in order
-- Returns how many entries were new, or -1 if the claim belongs to someone else or has ended.
local pending = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[2], ARGV[2], 1)
if #pending == 0 or pending[1][2] ~= ARGV[3] then
  return -1
end
local last = -1
local tail = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)
if #tail == 1 then
  last = tonumber(string.match(tail[1][1], '^(%d+)-'))
end
local added = 0
for i = 6, #ARGV, 2 do
  if tonumber(string.match(ARGV[i], '^(%d+)-')) > last then
    redis.call('XADD', KEYS[2], ARGV[i], 'kind', 'chunk', 'payload', ARGV[i + 1])
    added = added + 1
  end
end
redis.call('PEXPIRE', KEYS[2], ARGV[4])
if ARGV[5] == '1' then
  redis.call('XACK', KEYS[1], ARGV[1], ARGV[2])
  redis.call('XDEL', KEYS[1], ARGV[2])
end
return added
