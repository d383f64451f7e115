"""This project's transfers, one epoch a job."""

from __future__ import annotations

import time
from typing import Any

from benchmarks.job import NUM_LAYERS, Job
from fastdeploy_pd.core.layout import KVLayout
from fastdeploy_pd.transfer.base import EpochArrived, EpochSent, Transfer, TransferEvent
from fastdeploy_pd.transfer.layout import KVPool
from fastdeploy_pd.transfer.select import build

TIMEOUT_S = 120.0
PAUSE_S = 0.0001


def layout_of(block_bytes: int, pool_bytes: int) -> KVLayout:
    """Returns: a layout of pool_bytes in blocks of block_bytes, a multiple of 4 KiB."""
    return KVLayout(NUM_LAYERS, pool_bytes // NUM_LAYERS // block_bytes, block_bytes // 4096, 8, 64, "float32")


def wait(transfer: Transfer) -> TransferEvent:
    """Returns: the transfer's next event. Raises: TimeoutError: none comes."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline_s:
        if events := transfer.poll():
            return events[0]
        time.sleep(PAUSE_S)
    raise TimeoutError(f"{transfer.name} reported nothing for {TIMEOUT_S:g} s")


class _End:
    def __init__(self, pool_bytes: int, block_bytes: int, option: str) -> None:
        self._pool = KVPool(layout_of(block_bytes, pool_bytes))
        self.memory = self._pool.array
        self.transfer = build(option, pool=self._pool, layout=self._pool.layout, fingerprint="bench")

    def close(self) -> None:
        """See peers."""
        self.transfer.close()


class Target(_End):
    """See peers."""

    def facts(self) -> dict[str, Any]:
        """See peers."""
        return {"descriptor": self.transfer.descriptor()}

    def offer(self, job: Job) -> dict[str, Any]:
        """See peers."""
        self.transfer.open_epoch(str(job.seed), job.blocks()[1], job.seed)
        return {}

    def take(self, job: Job) -> None:
        """See peers. Raises: RuntimeError: it has failed."""
        event = wait(self.transfer)
        if not isinstance(event, EpochArrived):
            raise RuntimeError(f"{event}")
        self.transfer.revoke(str(job.seed))


class Source(_End):
    """See peers."""

    def __init__(self, pool_bytes: int, block_bytes: int, option: str, facts: dict[str, Any]) -> None:
        super().__init__(pool_bytes, block_bytes, option)
        self._descriptor = facts["descriptor"]

    def send(self, job: Job, offer: dict[str, Any]) -> float:
        """See peers. Raises: RuntimeError: it has failed."""
        epoch, (local, remote) = str(job.seed), job.blocks()
        self.transfer.start(epoch, job.seed, self._descriptor, remote)
        for layer in range(NUM_LAYERS):
            self.transfer.write(epoch, [layer], local, remote)
        self.transfer.finish(epoch)
        event = wait(self.transfer)
        if not isinstance(event, EpochSent):
            raise RuntimeError(f"{event}")
        return event.wire_s
