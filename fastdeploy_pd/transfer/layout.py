"""The KV pool as memory: allocated so that a peer on the same machine can be given it, and checksummed block by block."""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Iterable, Sequence

import numpy as np
import xxhash

from fastdeploy_pd.core.layout import KVLayout
from fastdeploy_pd.errors import TransferError

ID_BYTES = 4
_ID = np.dtype("<i4")


class KVPool:
    """One instance's KV bytes: anonymous shared memory (memfd), zeroed, without a name that others could open."""

    def __init__(self, layout: KVLayout) -> None:
        """Raises: OSError: the memory cannot be had."""
        self.layout = layout
        self.fd = os.memfd_create("fastdeploy-pd-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, layout.pool_bytes)
        fcntl.fcntl(
            self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        )  # whoever maps it may rely on its size
        self._map = mmap.mmap(self.fd, layout.pool_bytes)
        #: [pool_bytes] uint8, writable, over the shared memory
        self.array: np.ndarray = np.frombuffer(self._map, dtype=np.uint8)
        self.view = memoryview(self._map)

    def block(self, layer: int, block_id: int) -> memoryview:
        """Returns: [block_bytes] writable view of one block in one layer. Raises: IndexError: there is no such block."""
        offset = self.layout.offset(layer, block_id)
        return self.view[offset : offset + self.layout.block_bytes]

    def digest(self, block_ids: Sequence[int], nonce: int, parts: int = 1) -> tuple[int, ...]:
        """Checksums of blocks as they lie in memory now.

        Args:
            block_ids: [n] blocks.
            nonce: the epoch's; equal bytes of another epoch have another checksum.
            parts: that blocks are cut into; block_ids count them.
        Returns: [n] xxh3_64 over each block's bytes in all layers, layer 0 first.
        """
        digests, layout = [], self.layout.cut(parts)
        for block_id in block_ids:
            state = xxhash.xxh3_64(seed=nonce)
            for layer in range(layout.num_layers):
                offset = layout.offset(layer, block_id)
                state.update(self.view[offset : offset + layout.block_bytes])
            digests.append(state.intdigest())
        return tuple(digests)

    def close(self) -> None:
        """Give the memory back once nobody views it any more. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def pack_ids(block_ids: Sequence[int]) -> bytes:
    """Returns: block ids for the wire: ID_BYTES each, little-endian."""
    return np.array(block_ids, dtype=_ID).tobytes()


def unpack_ids(data: bytes) -> np.ndarray:
    """Returns: [n] int64. Raises: TransferError: it is cut off."""
    if len(data) % ID_BYTES:
        raise TransferError(f"{len(data)} bytes are no list of block ids")
    return np.frombuffer(data, dtype=_ID).astype(np.int64)


def rows_of(layers: Sequence[int], block_ids: np.ndarray, num_blocks: int) -> np.ndarray:
    """Returns: [len(layers) * n] int64: blocks of several layers, layer by layer, as rows of a pool seen as [rows, block_bytes]."""
    rows: np.ndarray = (np.array(layers, dtype=np.int64)[:, None] * num_blocks + block_ids).ravel()
    return rows


def neighbours(local: np.ndarray, remote: np.ndarray) -> Iterable[tuple[int, int, int]]:
    """Returns: (local block, remote block, count) of each run of blocks that lie side by side in both pools."""
    if not len(local):
        return ()
    starts = np.flatnonzero(np.concatenate(([True], (np.diff(local) != 1) | (np.diff(remote) != 1))))
    counts = np.diff(np.append(starts, len(local)))
    return zip(local[starts].tolist(), remote[starts].tolist(), counts.tolist(), strict=True)
