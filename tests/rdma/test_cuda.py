"""rdma_comm.cuda on whatever GPUs there are; without one, what it says."""

from __future__ import annotations

import multiprocessing as mp
import os
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

from rdma_comm.cuda import blocks, compile, driver
from rdma_comm.cuda.blocks import BlockMover, digest_of, planes
from rdma_comm.cuda.driver import CudaError, CudaUnavailable, Gpu

BLOCK_BYTES, NUM_BLOCKS = 12304, 300  # no multiple of a piece


def num_gpus() -> int:
    count = 0
    try:
        while count < 16:
            Gpu(count)
            count += 1
    except CudaUnavailable:
        pass
    return count


NUM_GPUS = num_gpus()
needs_gpu = pytest.mark.skipif(NUM_GPUS < 1, reason="no GPU here")
needs_two = pytest.mark.skipif(NUM_GPUS < 2, reason="fewer than two GPUs here")


def random_bytes(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (NUM_BLOCKS, BLOCK_BYTES), dtype=np.uint8)


def content(gpu: Gpu, pointer: int) -> np.ndarray:
    return np.frombuffer(gpu.read(pointer, NUM_BLOCKS * BLOCK_BYTES), np.uint8).reshape(NUM_BLOCKS, BLOCK_BYTES)


@pytest.mark.skipif(NUM_GPUS > 0, reason="there is a GPU here")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(CudaUnavailable, match="driver"):
        Gpu(0)


def test_the_checksum_sees_place_nonce_and_bytes() -> None:
    words = np.random.default_rng(1).integers(0, 2**63, (4, 96), dtype=np.uint64)
    expected = digest_of(words, 5)
    assert len(set(expected.tolist())) == 4
    assert (digest_of(words, 6) != expected).all()
    for change in (
        lambda w: w[:, ::-1].copy(),
        lambda w: np.roll(w, 1, axis=1),
        lambda w: w ^ (np.arange(96) == 17).astype(np.uint64),
    ):
        assert (digest_of(change(words), 5) != expected).all()
    assert (digest_of(np.zeros((1, 96), np.uint64), 5) != digest_of(np.zeros((1, 96), np.uint64), 6)).all()


def test_the_ptx_is_the_source_s() -> None:
    try:
        compile.find_library()
    except FileNotFoundError:
        pytest.skip("no NVRTC here")
    folder = Path(compile.__file__).parent
    assert compile.compile_ptx((folder / "blocks.cu").read_text()) == (folder / "blocks.ptx").read_text()


