"""Host memory behind a KV pool: findable blocks that the pool gives up are copied here and come back when their prefix is asked for again."""

from __future__ import annotations

import mmap
from collections import OrderedDict
from collections.abc import Sequence
from ctypes import c_size_t, c_uint, c_void_p
from dataclasses import dataclass

import numpy as np

from fastdeploy_pd.transfer.device_pool import DevicePool
from fastdeploy_pd.transfer.layout import KVPool

PORTABLE_AND_MAPPED = 3  # cuMemHostRegister's flags: the GPU reaches the memory at the same address


@dataclass(frozen=True, slots=True)
class Saved:
    """A block in host memory."""

    slot: int
    digest: int  #: the pool's, over the block as it was


class HostTier:
    """See core.blocks.LowerTier. Calls return when the bytes are where they belong; all come from the engine's thread."""

    def __init__(self, pool: KVPool | DevicePool, num_bytes: int, nonce: int) -> None:
        """
        Args:
            num_bytes: room for the blocks; at least one's.
            nonce: seed of the checksums.
        Raises: ValueError: no block has room; OSError: the memory cannot be had; RdmaError: the GPU can't reach it.
        """
        layout = pool.layout
        self._pool, self._nonce = pool, nonce
        self._slot_bytes = layout.num_layers * layout.block_bytes
        self.num_blocks = num_bytes // self._slot_bytes
        if self.num_blocks < 1:
            raise ValueError(f"a block has {self._slot_bytes} bytes, more than the {num_bytes} there are")
        self._memory = np.frombuffer(mmap.mmap(-1, self.num_blocks * self._slot_bytes), dtype=np.uint8)
        self._saved: OrderedDict[bytes, Saved] = OrderedDict()  # by hash, the one saved longest ago first
        self._free = list(range(self.num_blocks))
        self.num_damaged = 0  #: blocks that came back with another checksum, and were not used
        if isinstance(pool, DevicePool):
            pointer, size = c_void_p(self._memory.ctypes.data), c_size_t(self._memory.nbytes)
            pool.gpu.call("cuMemHostRegister_v2", pointer, size, c_uint(PORTABLE_AND_MAPPED))

    def __len__(self) -> int:
        """Blocks that are held."""
        return len(self._saved)

    def save(self, block_ids: Sequence[int], hashes: Sequence[bytes]) -> list[bytes]:
        """See LowerTier. The newest come in; those saved longest ago make room."""
        count = min(len(block_ids), len(self._free) + len(self._saved))
        dropped, first = list(hashes[: len(hashes) - count]), len(hashes) - count
        while len(self._free) < count:
            block_hash, saved = self._saved.popitem(last=False)
            self._free.append(saved.slot)
            dropped.append(block_hash)
        slots = [self._free.pop() for _ in range(count)]
        if count:
            digests = self._pool.digest(block_ids[first:], self._nonce)
            self._copy(block_ids[first:], slots, is_save=True)
            for block_hash, slot, digest in zip(hashes[first:], slots, digests, strict=True):
                self._saved[block_hash] = Saved(slot, digest)
        return dropped

    def take(self, hashes: Sequence[bytes]) -> list[Saved]:
        """See LowerTier."""
        taken = []
        for block_hash in hashes:
            saved = self._saved.pop(block_hash, None)
            if saved is None:
                break
            taken.append(saved)
        return taken

    def load(self, taken: Sequence[Saved], block_ids: Sequence[int]) -> int:
        """See LowerTier."""
        slots = [saved.slot for saved in taken]
        self._copy(block_ids, slots, is_save=False)
        self._free += slots
        digests = self._pool.digest(block_ids, self._nonce)
        for number, (saved, digest) in enumerate(zip(taken, digests, strict=True)):
            if saved.digest != digest:
                self.num_damaged += len(taken) - number
                return number
        return len(taken)

    def drop(self, block_hash: bytes) -> None:
        """See LowerTier."""
        saved = self._saved.pop(block_hash, None)
        if saved is not None:
            self._free.append(saved.slot)

    def hashes(self) -> list[bytes]:
        """See LowerTier."""
        return list(self._saved)

    def _copy(self, block_ids: Sequence[int], slots: Sequence[int], is_save: bool) -> None:
        """Copy blocks between pool and slots, all layers."""
        layout = self._pool.layout
        if isinstance(self._pool, KVPool):
            blocks = self._pool.array.reshape(layout.num_layers, -1, layout.block_bytes)
            places = self._memory.reshape(self.num_blocks, layout.num_layers, layout.block_bytes)
            for block_id, slot in zip(block_ids, slots, strict=True):
                if is_save:
                    places[slot] = blocks[:, block_id]
                else:
                    blocks[:, block_id] = places[slot]
            return
        layers = np.arange(layout.num_layers, dtype=np.uint64)[:, None]
        layer_bytes, size = np.uint64(layout.pool_bytes // layout.num_layers), layout.block_bytes
        in_pool = layers * layer_bytes + self._pool.offsets(np.array(block_ids, dtype=np.int64))
        in_host = layers * np.uint64(size) + np.array(slots, dtype=np.uint64) * np.uint64(self._slot_bytes)
        pointer = int(self._memory.ctypes.data)
        if is_save:
            self._pool.copy_out(pointer, in_host.ravel(), in_pool.ravel(), size)
        else:
            self._pool.copy(pointer, in_host.ravel(), in_pool.ravel(), size)
