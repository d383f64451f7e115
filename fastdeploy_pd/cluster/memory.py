"""The registry and the request queue without Redis: the same interfaces and the same contract tests, for one process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fastdeploy_pd.clock import Clock
from fastdeploy_pd.cluster.queue import CLAIM_LEASE_S, MAX_PAYLOAD_BYTES, MAX_QUEUED, Claimed, OutputEntry
from fastdeploy_pd.cluster.registry import FLIP_LEASE_S, LEADER_LEASE_S, LEASE_S, MemberRecord
from fastdeploy_pd.errors import InvalidRequest, QueueFull


class MemoryRegistry:
    """See registry.Registry."""

    def __init__(self, clock: Clock, lease_s: float = LEASE_S, leader_lease_s: float = LEADER_LEASE_S) -> None:
        self._clock, self._lease_s, self._leader_lease_s = clock, lease_s, leader_lease_s
        self._leader, self._leads_until_s = "", 0.0
        self._flip, self._flips_until_s = "", 0.0
        self._members: dict[str, tuple[MemberRecord, float]] = {}

    def heartbeat(self, record: MemberRecord, is_change: bool = False) -> bool:
        """See Registry."""
        is_new = record.instance_id not in {m.instance_id for m in self.members()}
        self._members[record.instance_id] = (record, self._clock.now_s() + self._lease_s)
        return is_new

    def leave(self, instance_id: str) -> None:
        """See Registry."""
        self._members.pop(instance_id, None)

    def members(self) -> tuple[MemberRecord, ...]:
        """See Registry."""
        now_s = self._clock.now_s()
        self._members = {i: m for i, m in self._members.items() if m[1] > now_s}
        return tuple(self._members[i][0] for i in sorted(self._members))

    def lead(self, instance_id: str) -> bool:
        """See Registry."""
        now_s = self._clock.now_s()
        if self._leader != instance_id and now_s < self._leads_until_s:
            return False
        self._leader, self._leads_until_s = instance_id, now_s + self._leader_lease_s
        return True

    def begin_flip(self, flip_id: str, lease_s: float = FLIP_LEASE_S) -> bool:
        """See Registry."""
        now_s = self._clock.now_s()
        if self._flip != flip_id and now_s < self._flips_until_s:
            return False
        self._flip, self._flips_until_s = flip_id, now_s + lease_s
        return True

    def end_flip(self, flip_id: str) -> None:
        """See Registry."""
        if self._flip == flip_id:
            self._flips_until_s = 0.0


@dataclass(slots=True)
class _Entry:
    claimed: Claimed
    owner: str | None = None
    renewed_s: float = 0.0


@dataclass(slots=True)
class _Output:
    expires_s: float
    entries: list[OutputEntry] = field(default_factory=list)


class MemoryQueue:
    """See queue.RequestQueue. It never waits: what is not there is not there yet."""

    def __init__(
        self, clock: Clock, ttl_s: float = 900.0, max_queued: int = MAX_QUEUED, claim_lease_s: float = CLAIM_LEASE_S
    ) -> None:
        self._clock, self._ttl_s, self._max_queued, self._lease_s = clock, ttl_s, max_queued, claim_lease_s
        self._entries: dict[str, _Entry] = {}
        self._outputs: dict[str, _Output] = {}
        self._cancelled: set[str] = set()
        self._count = 0

    def submit(self, request_id: str, payload: bytes) -> None:
        """See RequestQueue."""
        if len(payload) > MAX_PAYLOAD_BYTES:
            raise InvalidRequest(
                f"the request has {len(payload)} bytes; at most {MAX_PAYLOAD_BYTES} are allowed", param="body"
            )
        if self.exists(request_id):
            raise InvalidRequest(
                f"request id {request_id!r} was submitted before", param="request_id", code="duplicate_id"
            )
        if len(self._entries) >= self._max_queued:
            raise QueueFull(f"{self._max_queued} requests are queued; try again later")
        self._count += 1
        entry_id = f"{self._count}-0"
        self._entries[entry_id] = _Entry(Claimed(entry_id, request_id, payload))
        self._outputs[request_id] = _Output(self._clock.now_s() + self._ttl_s, [OutputEntry("0-1", b"")])

    def claim(self, consumer: str, count: int, block_s: float) -> list[Claimed]:
        """See RequestQueue."""
        free = [e for e in self._entries.values() if e.owner is None][:count]
        return [self._give(e, consumer) for e in free]

    def renew(self, consumer: str, entry_ids: Sequence[str]) -> None:
        """See RequestQueue."""
        for entry_id in entry_ids:
            entry = self._entries.get(entry_id)
            if entry is not None and entry.owner == consumer:
                entry.renewed_s = self._clock.now_s()

    def reclaim(self, consumer: str, count: int) -> list[Claimed]:
        """See RequestQueue."""
        oldest_s = self._clock.now_s() - self._lease_s
        lapsed = [e for e in self._entries.values() if e.owner is not None and e.renewed_s <= oldest_s][:count]
        return [self._give(e, consumer) for e in lapsed]

    def append(
        self, consumer: str, claimed: Claimed, chunks: Sequence[tuple[int, bytes]], is_end: bool = False
    ) -> bool:
        """See RequestQueue."""
        entry = self._entries.get(claimed.entry_id)
        if entry is None or entry.owner != consumer:
            return False
        output = self._outputs.setdefault(claimed.request_id, _Output(0.0))
        output.expires_s = self._clock.now_s() + self._ttl_s
        last = output.entries[-1].index if output.entries else -2
        output.entries += [OutputEntry(f"{i + 1}-0", p) for i, p in chunks if i > last]
        if is_end:
            del self._entries[claimed.entry_id]
        return True

    def discard(self, claimed: Claimed) -> None:
        """See RequestQueue."""
        self._entries.pop(claimed.entry_id, None)

    def read(self, request_id: str, after: str, block_s: float) -> list[OutputEntry]:
        """See RequestQueue."""
        if not self.exists(request_id):
            return []
        first, _, second = after.partition("-")
        start = (int(first), int(second or 0))
        return [e for e in self._outputs[request_id].entries if _order(e) > start]

    def exists(self, request_id: str) -> bool:
        """See RequestQueue."""
        output = self._outputs.get(request_id)
        return output is not None and output.expires_s > self._clock.now_s()

    def cancel(self, request_id: str) -> None:
        """See RequestQueue."""
        self._cancelled.add(request_id)

    def cancelled(self, request_ids: Sequence[str]) -> set[str]:
        """See RequestQueue."""
        return self._cancelled & set(request_ids)

    def leave(self, consumer: str = "") -> None:
        """See RequestQueue. Only claims are known here."""

    def _give(self, entry: _Entry, consumer: str) -> Claimed:
        entry.owner, entry.renewed_s = consumer, self._clock.now_s()
        return entry.claimed


def _order(entry: OutputEntry) -> tuple[int, int]:
    first, _, second = entry.entry_id.partition("-")
    return int(first), int(second)
