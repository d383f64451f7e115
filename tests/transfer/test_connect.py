"""A pair that never spoke: how soon its first block is there, and that nothing of it stays behind."""

from __future__ import annotations

import os
import statistics
import threading
import time

import pytest

from fastdeploy_pd.core.layout import KVLayout
from fastdeploy_pd.transfer.base import EpochArrived, Transfer
from fastdeploy_pd.transfer.layout import KVPool
from fastdeploy_pd.transfer.select import build
from rdma_comm.devices import list_nics

LAYOUT = KVLayout(num_layers=2, num_blocks=4, num_kv_heads=1, block_size=16, head_dim=8, dtype="float32")
#: backend -> (fresh pairs, limit of the median in seconds; the aim is 20 ms, see docs/benchmarks.md)
BACKENDS = {"tcp": (200, 0.1), "shm": (200, 0.1)}
if list_nics():
    BACKENDS["rdma"] = (50, 1.0)  # an emulated machine needs 40 times as long for everything


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def connect_once(target: Transfer, pool: KVPool, backend: str, number: int) -> float:
    source = build(backend, pool=pool, layout=LAYOUT, fingerprint="m")
    epoch = f"e{number}"
    target.open_epoch(epoch, [1], number)
    began_s = time.perf_counter()
    source.start(epoch, number, target.descriptor(), [1])
    for layer in range(LAYOUT.num_layers):
        source.write(epoch, [layer], [2], [1])
    source.finish(epoch)
    while not (events := target.poll()):
        assert time.perf_counter() - began_s < 5
        time.sleep(0.0002)
    took_s = time.perf_counter() - began_s
    assert isinstance(events[0], EpochArrived), events
    target.revoke(epoch)
    source.close()
    return took_s


@pytest.mark.parametrize("backend", BACKENDS)
def test_fresh_pairs_are_quick_and_leave_nothing_behind(backend: str) -> None:
    num_pairs, limit_s = BACKENDS[backend]
    pools = KVPool(LAYOUT), KVPool(LAYOUT)
    pools[0].array[:] = 90
    target = build(backend, pool=pools[1], layout=LAYOUT, fingerprint="m")
    connect_once(target, pools[0], backend, 0)
    time.sleep(0.2)  # the first pair's threads end
    before = num_descriptors(), threading.active_count()
    times_s = [connect_once(target, pools[0], backend, 1 + number) for number in range(num_pairs)]
    assert bytes(pools[1].block(1, 1)) == bytes([90]) * LAYOUT.block_bytes
    assert statistics.median(times_s) <= limit_s
    deadline_s = time.monotonic() + 30
    while time.monotonic() < deadline_s and (num_descriptors() > before[0] or threading.active_count() > before[1]):
        time.sleep(0.01)
    assert num_descriptors() <= before[0]
    assert threading.active_count() <= before[1]
    target.close()
    for pool in pools:
        pool.close()
