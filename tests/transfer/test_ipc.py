"""Hand-overs between two processes' GPUs; what needs none of them is in test_contract.py."""

from __future__ import annotations

import multiprocessing as mp
import time
from multiprocessing.connection import Connection

import numpy as np
import pytest

from fastdeploy_pd.core.layout import KVLayout
from fastdeploy_pd.errors import TransferUnavailable
from fastdeploy_pd.transfer.base import EpochArrived, EpochFailed, EpochSent, Transfer, TransferEvent
from fastdeploy_pd.transfer.layout import KVPool
from fastdeploy_pd.transfer.select import build
from tests.transfer.gpu import has_gpu, num_gpus

LAYOUT = KVLayout(num_layers=4, num_blocks=64, num_kv_heads=8, block_size=16, head_dim=64, dtype="float16")
needs_gpu = pytest.mark.skipif(not has_gpu(), reason="no GPU here")
SECRET = b"a secret that all instances know"
LOCAL, REMOTE = [5, 6, 7, 20, 3], [40, 41, 42, 1, 63]


def content(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, LAYOUT.pool_bytes, dtype=np.uint8)


def events(transfer: Transfer, timeout_s: float = 20.0) -> list[TransferEvent]:
    deadline_s = time.monotonic() + timeout_s
    while not (found := transfer.poll()):
        assert time.monotonic() < deadline_s
        time.sleep(0.001)
    return found


def prefill_process(backend: str, pipe: Connection) -> None:
    """Own the first GPU; send what is asked for."""
    from fastdeploy_pd.transfer.device_pool import DevicePool
    from rdma_comm.cuda.driver import Gpu

    gpu = Gpu(0)
    pool = DevicePool(LAYOUT, gpu)
    gpu.write(pool.pointer, content(1))
    transfer = build(backend, pool=pool, layout=LAYOUT, fingerprint="m", secret=SECRET)
    while (asked := pipe.recv()) is not None:
        epoch, nonce, descriptor = asked
        transfer.start(epoch, nonce, descriptor, REMOTE)
        for layers in (range(1), range(1, LAYOUT.num_layers)):
            transfer.write(epoch, layers, LOCAL[:2], REMOTE[:2])
            transfer.write(epoch, layers, LOCAL[2:], REMOTE[2:])
        transfer.finish(epoch)
        pipe.send(events(transfer, 60.0)[0])
    transfer.close()


def test_a_pool_in_host_memory_is_not_its_business() -> None:
    with pytest.raises(TransferUnavailable, match="host memory"):
        build("ipc", pool=KVPool(LAYOUT), layout=LAYOUT, fingerprint="m")


@needs_gpu
@pytest.mark.parametrize("secret", [SECRET, b"another secret of as many bytes!"])
def test_between_two_processes(secret: bytes) -> None:
    check_between_two_processes("ipc", secret)


def check_between_two_processes(backend: str, secret: bytes = SECRET) -> None:
    """Two epochs from the first GPU to the last of two, in a process each."""
    from fastdeploy_pd.transfer.device_pool import DevicePool
    from rdma_comm.cuda.driver import Gpu

    context = mp.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=prefill_process, args=(backend, theirs), daemon=True)
    process.start()
    gpu = Gpu(min(num_gpus(), 2) - 1)
    pool = DevicePool(LAYOUT, gpu)
    gpu.write(pool.pointer, content(2))
    target = build(backend, pool=pool, layout=LAYOUT, fingerprint="m", secret=secret)
    for epoch in ("e1", "e2"):
        target.open_epoch(epoch, REMOTE, 77)
        pipe.send((epoch, 77, target.descriptor()))
        sent = pipe.recv()
        if secret != SECRET:
            assert isinstance(sent, EpochFailed) and "secret" in sent.reason
            break
        (arrived,) = events(target)
        assert isinstance(sent, EpochSent) and isinstance(arrived, EpochArrived), (sent, arrived)
        assert arrived.digests == sent.digests and len(set(sent.digests)) == len(LOCAL)
        have = np.frombuffer(gpu.read(pool.pointer, LAYOUT.pool_bytes), np.uint8).reshape(
            LAYOUT.num_layers, LAYOUT.num_blocks, -1
        )
        wanted = content(2).reshape(have.shape).copy()
        wanted[:, REMOTE] = content(1).reshape(have.shape)[:, LOCAL]
        assert np.array_equal(have, wanted)
        target.revoke(epoch)
    process.kill()  # and a peer that dies takes nothing with it
    process.join(20)
    assert gpu.read(pool.pointer, 16)
    target.close()
    pool.close()
