"""Requests without HTTP: submit them to a topic's queue in Redis, read their output streams.

    client = RedisClient("redis://127.0.0.1:6379/0", "default")
    request_id = client.submit({"model": "demo", "messages": [{"role": "user", "content": "What is prefill?"}]})
    for chunk in client.stream(request_id):
        print(chunk["text"], end="", flush=True)

Any front end of the topic claims the request; if it dies, another goes on where the stream stopped.
"""

from __future__ import annotations

import json
import re
import secrets
import uuid
from collections.abc import Iterator
from typing import Any

import msgspec

from fastdeploy_pd.clock import WallClock
from fastdeploy_pd.cluster.queue import RedisQueue
from fastdeploy_pd.cluster.redis_connection import RedisOptions
from fastdeploy_pd.errors import DeadlineExceeded, FastDeployPDError, InvalidRequest

ENDPOINTS = ("chat", "completions")


class RedisClient:
    """A client of one topic."""

    def __init__(self, url: str, topic: str = "default", ttl_s: float = 900.0) -> None:
        """
        Args:
            url: redis://, rediss:// or unix:// URL.
            ttl_s: how long an output stays readable after its last change.
        """
        self._queue = RedisQueue(RedisOptions.from_url(url, topic, ttl_s=ttl_s))
        self._clock = WallClock()

    def submit(self, body: dict[str, Any], endpoint: str = "chat", request_id: str | None = None) -> str:
        """Queue a request.

        Args:
            body: as it would be posted to the endpoint, with one prompt and n = 1.
            endpoint: "chat" or "completions".
            request_id: to make repeated submissions harmless; a new one if not given.
        Returns: the request id.
        Raises: QueueFull, InvalidRequest, CoordinatorLost.
        """
        if endpoint not in ENDPOINTS:
            raise InvalidRequest(
                f"endpoint is {endpoint!r}; it must be one of {', '.join(ENDPOINTS)}", param="endpoint"
            )
        request_id = request_id if request_id is not None else f"redis-{uuid.uuid4().hex}"
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,128}", request_id):
            raise InvalidRequest(
                f"request_id is {request_id!r}; it must be 1 to 128 of A-Z a-z 0-9 . _ -", param="request_id"
            )
        submission = {
            "version": 1,
            "endpoint": endpoint,
            "body": json.dumps(body).encode(),
            "seed": secrets.randbits(62),
        }
        self._queue.submit(request_id, msgspec.msgpack.encode(submission))
        return request_id

    def stream(self, request_id: str, timeout_s: float = 900.0) -> Iterator[dict[str, Any]]:
        """Yield output chunks in order: index, token_ids, text, finish_reason, usage. Ends after the one with a finish reason.

        Raises: DeadlineExceeded: it did not end in time. InvalidRequest: the id is unknown or its output has expired.
            FastDeployPDError: the request failed.
        """
        deadline_s, after = self._clock.now_s() + timeout_s, "0"
        while True:
            entries = self._queue.read(request_id, after, 1.0)
            if not entries and not self._queue.exists(request_id):
                raise InvalidRequest(
                    f"request {request_id!r} is unknown, or its output has expired", param="request_id"
                )
            for entry in entries:
                after = entry.entry_id
                if not entry.payload:
                    continue
                chunk = {"finish_reason": None, "usage": None, **msgspec.msgpack.decode(entry.payload)}
                if chunk.get("error"):
                    raise _failure(chunk["error"])
                yield chunk
                if chunk["finish_reason"] is not None:
                    return
            if self._clock.now_s() >= deadline_s:
                raise DeadlineExceeded(f"request {request_id!r} did not end within {timeout_s:g} s")

    def result(self, request_id: str, timeout_s: float = 900.0) -> str:
        """Returns: the whole text. Raises: as `stream`."""
        return "".join(chunk["text"] for chunk in self.stream(request_id, timeout_s))

    def cancel(self, request_id: str) -> None:
        """Ask for the request to be stopped."""
        self._queue.cancel(request_id)

    def close(self) -> None:
        """Close the connections."""
        self._queue.close()


def _failure(record: dict[str, Any]) -> FastDeployPDError:
    """Returns: the error of which an output stream's last entry tells."""
    error = FastDeployPDError(record["message"], code=record.get("code"), param=record.get("param"))
    error.retry_after_s = record.get("retry_after_s", error.retry_after_s)
    return error
