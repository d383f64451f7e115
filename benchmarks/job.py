"""What is moved: a whole pool of blocks in layers, in one piece or every block to another place; the same from a seed in both processes."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import xxhash

NUM_LAYERS = 4
_STAMP_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Job:
    """All blocks of a pool of [NUM_LAYERS, num_blocks] blocks."""

    pool_bytes: int
    block_bytes: int
    is_scattered: bool
    seed: int

    def blocks(self) -> tuple[list[int], list[int]]:
        """Returns: the source's and the target's blocks, pair by pair; the same in each layer."""
        local = list(range(self.pool_bytes // NUM_LAYERS // self.block_bytes))
        remote = list(local)
        if self.is_scattered:
            chooser = random.Random(self.seed)
            chooser.shuffle(local)
            chooser.shuffle(remote)
        return local, remote

    def pieces(self) -> tuple[np.ndarray, np.ndarray, int]:
        """Returns: ([n] int64 offsets in the source's pool, [n] in the target's, bytes of each)."""
        if not self.is_scattered:
            return np.zeros(1, np.int64), np.zeros(1, np.int64), self.pool_bytes
        layers = np.arange(NUM_LAYERS, dtype=np.int64)[:, None] * (self.pool_bytes // NUM_LAYERS)
        local, remote = (np.array(ids, np.int64) * self.block_bytes for ids in self.blocks())
        return (layers + local).ravel(), (layers + remote).ravel(), self.block_bytes

    def digest(self, memory: np.ndarray, is_target: bool) -> str:
        """Returns: of the bytes in the job's order: equal on both sides when each has landed where it should."""
        state, places = xxhash.xxh3_64(), self.pieces()
        for start in places[is_target].tolist():
            state.update(memory[start : start + places[2]])
        return state.hexdigest()


def fill(memory: np.ndarray) -> None:
    """Write random bytes and, every 4 KiB, the place: no two blocks are equal, every page is touched."""
    memory[:] = np.resize(np.random.default_rng(1).integers(0, 256, 1 << 20, dtype=np.uint8), len(memory))
    memory.view(np.uint64)[:: _STAMP_BYTES // 8] = np.arange(len(memory) // _STAMP_BYTES)
