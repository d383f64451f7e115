"""One TCP connection on the loopback device, in pieces of 1 MiB (or of a block, where blocks are scattered)."""

from __future__ import annotations

import socket
import time
from typing import Any

import numpy as np

from benchmarks.job import Job

CHUNK_BYTES = 1 << 20


class _End:
    def __init__(self, pool_bytes: int, block_bytes: int, option: str) -> None:
        self.memory = np.zeros(pool_bytes, np.uint8)
        self._view = memoryview(self.memory)

    def _chunks(self, job: Job, side: int) -> list[memoryview]:
        *places, size = job.pieces()
        return [
            self._view[start + first : start + min(first + CHUNK_BYTES, size)]
            for start in places[side].tolist()
            for first in range(0, size, CHUNK_BYTES)
        ]


class Target(_End):
    """See peers."""

    def __init__(self, pool_bytes: int, block_bytes: int, option: str) -> None:
        super().__init__(pool_bytes, block_bytes, option)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._connection: socket.socket | None = None

    def facts(self) -> dict[str, Any]:
        """See peers."""
        return {"port": self._listener.getsockname()[1]}

    def offer(self, job: Job) -> dict[str, Any]:
        """See peers."""
        return {}

    def take(self, job: Job) -> None:
        """See peers."""
        self._connection = self._connection or self._listener.accept()[0]
        for chunk in self._chunks(job, 1):
            taken = 0
            while taken < len(chunk):
                taken += self._connection.recv_into(chunk[taken:])
        self._connection.sendall(b"!")

    def close(self) -> None:
        """See peers."""
        self._listener.close()


class Source(_End):
    """See peers."""

    def __init__(self, pool_bytes: int, block_bytes: int, option: str, facts: dict[str, Any]) -> None:
        super().__init__(pool_bytes, block_bytes, option)
        self._connection = socket.create_connection(("127.0.0.1", facts["port"]))

    def send(self, job: Job, offer: dict[str, Any]) -> float:
        """See peers."""
        began_s = time.perf_counter()
        for chunk in self._chunks(job, 0):
            self._connection.sendall(chunk)
        self._connection.recv(1)
        return time.perf_counter() - began_s

    def close(self) -> None:
        """See peers."""
        self._connection.close()
