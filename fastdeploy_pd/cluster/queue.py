"""Requests submitted through Redis: claimed by one front end at a time, kept until they have ended, answered in a stream each.

A claim is owned until it is acknowledged; its lease is the entry's idle time, which the owner resets by `renew`. An owner that falls
silent loses the claim to whoever calls `reclaim` first, and its late output is refused by the script that appends it. So a token index
appears once, and nothing is lost with a front end.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import redis

from fastdeploy_pd.cluster.keys import GROUP
from fastdeploy_pd.cluster.redis_connection import BLOCKING_TIMEOUT_S, RedisConnection, RedisOptions
from fastdeploy_pd.errors import CoordinatorLost, InvalidRequest, QueueFull

CLAIM_LEASE_S = 5.0
MAX_QUEUED = 10_000
MAX_PAYLOAD_BYTES = 8 * 2**20
MAX_ENTRIES = 1000  # of an output stream, that one read gives

GROUP_TRIES = 3
SILENT_S = (
    3600.0  # a consumer that has been silent for so long is dead; one that is not is made again when it next claims
)

Result = TypeVar("Result")
log = logging.getLogger("fastdeploy_pd.queue")


@dataclass(frozen=True, slots=True)
class Claimed:
    """A request that this consumer must answer."""

    entry_id: str
    request_id: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class OutputEntry:
    """One entry of a request's output stream; `payload` is empty for the mark that it is queued."""

    entry_id: str
    payload: bytes

    @property
    def index(self) -> int:
        """Index of the first token in it."""
        return int(self.entry_id.split("-")[0]) - 1


class RequestQueue(Protocol):
    """The queue of a topic. Implemented over Redis here and in memory in `memory.py`. All calls may raise CoordinatorLost."""

    def submit(self, request_id: str, payload: bytes) -> None:
        """Queue a request. Raises: QueueFull; InvalidRequest: the id is known or the payload too large."""
        ...

    def claim(self, consumer: str, count: int, block_s: float) -> list[Claimed]:
        """Returns: up to `count` new requests, after waiting at most block_s for the first."""
        ...

    def renew(self, consumer: str, entry_ids: Sequence[str]) -> None:
        """Keep claims for another lease."""
        ...

    def reclaim(self, consumer: str, count: int) -> list[Claimed]:
        """Returns: requests whose owner let the lease lapse; they are this consumer's now."""
        ...

    def append(
        self, consumer: str, claimed: Claimed, chunks: Sequence[tuple[int, bytes]], is_end: bool = False
    ) -> bool:
        """Add output: (index of the first token, payload) each. Returns: whether the claim is still this consumer's."""
        ...

    def discard(self, claimed: Claimed) -> None:
        """Take a request out without an answer: there is nobody, or no place, to answer to."""
        ...

    def read(self, request_id: str, after: str, block_s: float) -> list[OutputEntry]:
        """Returns: output after an entry id ("0" is the beginning), at most MAX_ENTRIES, after waiting at most block_s for the first."""
        ...

    def exists(self, request_id: str) -> bool:
        """Whether the request is known and its output has not expired."""
        ...

    def cancel(self, request_id: str) -> None:
        """Ask the owner to stop."""
        ...

    def cancelled(self, request_ids: Sequence[str]) -> set[str]:
        """Returns: those that were asked to stop."""
        ...

    def leave(self, consumer: str = "") -> None:
        """Forget a consumer that ends, and those that are dead, unless they have claims, which somebody else takes over first."""
        ...