@needs_gpu
@pytest.mark.parametrize("max_blocks", [65536, 64])
def test_scattered_blocks_inside_a_gpu_and_their_checksums(max_blocks: int) -> None:
    gpu = Gpu(0)
    data = random_bytes(1)
    source, target = gpu.allocate(data.nbytes), gpu.allocate(data.nbytes)
    gpu.write(source, data)
    mover = BlockMover(gpu, num_ctas=7, max_blocks=max_blocks)
    rng = np.random.default_rng(2)
    local, remote = rng.permutation(NUM_BLOCKS)[:250], rng.permutation(NUM_BLOCKS)[:250]
    mover.copy(
        source, target, local.astype(np.uint64) * BLOCK_BYTES, remote.astype(np.uint64) * BLOCK_BYTES, BLOCK_BYTES
    )
    found = content(gpu, target)
    assert np.array_equal(found[remote], data[local])
    assert not found[np.setdiff1d(np.arange(NUM_BLOCKS), remote)].any()
    offsets = np.arange(100, dtype=np.uint64) * np.uint64(BLOCK_BYTES)  # 100 blocks in three layers
    words = data.view(np.uint64).reshape(3, 100, -1).transpose(1, 0, 2).reshape(100, -1)
    begins = np.arange(3) * 100 * BLOCK_BYTES
    layers = planes(begins[::-1], begins, np.arange(3) * (BLOCK_BYTES // 8))
    assert np.array_equal(mover.digest(source, offsets, BLOCK_BYTES, 99, layers), digest_of(words, 99))
    parts = [mover.digest(source, offsets, BLOCK_BYTES, 99, layers[[i]]) for i in (2, 0, 1)]
    assert np.array_equal(parts[0] + parts[1] + parts[2], digest_of(words, 99))
    found = mover.copy_and_digest(source, target, offsets, offsets[::-1], BLOCK_BYTES, 99, layers)
    landed = data.reshape(3, 100, -1)[::-1, ::-1]
    assert np.array_equal(content(gpu, target).reshape(landed.shape), landed)
    words = np.ascontiguousarray(landed[:, ::-1].transpose(1, 0, 2)).reshape(100, -1).view(np.uint64)
    assert np.array_equal(found, digest_of(words, 99))
    with pytest.raises(ValueError, match="0 planes; 1 to 1024 are allowed"):
        mover.digest(source, offsets, BLOCK_BYTES, 99, layers[:0])
    for wrong in ((source + 8, BLOCK_BYTES), (source, BLOCK_BYTES - 8)):
        with pytest.raises(ValueError, match="multiples of 16"):
            mover.copy(wrong[0], target, np.zeros(1, np.uint64), np.zeros(1, np.uint64), wrong[1])
    mover.close()
    mover.close()
    for pointer in (source, target):
        gpu.free(pointer)


def test_neighbours_are_joined() -> None:
    places = np.array([[0, 64], [16, 80], [32, 96], [64, 112], [80, 0], [96, 16], [16, 32]], np.uint64)
    for least_bytes in (0, 28):
        found = blocks._joined(places[:, 0], places[:, 1], 16, least_bytes)
        assert found is not None and found.tolist() == [[0, 64, 80, 16], [64, 112, 0, 32], [48, 16, 32, 16]]
    assert blocks._joined(places[:, 0], places[:, 1], 16, 29) is None
    many = np.arange(10 * blocks.SAMPLE, dtype=np.uint64) * np.uint64(16)
    found = blocks._joined(many, many, 16, many.nbytes)
    assert found is not None and found.tolist() == [[0], [0], [len(many) * 16]]
    assert blocks._joined(many * np.uint64(2), many, 16, 1 << 20) is None


@needs_gpu
@pytest.mark.parametrize("engine_bytes", [0, 3 * BLOCK_BYTES, 1 << 60])
def test_large_pieces_go_by_the_copy_engines(engine_bytes: int) -> None:
    gpu = Gpu(0)
    data = random_bytes(4)
    source, target = gpu.allocate(data.nbytes), gpu.allocate(data.nbytes)
    gpu.write(source, data)
    mover = BlockMover(gpu, engine_bytes=engine_bytes)
    numbers = np.arange(100).reshape(20, 5)  # pieces of five blocks
    local, remote = (np.random.default_rng(s).permutation(numbers).ravel() for s in (5, 6))
    begins = np.arange(3) * 100 * BLOCK_BYTES
    layers = planes(begins[::-1], begins, np.arange(3) * (BLOCK_BYTES // 8))
    lists = [n.astype(np.uint64) * np.uint64(BLOCK_BYTES) for n in (local, remote)]
    for nonce in (1, 2):  # the second time the lists are there already
        found = mover.copy_and_digest(source, target, *lists, BLOCK_BYTES, nonce, layers)
        landed = np.zeros((3, 100, BLOCK_BYTES), np.uint8)
        landed[:, remote] = data.reshape(landed.shape)[::-1, local]
        assert np.array_equal(content(gpu, target).reshape(landed.shape), landed)
        words = np.ascontiguousarray(landed[:, remote].transpose(1, 0, 2)).reshape(100, -1).view(np.uint64)
        assert np.array_equal(found, digest_of(words, nonce))
        gpu.write(target, np.zeros_like(data))
    mover.close()
    for pointer in (source, target):
        gpu.free(pointer)


def owner(ordinal: int, pipe: Connection) -> None:
    gpu = Gpu(ordinal)
    other = gpu.allocate(4096)
    pointer = gpu.allocate(NUM_BLOCKS * BLOCK_BYTES)
    gpu.write(pointer, random_bytes(3))
    pipe.send((gpu.uuid, *gpu.export(pointer)))
    pipe.recv()
    gpu.free(other)
    os._exit(0)


@needs_gpu
@pytest.mark.parametrize("ordinal", [0, pytest.param(1, marks=needs_two)])
def test_another_process_s_memory(ordinal: int) -> None:
    context = mp.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=owner, args=(0, theirs), daemon=True)
    process.start()
    uuid, handle, offset = pipe.recv()
    assert uuid == Gpu(0).uuid
    gpu = Gpu(ordinal)
    base = gpu.open(handle)
    target = gpu.allocate(NUM_BLOCKS * BLOCK_BYTES)
    mover = BlockMover(gpu)
    places = np.arange(NUM_BLOCKS, dtype=np.uint64) * np.uint64(BLOCK_BYTES)
    mover.copy(base + offset, target, places, places[::-1].copy(), BLOCK_BYTES)
    assert np.array_equal(content(gpu, target)[::-1], random_bytes(3))
    gpu.close_handle(base)
    pipe.send(None)
    process.join(20)
    mover.close()
    gpu.free(target)


@needs_gpu
def test_errors_have_the_driver_s_names() -> None:
    with pytest.raises(CudaError, match=r"cuMemAlloc failed: CUDA_ERROR_OUT_OF_MEMORY \(2\)"):
        Gpu(0).allocate(1 << 50)
    with pytest.raises(CudaUnavailable, match="there is no GPU 99"):
        Gpu(99)
    with pytest.raises(CudaError, match="cuPointerGetAttribute"):
        Gpu(0).export(12345)
    assert Gpu(0).pci_address.count(":") == 2
    assert Gpu(0).has("cuInit") and not Gpu(0).has("cuNoSuchCall")
    if Gpu(0).can_flush_nic_writes:
        Gpu(0).flush_nic_writes()
    assert driver.driver() is driver.driver() and blocks.THREADS == 512
