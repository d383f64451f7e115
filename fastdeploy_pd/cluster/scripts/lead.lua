-- Takes or renews a lease: of the topic's elastic leader, or of a flip of a role.
-- KEYS[1] {fd:T}:leader or {fd:T}:flip
-- ARGV[1] id   ARGV[2] lease in ms
-- Returns 1 if the lease is ARGV[1]'s now, else 0: somebody else holds it.
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then
  return 0
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