class RedisQueue:
    """The queue in Redis."""

    def __init__(
        self, options: RedisOptions, max_queued: int = MAX_QUEUED, claim_lease_s: float = CLAIM_LEASE_S
    ) -> None:
        self._connection = RedisConnection(options)
        self._blocking = RedisConnection(options, BLOCKING_TIMEOUT_S)
        self._keys = self._connection.keys
        self._max_queued = max_queued
        self._lease_ms = int(claim_lease_s * 1000)
        self._ttl_ms = int(options.ttl_s * 1000)

    def submit(self, request_id: str, payload: bytes) -> None:
        """See RequestQueue."""
        if len(payload) > MAX_PAYLOAD_BYTES:
            raise InvalidRequest(
                f"the request has {len(payload)} bytes; at most {MAX_PAYLOAD_BYTES} are allowed", param="body"
            )
        keys = [self._keys.requests, self._keys.out(request_id)]
        status = self._connection.script("submit", keys, [request_id, payload, self._max_queued, self._ttl_ms])
        if status == 0:
            raise InvalidRequest(
                f"request id {request_id!r} was submitted before", param="request_id", code="duplicate_id"
            )
        if status < 0:
            raise QueueFull(f"{self._max_queued} requests are queued in topic {self._keys.topic!r}; try again later")

    def claim(self, consumer: str, count: int, block_s: float) -> list[Claimed]:
        """See RequestQueue."""
        block_ms = max(1, min(int(block_s * 1000), int(BLOCKING_TIMEOUT_S * 500)))
        reply: Any = self._in_group(
            lambda: self._blocking.run(
                lambda c: c.xreadgroup(GROUP, consumer, {self._keys.requests: ">"}, count=count, block=block_ms)
            )
        )
        return [claimed for _, entries in reply or () for claimed in self._claimed(entries)]

    def renew(self, consumer: str, entry_ids: Sequence[str]) -> None:
        """See RequestQueue."""
        if not entry_ids:
            return

        def claim_again() -> None:
            # Only what is ours already: claiming by id alone would take back what another one has reclaimed meanwhile.
            mine = {e["message_id"].decode() for e in self._pending(consumer, len(entry_ids) + 100)}
            kept: list[Any] = [i for i in entry_ids if i in mine]
            if kept:
                self._connection.run(lambda c: c.xclaim(self._keys.requests, GROUP, consumer, 0, kept, justid=True))

        self._in_group(claim_again)

    def reclaim(self, consumer: str, count: int) -> list[Claimed]:
        """See RequestQueue."""
        found: list[Claimed] = []
        start: Any = "0-0"
        while len(found) < count:  # Redis looks at a part of what is claimed each time: others' live claims come first
            reply: Any = self._in_group(partial(self._reclaim_from, start, consumer, count - len(found)))
            found += self._claimed(reply[1])
            start = reply[0]
            if start in (b"0-0", "0-0"):
                break
        return found

    def _reclaim_from(self, start: Any, consumer: str, count: int) -> Any:
        return self._connection.run(
            lambda c: c.xautoclaim(self._keys.requests, GROUP, consumer, self._lease_ms, start, count=count)
        )

    def append(
        self, consumer: str, claimed: Claimed, chunks: Sequence[tuple[int, bytes]], is_end: bool = False
    ) -> bool:
        """See RequestQueue."""
        args: list[Any] = [GROUP, claimed.entry_id, consumer, self._ttl_ms, "1" if is_end else "0"]
        for index, payload in chunks:
            args += [f"{index + 1}-0", payload]
        keys = [self._keys.requests, self._keys.out(claimed.request_id)]
        return bool(self._in_group(lambda: self._connection.script("append", keys, args)) >= 0)

    def discard(self, claimed: Claimed) -> None:
        """See RequestQueue."""
        self._in_group(lambda: self._delete(claimed.entry_id))

    def read(self, request_id: str, after: str, block_s: float) -> list[OutputEntry]:
        """See RequestQueue."""
        key = self._keys.out(request_id)
        block_ms = min(int(block_s * 1000), int(BLOCKING_TIMEOUT_S * 500)) or None
        reply: Any = self._blocking.run(lambda c: c.xread({key: after}, count=MAX_ENTRIES, block=block_ms))
        return [OutputEntry(i.decode(), f.get(b"payload", b"")) for _, entries in reply or () for i, f in entries]

    def exists(self, request_id: str) -> bool:
        """See RequestQueue."""
        return bool(self._connection.run(lambda c: c.exists(self._keys.out(request_id))))

    def cancel(self, request_id: str) -> None:
        """See RequestQueue."""
        self._connection.run(lambda c: c.set(self._keys.cancel(request_id), "1", px=self._ttl_ms))

    def cancelled(self, request_ids: Sequence[str]) -> set[str]:
        """See RequestQueue."""
        if not request_ids:
            return set()
        values = self._connection.run(lambda c: c.mget([self._keys.cancel(i) for i in request_ids]))
        return {i for i, value in zip(request_ids, values, strict=True) if value is not None}

    def leave(self, consumer: str = "") -> None:
        """See RequestQueue."""
        self._connection.script("leave_group", [self._keys.requests], [GROUP, consumer, int(SILENT_S * 1000)])

    def close(self) -> None:
        """Close the connections."""
        self._connection.close()
        self._blocking.close()

    def _pending(self, consumer: str, count: int) -> list[dict[str, Any]]:
        return self._connection.run(
            lambda c: c.xpending_range(self._keys.requests, GROUP, "-", "+", count, consumername=consumer)
        )

    def _in_group(self, action: Callable[[], Result]) -> Result:
        """Run an action; if the consumer group is missing (first use, or Redis lost its data), make it and run again."""
        for _ in range(GROUP_TRIES):
            try:
                return action()
            except redis.ResponseError as error:
                if "NOGROUP" not in str(error) and "UNBLOCKED" not in str(error):
                    raise
            try:
                self._connection.run(lambda c: c.xgroup_create(self._keys.requests, GROUP, "0", mkstream=True))
            except redis.ResponseError as error:
                if "BUSYGROUP" not in str(error):
                    raise
        raise CoordinatorLost("Redis loses the request queue again and again")

    def _claimed(self, entries: Sequence[tuple[bytes | None, dict[bytes, bytes] | None]]) -> list[Claimed]:
        claimed = []
        for entry_id, fields in entries:
            if entry_id is None or not fields:
                continue  # deleted meanwhile
            try:
                claimed.append(Claimed(entry_id.decode(), fields[b"id"].decode(), fields[b"payload"]))
            except (KeyError, UnicodeDecodeError):
                log.warning(
                    "%s has entry %s, which `submit` did not write (fields %s): it is deleted",
                    self._keys.requests, entry_id.decode(), sorted(fields)[:8],
                )  # fmt: skip
                self._delete(entry_id)
        return claimed

    def _delete(self, entry_id: str | bytes) -> None:
        self._connection.run(lambda c: c.xack(self._keys.requests, GROUP, entry_id))
        self._connection.run(lambda c: c.xdel(self._keys.requests, entry_id))
