-- Renews a member's lease and record.
-- KEYS[1] {fd:T}:members   KEYS[2] {fd:T}:member:ID   KEYS[3] {fd:T}:changes (channel)
-- ARGV[1] id   ARGV[2] record (JSON)   ARGV[3] lease in ms   ARGV[4] "1": tell the watchers
-- Returns 1 if the member was not there before (first time, lapsed, or Redis lost its data), else 0.
local is_new = redis.call('EXISTS', KEYS[2]) == 0
redis.call('SET', KEYS[2], ARGV[2], 'PX', ARGV[3])
redis.call('SADD', KEYS[1], ARGV[1])
if is_new or ARGV[4] == '1' then
  redis.call('PUBLISH', KEYS[3], ARGV[1])
end
return is_new and 1 or 0
