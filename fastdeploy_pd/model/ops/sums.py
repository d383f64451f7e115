"""Small sums of ranks without NCCL, in memory of theirs that all reach."""

from __future__ import annotations

from typing import Any

import torch

from fastdeploy_pd.model.kernels import sums
from rdma_comm.cuda.driver import Gpu

# All ranks' inboxes together. Each sum of up to 16 MiB of two ranks fits (63 us, NCCL's 144), and of 4 and 1 MiB of four and eight, where,
# as computed from what links carry, NCCL becomes the faster one.
INBOXES_BYTES = 128 << 20


class SmallSums:
    """Every rank makes one, and all make theirs before anyone sums."""

    def __init__(self, store: Any, rank: int, num_ranks: int, dtype: torch.dtype, device: torch.device) -> None:
        """
        Args:
            store: the ranks' torch.distributed.Store.
        Raises: RdmaError: the GPUs do not reach each other; says why.
        """
        self._rank, self._dtype = rank, dtype
        pieces = INBOXES_BYTES // (
            2 * num_ranks**2 * sums.PIECE * dtype.itemsize
        )  # less for more: each crosses every pair
        self._capacity = pieces * sums.PIECE
        gpu = Gpu(device.index)
        own = gpu.allocate(sums.inbox_bytes(self._capacity, num_ranks, dtype.itemsize))
        handle, offset = gpu.export(own)
        store.set(f"inbox {rank}", f"{offset} {handle.hex()}")
        addresses = []
        for other in range(num_ranks):
            told_offset, told_handle = store.get(f"inbox {other}").decode().split()
            addresses.append(own if other == rank else gpu.open(bytes.fromhex(told_handle)) + int(told_offset))
        self._inboxes = torch.tensor(addresses, dtype=torch.int64, device=device)
        self._counts = torch.zeros(pieces, dtype=torch.int32, device=device)

    def has_room(self, count: int) -> bool:
        """Returns: whether so many elements are few enough."""
        return count <= self._capacity

    def add_up(self, x: torch.Tensor) -> bool:
        """Queue that x becomes the sum of all ranks' x. Returns: whether it is small enough; else nothing is queued."""
        if not self.has_room(x.numel()) or x.dtype != self._dtype or not x.is_contiguous():
            return False
        sums.all_reduce(x, self._inboxes, self._counts, self._rank, self._capacity)
        return True
