"""What instances can find in their prefix caches, told through Redis: each engine publishes, each front end follows.

An instance has two keys: a snapshot (8 bytes the number of the last increment in it, little-endian, then the keys of core/prefix_index.py), and a
stream of increments; entry N-0 is increment N, with fields c (keys that came) and w (keys that went). The snapshot is written again when
the increments since take more room than it does; older increments are deleted then. Without Redis front ends go on with what they know.
"""

from __future__ import annotations

import logging
import random
import struct
import threading
from collections.abc import Callable, Iterable
from typing import Any

import redis

from fastdeploy_pd.clock import Clock, WallClock
from fastdeploy_pd.cluster.redis_connection import Outage, RedisConnection, RedisOptions
from fastdeploy_pd.core.prefix_index import HeldBlocks, PrefixIndex
from fastdeploy_pd.errors import ConfigError, CoordinatorLost

log = logging.getLogger("fastdeploy_pd.prefixes")

INTERVAL_S = 0.2  #: between two increments, and between two looks at them
RENEW_S = 15.0  #: an instance whose cache does not change renews its keys
TTL_MS = 60_000  #: of both keys: a dead instance's lapse
MIN_SNAPSHOT_BYTES = 65_536  #: increments may take so much however small the snapshot is
ENTRY_BYTES = 64  #: what a stream entry takes beside its keys, about
READ_COUNT = 50  #: increments of an instance that are read at once
MAX_BACKOFF_S = 2.0
_NUMBER = struct.Struct("<Q")


class Repeater(threading.Thread):
    """Does something every INTERVAL_S until it is stopped; less often while Redis is away."""

    def __init__(self, name: str, turn: Callable[[], None], close: Callable[[], None]) -> None:
        """
        Args:
            close: called when it was stopped.
        """
        super().__init__(name=name, daemon=True)
        self._turn, self._close = turn, close
        self._outage = Outage(log, name)
        self._stop_event = threading.Event()

    def run(self) -> None:
        """Repeat until stopped."""
        wait_s = 0.0
        while not self._stop_event.wait(wait_s):
            try:
                self._turn()
                wait_s = INTERVAL_S
                self._outage.over()
            except (CoordinatorLost, ConfigError) as error:
                wait_s = min(MAX_BACKOFF_S, max(INTERVAL_S, wait_s * 1.5)) * random.uniform(0.7, 1.3)
                self._outage.failed(error.message)

    def stop(self) -> None:
        """End. Idempotent."""
        self._stop_event.set()
        if self.is_alive():
            self.join(3.0)
            self._close()


class PrefixPublisher:
    """Writes one instance's keys. All calls come from one thread."""

    def __init__(self, options: RedisOptions, instance_id: str, held: HeldBlocks, clock: Clock | None = None) -> None:
        self._connection = RedisConnection(options)
        keys = self._connection.keys
        self._snapshot_key, self._stream_key = keys.prefixes(instance_id), keys.prefix_changes(instance_id)
        self._held, self._clock = held, clock or WallClock()
        self._sequence = 0
        self._is_snapshot_due = True  # none was written yet, or Redis may lack something
        self._num_change_bytes = self._num_snapshot_bytes = 0
        self._renew_s = 0.0

    def publish(self) -> None:
        """Write what has changed; nothing if nothing has. Raises: CoordinatorLost, ConfigError: the next call writes a snapshot."""
        came, went = self._held.take_changes()
        if not (came or went or self._is_snapshot_due or self._clock.now_s() >= self._renew_s):
            return
        self._num_change_bytes += ENTRY_BYTES + len(came) + len(went)
        if self._num_change_bytes > max(MIN_SNAPSHOT_BYTES, self._num_snapshot_bytes):
            self._is_snapshot_due = True
        self._sequence += 1
        is_due, self._is_snapshot_due = self._is_snapshot_due, True  # until the server has said yes
        self._is_snapshot_due = not self._connection.run(lambda c: self._write(c, came, went, is_due))
        self._renew_s = self._clock.now_s() + RENEW_S
        if self._is_snapshot_due:
            self._sequence += 1  # a gap: whoever has only increments sees that he lacks something

    def _write(self, client: redis.Redis, came: bytes, went: bytes, is_snapshot_due: bool) -> bool:
        """Returns: whether Redis has all that was published."""
        with client.pipeline(transaction=True) as pipe:
            if is_snapshot_due:
                pipe.delete(self._stream_key)  # older increments, or what somebody else has put there
            pipe.xadd(self._stream_key, {"c": came, "w": went}, id=f"{self._sequence}-0")
            if is_snapshot_due:
                snapshot = _NUMBER.pack(self._sequence) + self._held.snapshot()
                pipe.set(self._snapshot_key, snapshot)
                self._num_change_bytes, self._num_snapshot_bytes = 0, len(snapshot)
            pipe.pexpire(self._stream_key, TTL_MS)
            pipe.pexpire(self._snapshot_key, TTL_MS)
            return bool(pipe.execute()[-1])

    def close(self) -> None:
        """Take the keys away, if Redis is there."""
        try:
            self._connection.run(lambda c: c.delete(self._snapshot_key, self._stream_key))
        except (CoordinatorLost, ConfigError):
            pass  # they lapse
        self._connection.close()


class PrefixFollower:
    """Keeps a front end's index fresh. `follow` is called by one thread."""

    def __init__(self, options: RedisOptions, index: PrefixIndex, instance_ids: Callable[[], Iterable[str]]) -> None:
        """
        Args:
            instance_ids: says whom to follow; what is known of others is dropped.
        """
        self._connection = RedisConnection(options)
        self._index, self._instance_ids = index, instance_ids

    def follow(self) -> None:
        """Read what is new. Raises: CoordinatorLost, ConfigError."""
        wanted = set(self._instance_ids())
        for instance_id in set(self._index.instance_ids()) - wanted:
            self._index.forget(instance_id)
        self._read_snapshots([i for i in wanted if self._index.sequence(i) is None])
        self._read_changes([i for i in wanted if self._index.sequence(i) is not None])

    def _read_snapshots(self, instance_ids: list[str]) -> None:
        keys = [self._connection.keys.prefixes(i) for i in instance_ids]
        found: Any = self._connection.run(lambda c: c.mget(keys)) if keys else []
        for instance_id, data in zip(instance_ids, found, strict=True):
            if data and len(data) % _NUMBER.size == 0:
                self._index.reset(instance_id, _NUMBER.unpack_from(data)[0], data[_NUMBER.size :])

    def _read_changes(self, instance_ids: list[str]) -> None:
        keys = {self._connection.keys.prefix_changes(i).encode(): i for i in instance_ids}
        if not keys:
            return
        after = {key: f"{self._index.sequence(i)}-0" for key, i in keys.items()}
        found: Any = self._connection.run(lambda c: c.xread(after, count=READ_COUNT))  # type: ignore[arg-type]
        for key, entries in found:
            for entry_id, fields in entries:
                sequence = int(entry_id.partition(b"-")[0])
                came, went = fields.get(b"c", b""), fields.get(b"w", b"")
                if len(came) % _NUMBER.size or len(went) % _NUMBER.size:
                    continue  # nobody's of ours; its number will be missed
                if not self._index.apply(keys[key], sequence, came, went):
                    break  # a snapshot, at the next look

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()
