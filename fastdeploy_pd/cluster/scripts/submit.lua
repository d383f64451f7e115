-- Queues a request once.
-- KEYS[1] {fd:T}:requests   KEYS[2] {fd:T}:out:REQUEST
-- ARGV[1] request id   ARGV[2] payload   ARGV[3] most queued requests   ARGV[4] TTL of the output in ms
-- Returns 1 if queued, 0 if the id is known already, -1 if the queue is full.
if redis.call('EXISTS', KEYS[2]) == 1 then
  return 0
end
if redis.call('XLEN', KEYS[1]) >= tonumber(ARGV[3]) then
  return -1
end
redis.call('XADD', KEYS[1], '*', 'id', ARGV[1], 'payload', ARGV[2])
-- The output stream exists from now on, so that a reader can tell "not begun" from "unknown or expired".
redis.call('XADD', KEYS[2], '0-1', 'kind', 'queued')
redis.call('PEXPIRE', KEYS[2], ARGV[4])
return 1
