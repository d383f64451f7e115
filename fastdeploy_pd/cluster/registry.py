"""Who is in the cluster: each engine keeps a record under a lease; front ends watch the records.

The lease is a TTL on the server, so no two hosts' clocks are compared. When Redis is away or comes back empty, watchers keep what they
know: whether a member is alive is judged by its links.
"""

from __future__ import annotations

import json
import logging
import random
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

import msgspec
import redis

from fastdeploy_pd.clock import Clock, WallClock
from fastdeploy_pd.cluster.redis_connection import Outage, RedisConnection, RedisOptions
from fastdeploy_pd.errors import ConfigError, CoordinatorLost

log = logging.getLogger("fastdeploy_pd.registry")

LEASE_S = 2.0
LEADER_LEASE_S = 3.0
FLIP_LEASE_S = 30.0  #: longer than an engine may take to obey and its record to say so
HEARTBEAT_S = 0.5
POLL_S = 0.25
MAX_BACKOFF_S = 2.0


@dataclass(frozen=True, slots=True)
class MemberLoad:
    """What --elastic auto looks at."""

    prefill_s: float = 0.0  #: predicted seconds of the prompts that were taken and not computed
    num_decodes: int = 0  #: streams that are generated
    num_seats: int = 1  #: most sequences in a step
    num_queued: int = 0  #: requests that wait for KV blocks
    kv_usage: float = 0.0  #: share of KV blocks that requests hold, 0 to 1
    flip_age_s: float | None = None  #: since its last flip; None: there was none
    is_elastic: bool = False  #: the leader may flip it


@dataclass(frozen=True, slots=True)
class MemberRecord:
    """What an instance tells the others of itself."""

    instance_id: str  #: unique for each start of an engine
    role: Literal["prefill", "decode", "mixed"]
    http_address: str
    links_address: str
    transfers: dict[str, dict[str, Any]] = field(default_factory=dict)
    model_name: str = ""
    fingerprint: str = ""
    kv_layout: dict[str, Any] = field(default_factory=dict)
    protocol_version: int = 1
    max_model_len: int = 0
    outstanding_tokens: int = 0
    num_requests: int = 0
    free_blocks: int = 0
    is_draining: bool = False
    load: MemberLoad = field(default_factory=MemberLoad)

    def to_json(self) -> str:
        """Returns: the record as stored."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> MemberRecord | None:
        """Returns: the record, or None if it is not one we understand (another version's, or nobody's)."""
        try:
            return msgspec.json.decode(text, type=cls)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return None

    def has_same_state(self, other: MemberRecord) -> bool:
        """Whether both differ in their load at most."""
        return (self.is_draining, self.role, self.links_address) == (other.is_draining, other.role, other.links_address)


class Registry(Protocol):
    """The members of a topic. Implemented over Redis here and in memory in `memory.py`."""

    def heartbeat(self, record: MemberRecord, is_change: bool = False) -> bool:
        """Renew the lease. Returns: whether the member was not there before. Raises: CoordinatorLost."""
        ...

    def leave(self, instance_id: str) -> None:
        """Take a member out. Raises: CoordinatorLost."""
        ...

    def members(self) -> tuple[MemberRecord, ...]:
        """Returns: members whose lease holds, by id. Raises: CoordinatorLost."""
        ...

    def lead(self, instance_id: str) -> bool:
        """Take or renew the leader's lease. Returns: whether it is this member's now. Raises: CoordinatorLost."""
        ...

    def begin_flip(self, flip_id: str, lease_s: float = FLIP_LEASE_S) -> bool:
        """Take or renew the lease of flips: one at a time. Returns: whether it is this flip's now. Raises: CoordinatorLost."""
        ...

    def end_flip(self, flip_id: str) -> None:
        """Give that lease back; one that is somebody else's by now stays. Raises: CoordinatorLost."""
        ...


class RedisRegistry:
    """The registry in Redis."""

    def __init__(self, options: RedisOptions, lease_s: float = LEASE_S, leader_lease_s: float = LEADER_LEASE_S) -> None:
        self.options = options
        self.connection = RedisConnection(options)
        self._lease_ms, self._leader_lease_ms = int(lease_s * 1000), int(leader_lease_s * 1000)

    def heartbeat(self, record: MemberRecord, is_change: bool = False) -> bool:
        """See Registry."""
        keys = self.connection.keys
        names = [keys.members, keys.member(record.instance_id), keys.changes]
        args = [record.instance_id, record.to_json(), self._lease_ms, "1" if is_change else "0"]
        return bool(self.connection.script("heartbeat", names, args))

    def leave(self, instance_id: str) -> None:
        """See Registry."""
        keys = self.connection.keys
        self.connection.script("leave", [keys.members, keys.member(instance_id), keys.changes], [instance_id])

    def members(self) -> tuple[MemberRecord, ...]:
        """See Registry. Ids whose lease has lapsed are removed on the way."""
        keys = self.connection.keys
        found: set[Any] = self.connection.run(lambda c: c.smembers(keys.members))
        ids = sorted(found)
        if not ids:
            return ()
        values = self.connection.run(lambda c: c.mget([keys.member(i.decode(errors="replace")) for i in ids]))
        lapsed = [i for i, value in zip(ids, values, strict=True) if value is None]
        if lapsed:
            self.connection.run(lambda c: c.srem(keys.members, *lapsed))
        records = (MemberRecord.from_json(v) for v in values if v is not None)
        return tuple(r for r in records if r is not None)

    def lead(self, instance_id: str) -> bool:
        """See Registry."""
        return bool(self.connection.script("lead", [self.connection.keys.leader], [instance_id, self._leader_lease_ms]))

    def begin_flip(self, flip_id: str, lease_s: float = FLIP_LEASE_S) -> bool:
        """See Registry."""
        return bool(self.connection.script("lead", [self.connection.keys.flip], [flip_id, int(lease_s * 1000)]))

    def end_flip(self, flip_id: str) -> None:
        """See Registry."""
        self.connection.script("lead", [self.connection.keys.flip], [flip_id, 1])

    def close(self) -> None:
        """Close the connection."""
        self.connection.close()


