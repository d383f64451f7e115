"""Blocks that a pool gives up come back from host memory as they were, or not at all."""

from __future__ import annotations

import random

import numpy as np
import pytest

from fastdeploy_pd.core.blocks import BlockPool
from fastdeploy_pd.core.layout import KVLayout
from fastdeploy_pd.core.prefix_index import KEY_BYTES, HeldBlocks
from fastdeploy_pd.transfer.device_pool import DevicePool
from fastdeploy_pd.transfer.host_tier import HostTier
from fastdeploy_pd.transfer.layout import KVPool
from rdma_comm.cuda.driver import Gpu
from tests.transfer.gpu import has_gpu

NUM_BLOCKS, NUM_LAYERS = 8, 3
LAYOUT = KVLayout(NUM_LAYERS, NUM_BLOCKS, 2, 4, 4, "float32")
SLOT_BYTES = NUM_LAYERS * LAYOUT.block_bytes


class Machine:
    """A pool over real memory, a tier behind it, and what each block should hold."""

    def __init__(self, num_host_blocks: int) -> None:
        self.memory, self.pool = KVPool(LAYOUT), BlockPool(NUM_BLOCKS, 4)
        self.tier = HostTier(self.memory, num_host_blocks * SLOT_BYTES + 1, nonce=5)
        self.pool.lower = self.tier
        self.pool.listener = self.held = HeldBlocks()

    def content(self, block_id: int) -> bytes:
        return b"".join(bytes(self.memory.block(layer, block_id)) for layer in range(NUM_LAYERS))

    def compute(self, block_id: int, block_hash: bytes) -> None:
        data = np.frombuffer(random.Random(block_hash).randbytes(SLOT_BYTES), dtype=np.uint8)
        for layer in range(NUM_LAYERS):
            size = LAYOUT.block_bytes
            self.memory.block(layer, block_id)[:] = data[layer * size : (layer + 1) * size].tobytes()

    def serve(self, hashes: list[bytes]) -> int:
        """Compute a prompt as a scheduler would. Returns: how many of its blocks were found."""
        cached = self.pool.find_prefix(hashes)
        self.pool.hold(cached)
        fresh, num_filled = self.pool.allocate_filled(len(hashes) - len(cached), hashes[len(cached) :])
        table, num_found = cached + fresh, len(cached) + num_filled
        for block_id, block_hash in zip(table[:num_found], hashes, strict=False):
            assert self.content(block_id) == random.Random(block_hash).randbytes(SLOT_BYTES)
        for block_id, block_hash in zip(table[num_found:], hashes[num_found:], strict=True):
            self.compute(block_id, block_hash)
        self.pool.make_findable(table, hashes)
        self.pool.release(table)
        return num_found


def chain(name: int, length: int) -> list[bytes]:
    return [f"{name:04}{position:04}--------".encode() for position in range(length)]


@pytest.mark.parametrize("seed", range(10))
def test_what_is_found_is_what_was_computed(seed: int) -> None:
    rng, num_found = random.Random(seed), 0
    machine = Machine(rng.randint(1, 20))
    for _ in range(300):
        num_found += machine.serve(chain(rng.randrange(6), rng.randint(1, NUM_BLOCKS)))
        if rng.random() < 0.02:
            machine.pool.forget_all()
        assert not {h for h in machine.tier.hashes() if h in machine.pool._block_of}, "a block is in both"
        assert len(machine.tier) + len(machine.tier._free) == machine.tier.num_blocks
        findable = {h[:KEY_BYTES] for h in (*machine.pool._block_of, *machine.tier.hashes())}
        assert machine.pool.counts().held == 0
        machine.held.take_changes()
        said = machine.held.snapshot()
        assert {said[i : i + KEY_BYTES] for i in range(0, len(said), KEY_BYTES)} == findable
    assert num_found > 100 and machine.tier.num_damaged == 0


def test_prefix_that_was_pushed_out_comes_back_whole() -> None:
    machine, first = Machine(NUM_BLOCKS), chain(1, NUM_BLOCKS)
    machine.serve(first)
    machine.serve(chain(2, NUM_BLOCKS))
    assert machine.pool.find_prefix(first) == [] and len(machine.tier) == NUM_BLOCKS
    assert machine.serve(first) == NUM_BLOCKS  # the two change places


def test_damaged_block_and_what_follows_are_computed_again() -> None:
    machine, first = Machine(NUM_BLOCKS), chain(1, NUM_BLOCKS)
    machine.serve(first)
    machine.serve(chain(2, NUM_BLOCKS))
    damaged = machine.tier._saved[first[5]].slot * SLOT_BYTES + 100
    machine.tier._memory[damaged] ^= 1
    assert machine.serve(first) == 5
    assert machine.tier.num_damaged == 3


def test_room_for_no_block_is_refused() -> None:
    with pytest.raises(ValueError, match=str(SLOT_BYTES)):
        HostTier(KVPool(LAYOUT), SLOT_BYTES - 1, nonce=1)


@pytest.mark.skipif(not has_gpu(), reason="no GPU here")
def test_blocks_of_a_gpu_come_back() -> None:
    gpu = Gpu(0)
    pool = DevicePool(LAYOUT, gpu)
    tier = HostTier(pool, 3 * SLOT_BYTES, nonce=5)
    before = np.random.default_rng(1).integers(0, 256, LAYOUT.pool_bytes, dtype=np.uint8)
    gpu.write(pool.pointer, before.tobytes())
    assert tier.save([4, 1, 6], chain(1, 3)) == []
    gpu.write(pool.pointer, bytes(LAYOUT.pool_bytes))
    assert tier.load(tier.take(chain(1, 3)), [0, 7, 2]) == 3
    after = np.frombuffer(gpu.read(pool.pointer, LAYOUT.pool_bytes), dtype=np.uint8)
    blocks = [array.reshape(NUM_LAYERS, NUM_BLOCKS, -1) for array in (before, after)]
    for source, target in ((4, 0), (1, 7), (6, 2)):
        assert (blocks[0][:, source] == blocks[1][:, target]).all()
    pool.close()
