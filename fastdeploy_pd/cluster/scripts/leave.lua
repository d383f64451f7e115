-- Takes a member out.
-- KEYS[1] {fd:T}:members   KEYS[2] {fd:T}:member:ID   KEYS[3] {fd:T}:changes (channel)
-- ARGV[1] id
redis.call('DEL', KEYS[2])
redis.call('SREM', KEYS[1], ARGV[1])
redis.call('PUBLISH', KEYS[3], ARGV[1])
return 1
