"""What `nccl` needs, and GPUs; the rest is in test_contract.py and test_two_processes.py."""

from __future__ import annotations

import multiprocessing as mp
import sys
from multiprocessing.connection import Connection

import numpy as np
import pytest

from fastdeploy_pd.core.layout import KVLayout
from fastdeploy_pd.errors import ConfigError, TransferUnavailable
from fastdeploy_pd.transfer.base import EpochArrived, EpochSent
from fastdeploy_pd.transfer.layout import KVPool
from fastdeploy_pd.transfer.nccl import NcclTransfer
from fastdeploy_pd.transfer.select import build
from fastdeploy_pd.transfer.torch_link import interface_of
from tests.transfer.gpu import num_gpus
from tests.transfer.test_ipc import LAYOUT, LOCAL, REMOTE, SECRET, content, events


def test_without_torch_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(TransferUnavailable, match=r"pip install 'fastdeploy-pd\[torch\]'"):
        build("nccl", pool=KVPool(LAYOUT), layout=LAYOUT, fingerprint="m")


def test_it_listens_where_it_is_told_alone() -> None:
    with pytest.raises(ConfigError, match=r"0\.0\.0\.0"):
        build("nccl", pool=KVPool(LAYOUT), layout=LAYOUT, fingerprint="m", host="0.0.0.0")
    with pytest.raises(ConfigError, match=r"cannot listen on 203\.0\.113\.7"):
        build("nccl", pool=KVPool(LAYOUT), layout=LAYOUT, fingerprint="m", host="203.0.113.7", secret=SECRET)
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.7") == ""


def test_blocks_larger_than_a_staging_buffer() -> None:
    layout = KVLayout(2, 6, 8, 256, 512, "float32")  # 8 MiB a block
    pools = KVPool(layout), KVPool(layout)
    pools[0].array[:] = np.random.default_rng(1).integers(0, 256, layout.pool_bytes, dtype=np.uint8)
    ends = [build("nccl", pool=pool, layout=layout, fingerprint="m") for pool in pools]
    ends[1].open_epoch("e", [1, 3, 4], 5)
    ends[0].start("e", 5, ends[1].descriptor(), [1, 3, 4])
    for layer in range(2):
        ends[0].write("e", layer, [0, 5, 2], [1, 3, 4])
    ends[0].finish("e")
    (arrived,), (sent,) = events(ends[1]), events(ends[0])
    assert isinstance(arrived, EpochArrived) and isinstance(sent, EpochSent)
    assert arrived.digests == sent.digests
    for end in ends:
        end.close()


def test_a_gpu_and_a_host_pool_do_not_fit() -> None:
    end = build("nccl", pool=KVPool(LAYOUT), layout=LAYOUT, fingerprint="m")
    assert isinstance(end, NcclTransfer)
    assert end.reaches(end.descriptor()) == ""
    assert "group: gloo != nccl" in end.reaches({**end.descriptor(), "group": "nccl"})
    end.close()


def gpu_process(pipe: Connection) -> None:
    """Own the first GPU; send what is asked for."""
    from fastdeploy_pd.transfer.device_pool import DevicePool
    from rdma_comm.cuda.driver import Gpu

    gpu = Gpu(0)
    pool = DevicePool(LAYOUT, gpu)
    gpu.write(pool.pointer, content(1))
    transfer = build("nccl", pool=pool, layout=LAYOUT, fingerprint="m", secret=SECRET)
    while (asked := pipe.recv()) is not None:
        transfer.start(asked[0], 77, asked[1], REMOTE)
        for layer in range(LAYOUT.num_layers):
            transfer.write(asked[0], layer, LOCAL[:2], REMOTE[:2])
            transfer.write(asked[0], layer, LOCAL[2:], REMOTE[2:])
        transfer.finish(asked[0])
        pipe.send(events(transfer, 60.0)[0])
    transfer.close()


@pytest.mark.skipif(num_gpus() < 2, reason="NCCL needs two GPUs")
def test_between_two_gpus() -> None:
    from fastdeploy_pd.transfer.device_pool import DevicePool
    from rdma_comm.cuda.driver import Gpu

    context = mp.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=gpu_process, args=(theirs,), daemon=True)
    process.start()
    gpu = Gpu(1)
    pool = DevicePool(LAYOUT, gpu)
    gpu.write(pool.pointer, content(2))
    target = build("nccl", pool=pool, layout=LAYOUT, fingerprint="m", secret=SECRET)
    for epoch in ("e1", "e2"):
        target.open_epoch(epoch, REMOTE, 77)
        pipe.send((epoch, target.descriptor()))
        sent = pipe.recv()
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
