"""The KV pool in a GPU's memory."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from fastdeploy_pd.core.layout import KVLayout
from rdma_comm.cuda.blocks import BlockMover, planes
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
        self._movers: queue.SimpleQueue[BlockMover] = queue.SimpleQueue()
        for _ in range(NUM_MOVERS):
            self._movers.put(BlockMover(gpu))

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """The memory as [pool_bytes] uint8 for frameworks (numba's CUDA array interface, version 3)."""
        return {"shape": (self.layout.pool_bytes,), "typestr": "|u1", "data": (self.pointer, False), "version": 3}

    def export(self) -> tuple[bytes, int]:
        """Returns: (CUDA IPC handle of the allocation, the pool's offset in it). Raises: CudaError: it cannot be shared."""
        return self.gpu.export(self.pointer)

    def copy(self, source: int, source_offsets: np.ndarray, target_offsets: np.ndarray, num_bytes: int) -> None:
        """Copy blocks into the pool; when it returns they are there. From any thread; at most NUM_MOVERS at once.

        Args:
            source: an address that the GPU can reach; source_offsets, target_offsets: [n] bytes; num_bytes: of each block.
        Raises: CudaError; ValueError: something is not aligned.
        """
        with self._mover() as mover:
            mover.copy(source, self.pointer, source_offsets, target_offsets, num_bytes)

    def copy_out(self, target: int, target_offsets: np.ndarray, source_offsets: np.ndarray, num_bytes: int) -> None:
        """Copy blocks out of the pool; as `copy`."""
        with self._mover() as mover:
            mover.copy(self.pointer, target, source_offsets, target_offsets, num_bytes)

    def digest_layers(self, layers: Sequence[int], block_ids: np.ndarray, nonce: int, parts: int = 1) -> np.ndarray:
        """Returns: [n] uint64: what these layers add to the checksums of blocks, modulo 2^64."""
        offsets, size = self.offsets(block_ids, parts), self.layout.block_bytes // parts
        with self._mover() as mover:
            return mover.digest(self.pointer, offsets, size, nonce, self.planes(layers, 0, parts))

    def digest(self, block_ids: Sequence[int], nonce: int, parts: int = 1) -> tuple[int, ...]:
        """Checksums of blocks as they lie in memory now; see KVPool.digest.

        Returns: [n] sums of each block's mixed words in all layers (rdma_comm/cuda/blocks.cu), computed on the GPU.
        """
        sums = self.digest_layers(range(self.layout.num_layers), np.array(block_ids, dtype=np.int64), nonce, parts)
        return tuple(sums.tolist())

    def close(self) -> None:
        """Give everything back. Idempotent."""
        while not self._movers.empty():
            self._movers.get().close()
        if self._is_owner and self.pointer:
            self.gpu.free(self.pointer)
            self.pointer = 0

    @contextmanager
    def _mover(self) -> Iterator[BlockMover]:
        mover = self._movers.get()
        try:
            yield mover
        finally:
            self._movers.put(mover)

    def offsets(self, block_ids: np.ndarray, parts: int = 1) -> np.ndarray:
        """Returns: [n] uint64: where blocks begin in a layer, in bytes. Raises: IndexError: there is none such."""
        layout = self.layout.cut(parts)
        if len(block_ids) and not 0 <= block_ids.min() <= block_ids.max() < layout.num_blocks:
            raise IndexError(
                f"blocks {block_ids.min()} to {block_ids.max()} are not all in the pool of {layout.num_blocks}"
            )
        return block_ids.astype(np.uint64) * np.uint64(layout.block_bytes)

    def planes(self, layers: Sequence[int], source_layer_bytes: int, parts: int = 1) -> np.ndarray:
        """Returns: layers as a BlockMover's planes: from a pool with layers of source_layer_bytes to this one."""
        layout, numbers = self.layout, np.array(layers, dtype=np.uint64)
        layer_bytes, words = layout.pool_bytes // layout.num_layers, layout.block_bytes // parts // 8
        return planes(
            numbers * np.uint64(source_layer_bytes), numbers * np.uint64(layer_bytes), numbers * np.uint64(words)
        )