class HeartbeatThread(threading.Thread):
    """Renews a lease as long as its source gives a record; leaves when stopped."""

    def __init__(
        self, registry: Registry, source: Callable[[], MemberRecord | None], interval_s: float = HEARTBEAT_S
    ) -> None:
        """
        Args:
            source: the present record, or None while the engine stands still: a hung engine must lose its lease.
        """
        super().__init__(name="heartbeat", daemon=True)
        self._registry, self._source, self._interval_s = registry, source, interval_s
        self._stop_event, self._wake_event = threading.Event(), threading.Event()
        self._outage = Outage(log, "heartbeat")
        self._last: MemberRecord | None = None

    def run(self) -> None:
        """Beat until stopped."""
        wait_s = 0.0
        while True:
            self._wake_event.wait(wait_s)
            self._wake_event.clear()
            if self._stop_event.is_set():
                return
            record = self._source()
            if record is None:
                wait_s = self._interval_s
                continue
            try:
                is_change = self._last is None or not record.has_same_state(self._last)
                if self._registry.heartbeat(record, is_change):
                    log.info("registered %s as %s", record.instance_id, record.role)
                self._last, wait_s = record, self._interval_s
                self._outage.over()
            except (CoordinatorLost, ConfigError) as error:
                # Jitter: all members must not come back in the same millisecond.
                wait_s = min(MAX_BACKOFF_S, max(self._interval_s, wait_s * 1.5)) * random.uniform(0.7, 1.3)
                self._outage.failed(error.message)

    def wake(self) -> None:
        """Beat now: the record has changed. From any thread, but from no signal handler: it takes a lock."""
        self._wake_event.set()

    def stop(self) -> None:
        """Leave and end. Idempotent."""
        self._stop_event.set()
        self._wake_event.set()
        if self.is_alive():
            self.join(3.0)
        if self._last is not None:
            try:
                self._registry.leave(self._last.instance_id)
            except (CoordinatorLost, ConfigError):
                pass  # the lease lapses by itself
            self._last = None


class MemberWatcher(threading.Thread):
    """Keeps a snapshot of the members fresh: told by pub/sub within milliseconds, by polling at the latest.

    While Redis is away, and for a grace after it came back, members that are missing stay in the snapshot.
    """

    def __init__(
        self,
        registry: RedisRegistry,
        on_change: Callable[[tuple[MemberRecord, ...]], None],
        poll_s: float = POLL_S,
        grace_s: float = LEASE_S + 1.0,
        clock: Clock | None = None,
    ) -> None:
        """
        Args:
            on_change: called in this thread with every snapshot that was read.
        """
        super().__init__(name="member-watcher", daemon=True)
        self._registry, self._on_change = registry, on_change
        self._poll_s, self._grace_s, self._clock = poll_s, grace_s, clock or WallClock()
        self._stop_event = threading.Event()
        self._snapshot: dict[str, MemberRecord] = {}
        self._keep_until_s = 0.0
        self._is_empty = True
        self.is_connected = False

    def snapshot(self) -> tuple[MemberRecord, ...]:
        """Returns: the members as last known."""
        return tuple(self._snapshot.values())

    def run(self) -> None:
        """Watch until stopped."""
        backoff_s = 0.1
        while not self._stop_event.is_set():
            try:
                self._follow()
                backoff_s = 0.1
            except (CoordinatorLost, ConfigError, redis.RedisError) as error:
                if self.is_connected:
                    log.warning("members can't be read, going on with the %d known: %s", len(self._snapshot), error)
                self.is_connected = False
                self._keep_until_s = float("inf")
                self._stop_event.wait(backoff_s * random.uniform(0.7, 1.3))
                backoff_s = min(MAX_BACKOFF_S, backoff_s * 2)

    def stop(self) -> None:
        """End. Idempotent."""
        self._stop_event.set()
        if self.is_alive():
            self.join(3.0)
        self._registry.close()

    def _follow(self) -> None:
        pubsub = self._registry.connection.client.pubsub(ignore_subscribe_messages=True)  # type: ignore[no-untyped-call]
        try:
            pubsub.subscribe(self._registry.connection.keys.changes)
            while not self._stop_event.is_set():
                self._take(self._registry.members())
                hint = pubsub.get_message(timeout=self._poll_s)
                left = hint["data"].decode(errors="replace") if hint and isinstance(hint.get("data"), bytes) else ""
                if left:
                    self._take(self._registry.members(), said=left)
        finally:
            pubsub.close()

    def _take(self, members: tuple[MemberRecord, ...], said: str = "") -> None:
        now_s = self._clock.now_s()
        if not self.is_connected:
            self.is_connected = True
            self._keep_until_s = now_s + self._grace_s
        fresh = {m.instance_id: m for m in members}
        missing = [i for i in self._snapshot if i not in fresh and i != said]
        if missing and not fresh and not self._is_empty:
            # Everybody gone at once: rather Redis lost its data than all of them left. Their next heartbeat decides.
            self._keep_until_s = now_s + self._grace_s
        self._is_empty = not fresh
        if now_s < self._keep_until_s:
            fresh |= {i: self._snapshot[i] for i in missing}
        self._snapshot = fresh
        self._on_change(tuple(fresh.values()))
