"""The KV pool in a GPU's memory."""

from __future__ import annotations

import queue
from collections.abc import Sequence

import numpy as np

from fastdeploy_pd.core.layout import KVLayout
from rdma_comm.cuda.blocks import BlockMover
from rdma_comm.cuda.driver import Gpu

NUM_MOVERS = 2


class DevicePool:
    """One instance's KV bytes on a GPU: memory of its own, or what a framework has allocated."""

    def __init__(self, layout: KVLayout, gpu: Gpu, pointer: int | None = None) -> None:
        """
        Args:
            pointer: [pool_bytes] of the GPU's memory, allocated as one piece by cudaMalloc (not by a virtual-memory or asynchronous
                allocator: they can't be exported), which the caller keeps alive; None: allocate it, zeroed.
        Raises: RdmaError: it cannot be had.
        """
        self.layout, self.gpu = layout, gpu
        self._is_owner = pointer is None
        self.pointer = gpu.allocate(layout.pool_bytes) if pointer is None else pointer
        self._digester = BlockMover(gpu)
        self._movers: queue.SimpleQueue[BlockMover] = queue.SimpleQueue()
        for _ in range(NUM_MOVERS):
            self._movers.put(BlockMover(gpu))

    def export(self) -> tuple[bytes, int]:
        """Returns: (CUDA IPC handle of the allocation, the pool's offset in it). Raises: CudaError: it cannot be shared."""
        return self.gpu.export(self.pointer)

    def copy(self, source: int, source_offsets: np.ndarray, target_offsets: np.ndarray, num_bytes: int) -> None:
        """Copy blocks into the pool; when it returns they are there. From any thread; at most NUM_MOVERS at once.

        Args:
            source: an address that the GPU can reach; source_offsets, target_offsets: [n] bytes; num_bytes: of each block.
        Raises: CudaError; ValueError: something is not aligned.
        """
        self._move(source, self.pointer, source_offsets, target_offsets, num_bytes)

    def copy_out(self, target: int, target_offsets: np.ndarray, source_offsets: np.ndarray) -> None:
        """Copy blocks out of the pool; as `copy`."""
        self._move(self.pointer, target, source_offsets, target_offsets, self.layout.block_bytes)

    def offsets(self, layer: int, block_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Returns: [n] uint64: where blocks begin in one layer, in bytes from the pool's begin. Raises: IndexError: there is none such."""
        ids = np.array(block_ids, dtype=np.int64)
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.layout.num_blocks:
            raise IndexError(f"blocks {ids.min()} to {ids.max()} are not all in the pool of {self.layout.num_blocks}")
        found: np.ndarray = (ids * self.layout.block_bytes + self.layout.offset(layer, 0)).astype(np.uint64)
        return found

    def digest(self, block_ids: Sequence[int], nonce: int) -> tuple[int, ...]:
        """Checksums of blocks as they lie in memory now; see KVPool.digest.

        Returns: [n] sums of each block's mixed words in all layers (rdma_comm/cuda/blocks.cu), computed on the GPU.
        """
        layout = self.layout
        layer_bytes = layout.pool_bytes // layout.num_layers
        sums = self._digester.digest(
            self.pointer, self.offsets(0, block_ids), layout.block_bytes, nonce, layout.num_layers, layer_bytes
        )
        return tuple(sums.tolist())

    def _move(
        self, source: int, target: int, source_offsets: np.ndarray, target_offsets: np.ndarray, num_bytes: int
    ) -> None:
        mover = self._movers.get()
        try:
            mover.copy(source, target, source_offsets, target_offsets, num_bytes)
        finally:
            self._movers.put(mover)

    def close(self) -> None:
        """Give everything back. Idempotent."""
        self._digester.close()
        while not self._movers.empty():
            self._movers.get().close()
        if self._is_owner and self.pointer:
            self.gpu.free(self.pointer)
            self.pointer = 0
