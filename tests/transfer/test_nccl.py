"""What `nccl` needs, and GPUs; the rest is in test_contract.py and test_two_processes.py."""

from __future__ import annotations

import sys

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
from tests.transfer.test_ipc import LAYOUT, SECRET, check_between_two_processes, events


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
        ends[0].write("e", [layer], [0, 5, 2], [1, 3, 4])
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


@pytest.mark.skipif(num_gpus() < 2, reason="NCCL needs two GPUs")
def test_between_two_gpus() -> None:
    check_between_two_processes("nccl")
