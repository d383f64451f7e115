"""Mooncake's transfer engine over TCP, as its Python interface is used: a synchronous write of one buffer, or of a batch."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from mooncake.engine import TransferEngine

from benchmarks.job import Job

BATCH = 1024  # of one call: its queue refuses 4096


class _End:
    def __init__(self, pool_bytes: int, block_bytes: int, option: str) -> None:
        self.memory = np.zeros(pool_bytes, np.uint8)
        self._address = self.memory.ctypes.data
        self.engine = TransferEngine()
        self._check("initialize", self.engine.initialize("127.0.0.1", "P2PHANDSHAKE", option, ""))
        self._check("register_memory", self.engine.register_memory(self._address, pool_bytes))

    def _check(self, call: str, status: int) -> None:
        if status:
            raise RuntimeError(f"Mooncake's {call} returned {status}")

    def close(self) -> None:
        """See peers."""
        self.engine.unregister_memory(self._address)


class Target(_End):
    """See peers."""

    def facts(self) -> dict[str, Any]:
        """See peers."""
        return {"name": f"127.0.0.1:{self.engine.get_rpc_port()}", "address": self._address}

    def offer(self, job: Job) -> dict[str, Any]:
        """See peers."""
        return {}

    def take(self, job: Job) -> None:
        """See peers: the source knows."""


class Source(_End):
    """See peers."""

    def __init__(self, pool_bytes: int, block_bytes: int, option: str, facts: dict[str, Any]) -> None:
        super().__init__(pool_bytes, block_bytes, option)
        self._facts = facts

    def send(self, job: Job, offer: dict[str, Any]) -> float:
        """See peers."""
        local, remote, size = job.pieces()
        sources, targets = (local + self._address).tolist(), (remote + self._facts["address"]).tolist()
        sizes = [size] * len(sources)
        began_s = time.perf_counter()
        if len(sources) == 1:
            status = self.engine.transfer_sync_write(self._facts["name"], sources[0], targets[0], size)
        else:
            status = 0
            for first in range(0, len(sources), BATCH):
                part = slice(first, first + BATCH)
                status |= self.engine.batch_transfer_sync_write(
                    self._facts["name"], sources[part], targets[part], sizes[part]
                )
        seconds = time.perf_counter() - began_s
        self._check("write", status)
        return seconds
