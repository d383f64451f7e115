"""The KV pool as memory: allocated so that a peer on the same machine can be given it, and checksummed block by block."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Sequence

import numpy as np
import xxhash

from fastdeploy_pd.core.layout import KVLayout


class KVPool:
    """One instance's KV bytes: anonymous shared memory (memfd), zeroed, without a name that others could open."""

    def __init__(self, layout: KVLayout) -> None:
        """Raises: OSError: the memory cannot be had."""
        self.layout = layout
        self.fd = os.memfd_create("fastdeploy-pd-kv", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, layout.pool_bytes)
        self._map = mmap.mmap(self.fd, layout.pool_bytes)
        #: [pool_bytes] uint8, writable, over the shared memory
        self.array: np.ndarray = np.frombuffer(self._map, dtype=np.uint8)
        self.view = memoryview(self._map)

    def block(self, layer: int, block_id: int) -> memoryview:
        """Returns: [block_bytes] writable view of one block in one layer. Raises: IndexError: there is no such block."""
        offset = self.layout.offset(layer, block_id)
        return self.view[offset : offset + self.layout.block_bytes]

    def digest(self, block_ids: Sequence[int], nonce: int) -> tuple[int, ...]:
        """Checksums of blocks as they lie in memory now.

        Args:
            block_ids: [n] blocks.
            nonce: the epoch's; equal bytes of another epoch have another checksum.
        Returns: [n] xxh3_64 over each block's bytes in all layers, layer 0 first.
        """
        digests = []
        for block_id in block_ids:
            state = xxhash.xxh3_64(seed=nonce)
            for layer in range(self.layout.num_layers):
                state.update(self.block(layer, block_id))
            digests.append(state.intdigest())
        return tuple(digests)

    def close(self) -> None:
        """Give the memory back once nobody views it any more. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def neighbours(local: Sequence[int], remote: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Yield (local block, remote block, count): runs of blocks that lie side by side in both pools."""
    first = 0
    for index in range(1, len(local) + 1):
        count = index - first
        if index == len(local) or local[index] != local[first] + count or remote[index] != remote[first] + count:
            yield local[first], remote[first], count
            first = index
