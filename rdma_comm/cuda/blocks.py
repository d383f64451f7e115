"""Copies and checksums of scattered blocks of GPU memory, one kernel launch each, on streams of their own."""

from __future__ import annotations

import ctypes
import threading
from ctypes import byref, c_size_t, c_uint, c_ulonglong, c_void_p

import numpy as np

from rdma_comm.cuda.driver import Gpu, Stream

THREADS = 512
DEFAULT_CTAS = 32  # of 132: 370 GB/s over NVLink from blocks of 8 KiB on, of 374 with all of them
DIGEST_CTAS = 528  # four for each of an H200's multiprocessors
ALIGNMENT = 16
_MIX = (np.uint64(0x9FB21C651E98DF25), np.uint64(0x9E3779B97F4A7C15))


class BlockMover:
    """Copies blocks into (or out of) one GPU's memory. One copy at a time; from any thread."""

    def __init__(self, gpu: Gpu, num_ctas: int = DEFAULT_CTAS, max_blocks: int = 65536) -> None:
        """
        Args:
            num_ctas: how many of the GPU's multiprocessors a copy may take.
            max_blocks: of one launch; a longer list takes several.
        Raises: CudaError.
        """
        self.gpu, self.num_ctas, self.max_blocks = gpu, num_ctas, max_blocks
        self._copies, self._sums = Stream(gpu), Stream(gpu)
        self._offsets, self._digests = gpu.allocate(max_blocks * 16), gpu.allocate(max_blocks * 8)
        self._staging = c_void_p()  # pinned: a pageable list would be copied twice
        gpu.call("cuMemHostAlloc", byref(self._staging), c_size_t(max_blocks * 16), c_uint(0))
        buffer = memoryview((ctypes.c_char * (max_blocks * 16)).from_address(self._staging.value or 0)).cast("B")
        self._flat = np.frombuffer(buffer, dtype=np.uint64)
        self._places = self._flat.reshape(max_blocks, 2)
        self._lock = threading.Lock()
        gpu.function("copy_blocks")

    def copy(
        self, source: int, target: int, source_offsets: np.ndarray, target_offsets: np.ndarray, block_bytes: int
    ) -> None:
        """Copy blocks; when it returns they are there.

        Args:
            source, target: addresses that this GPU can reach.
            source_offsets, target_offsets: [n] bytes.
            block_bytes: of each; a multiple of 16, as all offsets and addresses.
        Raises: ValueError: something is not aligned; CudaError.
        """
        places = (
            int(np.bitwise_or.reduce(source_offsets) | np.bitwise_or.reduce(target_offsets))
            if len(source_offsets)
            else 0
        )
        if (source | target | block_bytes | places) % ALIGNMENT:
            raise ValueError(f"addresses, offsets and block_bytes ({block_bytes}) must be multiples of {ALIGNMENT}")
        with self._lock:
            for first in range(0, len(source_offsets), self.max_blocks):
                part = slice(first, first + self.max_blocks)
                count = self._upload(source_offsets[part], target_offsets[part])
                self.gpu.launch(
                    "copy_blocks", self.num_ctas, THREADS, self._copies.handle,
                    c_ulonglong(source), c_ulonglong(target), c_ulonglong(self._offsets), c_uint(count), c_uint(block_bytes),
                )  # fmt: skip
                self._copies.wait()

    def digest(
        self, pool: int, offsets: np.ndarray, block_bytes: int, nonce: int, num_layers: int = 1, layer_bytes: int = 0
    ) -> np.ndarray:
        """Checksums of blocks that lie in several layers, as they lie in memory now.

        Args:
            pool: address; offsets: [n] bytes: where each block lies in the first layer.
            nonce: checksums of equal bytes under another nonce differ.
            layer_bytes: from a block's place in one layer to that in the next.
        Returns: [n] uint64, as `digest_of` computes them on the CPU. Raises: CudaError.
        """
        found = np.zeros(len(offsets), np.uint64)
        stream = self._sums.handle
        with self._lock:
            for first in range(0, len(offsets), self.max_blocks):
                part = offsets[first : first + self.max_blocks]
                count = len(part)
                self._flat[:count] = part
                self.gpu.call(
                    "cuMemcpyHtoDAsync", c_ulonglong(self._offsets), self._staging, c_size_t(count * 8), stream
                )
                self.gpu.call(
                    "cuMemsetD8Async", c_ulonglong(self._digests), ctypes.c_ubyte(0), c_size_t(count * 8), stream
                )
                self.gpu.launch(
                    "digest_blocks", min(DIGEST_CTAS, count * num_layers), THREADS, stream, c_ulonglong(pool), c_ulonglong(self._offsets),
                    c_uint(count), c_uint(block_bytes), c_uint(num_layers), c_ulonglong(layer_bytes), c_ulonglong(nonce), c_ulonglong(self._digests),
                )  # fmt: skip
                self.gpu.call(
                    "cuMemcpyDtoHAsync", self._staging, c_ulonglong(self._digests), c_size_t(count * 8), stream
                )
                self._sums.wait()
                found[first : first + count] = self._flat[:count]
        return found

    def close(self) -> None:
        """Give memory and streams back. Idempotent."""
        if self._staging:
            self._copies.close()
            self._sums.close()
            for pointer in (self._offsets, self._digests):
                self.gpu.free(pointer)
            self.gpu.call("cuMemFreeHost", self._staging)
            self._staging = c_void_p()

    def _upload(self, source_offsets: np.ndarray, target_offsets: np.ndarray) -> int:
        count = len(source_offsets)
        self._places[:count, 0], self._places[:count, 1] = source_offsets, target_offsets
        self.gpu.call(
            "cuMemcpyHtoDAsync", c_ulonglong(self._offsets), self._staging, c_size_t(count * 16), self._copies.handle
        )
        return count


def digest_of(words: np.ndarray, nonce: int) -> np.ndarray:
    """The checksum on the CPU.

    Args:
        words: [n, words of a block in all layers] uint64.
    Returns: [n] uint64.
    """
    positions = np.arange(words.shape[1], dtype=np.uint64) + np.uint64(nonce)
    x = words ^ (positions * _MIX[1])
    x ^= x >> np.uint64(32)
    x *= _MIX[0]
    x ^= x >> np.uint64(29)
    x *= _MIX[1]
    x ^= x >> np.uint64(32)
    sums: np.ndarray = x.sum(axis=1, dtype=np.uint64)
    return sums
