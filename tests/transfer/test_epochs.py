"""The receiving side's book, without a wire."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from fastdeploy_pd.core.layout import KVLayout
from fastdeploy_pd.errors import TransferError
from fastdeploy_pd.transfer.epochs import Incoming, Sums
from fastdeploy_pd.transfer.layout import pack_ids

LAYOUT = KVLayout(num_layers=3, num_blocks=40, num_kv_heads=2, block_size=16, head_dim=8, dtype="float32")


def test_sums_add_up_whatever_lists_the_layers_came_in() -> None:
    rng = np.random.default_rng(1)
    blocks = [7, 3, 9, 1]
    parts = rng.integers(0, 2**64, (3, 4), dtype=np.uint64)
    expected = tuple(int(s) for s in parts.sum(axis=0, dtype=np.uint64))
    whole, mixed = Sums(), Sums()
    for layer in parts:
        whole.add(pack_ids(blocks), layer)
        for order in ([2, 0], [3, 1]) if layer is parts[0] else ([0], [1, 2, 3]):
            mixed.add(pack_ids([blocks[i] for i in order]), layer[order])
    assert whole.of(blocks) == mixed.of(blocks) == expected
    assert whole.of(blocks[::-1]) == expected[::-1]
    with pytest.raises(KeyError):
        whole.of([7, 8])


def test_no_sum_is_lost_between_threads() -> None:
    sums, one = Sums(), np.ones(1, np.uint64)
    threads = [threading.Thread(target=lambda: [sums.add(b"\1\0\0\0", one) for _ in range(2000)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sums.of([1]) == (8000,)


@pytest.mark.parametrize(
    ("layers", "blocks", "nonce", "reason"),
    [
        ([0], [5], 8, "nonce"),
        ([0, 3], [5], 7, "no layer 3"),
        ([-1], [5], 7, "no layer -1"),
        ([0], [5, 4], 7, "not part of the epoch"),
        ([0], [40], 7, "not part of the epoch"),
        ([0], [-1], 7, "not part of the epoch"),
        ([0], [5, 5], 7, "written twice"),
        ([0, 0], [5], 7, "written twice"),
        ([2, 1], [6, 5], 7, "written twice"),
    ],
)
def test_what_is_not_admitted(layers: list[int], blocks: list[int], nonce: int, reason: str) -> None:
    incoming = Incoming("e", [5, 6], 7, LAYOUT)
    incoming.admit([0, 2], pack_ids([6]), 7) if 0 not in layers else None
    incoming.admit([1], pack_ids([5, 6]), 7)
    with pytest.raises(TransferError, match=reason):
        incoming.admit(layers, pack_ids(blocks), nonce)
