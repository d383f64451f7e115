"""Copies and checksums of scattered blocks of GPU memory, one kernel launch each, on a stream of their own.

Neighbours are joined; what is then in large pieces goes by the copy engines in one call instead: they leave the multiprocessors to whoever
computes, who in turn does not slow them down.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from ctypes import byref, c_size_t, c_uint, c_ulonglong, c_void_p

import numpy as np

from rdma_comm.cuda.driver import Gpu, Stream

THREADS = 512
PIECE_BYTES = THREADS * 16
DEFAULT_CTAS = 32  # of 132: 370 GB/s over NVLink from blocks of 8 KiB on, of 374 with all of them
DIGEST_CTAS = 528  # four for each of an H200's multiprocessors
ALIGNMENT = 16
MAX_PLANES = 1024
SAMPLE = 256
ENGINE_BYTES = (
    1 << 20
)  # pieces from this on: 348 GB/s beside the kernel's 366 on an idle GPU, 347 beside 194 on one that computes
_PLANES_BYTES = MAX_PLANES * 32
_MAX_PIECES = 2**31
_MIX = (np.uint64(0x9FB21C651E98DF25), np.uint64(0x9E3779B97F4A7C15))


def planes(sources: np.ndarray | int, targets: np.ndarray, first_words: np.ndarray) -> np.ndarray:
    """Where the same blocks lie in several planes, e.g. a model's layers.

    Args:
        sources, targets: [m] bytes from either memory's begin to the plane's.
        first_words: [m] position of the plane's first 8-byte word in a block of all planes; checksums depend on it.
    Returns: [m, 4] uint64, as the kernels read it.
    """
    found = np.zeros((len(targets), 4), dtype=np.uint64)
    found[:, 0], found[:, 1], found[:, 2] = sources, targets, first_words
    return found


ONE_PLANE = planes(np.zeros(1), np.zeros(1), np.zeros(1))


class BlockMover:
    """Copies blocks into (or out of) one GPU's memory and checksums them. One call at a time; from any thread."""

    def __init__(
        self, gpu: Gpu, num_ctas: int = DEFAULT_CTAS, max_blocks: int = 65536, engine_bytes: int = ENGINE_BYTES
    ) -> None:
        """
        Args:
            num_ctas: how many of the GPU's multiprocessors a copy may take.
            max_blocks: of one launch; a longer list takes several.
            engine_bytes: pieces that are as large on average, neighbours joined, go by the copy engines.
        Raises: CudaError.
        """
        self.gpu, self.num_ctas, self.max_blocks = gpu, num_ctas, max_blocks
        self._engine_bytes = engine_bytes if gpu.has("cuMemcpyBatchAsync") else 1 << 62
        self._pieces: np.ndarray | None = None  # of the lists in the table, where they are large: see _joined
        self._stream = Stream(gpu)
        table_bytes, sums_bytes = _PLANES_BYTES + max_blocks * 16, max_blocks * 8
        self._table, self._digests = gpu.allocate(table_bytes), gpu.allocate(sums_bytes)
        self._staging = c_void_p()  # pinned: a pageable list would be copied twice
        gpu.call("cuMemHostAlloc", byref(self._staging), c_size_t(table_bytes + sums_bytes), c_uint(0))
        buffer = (ctypes.c_char * (table_bytes + sums_bytes)).from_address(self._staging.value or 0)
        words = np.frombuffer(memoryview(buffer).cast("B"), dtype=np.uint64)
        self._planes, self._places, self._found = np.split(words, [_PLANES_BYTES // 8, table_bytes // 8])
        self._uploaded: tuple[object, object] = (None, None)  # the lists in the table
        self._lock = threading.Lock()
        gpu.function("copy_blocks")

    def copy(
        self,
        source: int,
        target: int,
        source_offsets: np.ndarray,
        target_offsets: np.ndarray,
        block_bytes: int,
        planes: np.ndarray = ONE_PLANE,
    ) -> None:
        """Copy blocks; when it returns they are there.

        Args:
            source, target: addresses that this GPU can reach.
            source_offsets, target_offsets: [n] bytes from a plane's begin. Lists that are passed again, as the same objects, are not
                uploaded again: don't change them.
            block_bytes: of each in a plane; a multiple of 16, as all offsets and addresses.
            planes: [m, 4], see `planes`; m <= MAX_PLANES.
        Raises: ValueError: something is not aligned, or too much; CudaError.
        """
        with self._lock:
            for _, count in self._parts(source | target, source_offsets, target_offsets, block_bytes, planes):
                self._start_copy(source, target, count, block_bytes, planes)
                self._stream.wait()

    def digest(
        self, pool: int, offsets: np.ndarray, block_bytes: int, nonce: int, planes: np.ndarray = ONE_PLANE
    ) -> np.ndarray:
        """Checksums of blocks as they lie in memory now, in the planes' target columns.

        Args:
            pool: address; offsets: [n] bytes from a plane's begin.
            nonce: checksums of equal bytes under another nonce differ.
        Returns: [n] uint64, as `digest_of` computes them on the CPU; those of several lists of planes add up to that of all.
        Raises: as `copy`.
        """
        found = np.zeros(len(offsets), np.uint64)
        with self._lock:
            for first, count in self._parts(pool, offsets, offsets, block_bytes, planes):
                self._launch_digest(pool, count, block_bytes, nonce, len(planes))
                self._stream.wait()
                found[first : first + count] = self._found[:count]
        return found

    def copy_and_digest(
        self,
        source: int,
        target: int,
        source_offsets: np.ndarray,
        target_offsets: np.ndarray,
        block_bytes: int,
        nonce: int,
        planes: np.ndarray = ONE_PLANE,
    ) -> np.ndarray:
        """Copy blocks, then checksum them where they have landed. Arguments, returns and raises as `copy` and `digest`."""
        found = np.zeros(len(target_offsets), np.uint64)
        with self._lock:
            for first, count in self._parts(source | target, source_offsets, target_offsets, block_bytes, planes):
                self._start_copy(source, target, count, block_bytes, planes)
                self._launch_digest(target, count, block_bytes, nonce, len(planes))
                self._stream.wait()
                found[first : first + count] = self._found[:count]
        return found

    def close(self) -> None:
        """Give memory and stream back. Idempotent."""
        if self._staging:
            self._stream.close()
            for pointer in (self._table, self._digests):
                self.gpu.free(pointer)
            self.gpu.call("cuMemFreeHost", self._staging)
            self._staging = c_void_p()

    def _parts(
        self, addresses: int, sources: np.ndarray, targets: np.ndarray, block_bytes: int, planes: np.ndarray
    ) -> Iterator[tuple[int, int]]:
        """Upload the lists where they are not there already, as much of them as one launch takes at a time. Yields: (first block, how many)."""
        bits = addresses | block_bytes
        for offsets in (sources, targets, planes[:, :2].reshape(-1)):
            bits |= int(np.bitwise_or.reduce(offsets))
        if bits % ALIGNMENT:
            raise ValueError(f"addresses, offsets and block_bytes ({block_bytes}) must be multiples of {ALIGNMENT}")
        if not 0 < len(planes) <= MAX_PLANES:
            raise ValueError(f"{len(planes)} planes; 1 to {MAX_PLANES} are allowed")
        pieces = len(planes) * -(-block_bytes // PIECE_BYTES)
        most = min(self.max_blocks, _MAX_PIECES // pieces)
        if not most:
            raise ValueError(f"blocks of {block_bytes} bytes in {len(planes)} planes are too large")
        self._planes[: planes.size] = planes.reshape(-1)
        self._upload(0, planes.nbytes)
        for first in range(0, len(sources), most):
            count = min(most, len(sources) - first)
            # A list that went in one part when it had fewer planes may take several now: each is uploaded then.
            if count < len(sources) or self._uploaded[0] is not sources or self._uploaded[1] is not targets:
                words = self._places[: 2 * count].reshape(count, 2)
                words[:, 0], words[:, 1] = sources[first : first + count], targets[first : first + count]
                self._upload(_PLANES_BYTES, count * 16)
                self._uploaded = (sources, targets) if count == len(sources) else (None, None)
                self._pieces = _joined(words[:, 0], words[:, 1], block_bytes, self._engine_bytes)
            yield first, count

    def _upload(self, offset: int, num_bytes: int) -> None:
        place, staged = c_ulonglong(self._table + offset), c_void_p((self._staging.value or 0) + offset)
        self.gpu.call("cuMemcpyHtoDAsync", place, staged, c_size_t(num_bytes), self._stream.handle)

    def _start_copy(self, source: int, target: int, count: int, block_bytes: int, planes: np.ndarray) -> None:
        if self._pieces is not None:
            begins = planes[:, None, :2] + np.array([source, target], np.uint64)
            sources, targets = (begins[:, :, i] + self._pieces[i] for i in (0, 1))
            self.gpu.copy_batch(sources.ravel(), targets.ravel(), np.tile(self._pieces[2], len(planes)), self._stream)
        else:
            self._launch_copy(source, target, count, block_bytes, len(planes))

    def _launch_copy(self, source: int, target: int, count: int, block_bytes: int, num_planes: int) -> None:
        self.gpu.launch(
            "copy_blocks", self.num_ctas, THREADS, self._stream.handle, c_ulonglong(source), c_ulonglong(target),
            c_ulonglong(self._table + _PLANES_BYTES), c_uint(count), c_ulonglong(self._table), c_uint(num_planes), c_uint(block_bytes),
        )  # fmt: skip

    def _launch_digest(self, pool: int, count: int, block_bytes: int, nonce: int, num_planes: int) -> None:
        stream, num_bytes = self._stream.handle, c_size_t(count * 8)
        self.gpu.call("cuMemsetD8Async", c_ulonglong(self._digests), ctypes.c_ubyte(0), num_bytes, stream)
        self.gpu.launch(
            "digest_blocks", min(DIGEST_CTAS, count * num_planes), THREADS, stream, c_ulonglong(pool), c_ulonglong(self._table + _PLANES_BYTES), c_uint(count),
            c_ulonglong(self._table), c_uint(num_planes), c_uint(block_bytes), c_ulonglong(nonce), c_ulonglong(self._digests),
        )  # fmt: skip
        place = c_void_p(self._found.ctypes.data)
        self.gpu.call("cuMemcpyDtoHAsync", place, c_ulonglong(self._digests), num_bytes, stream)


def _joined(sources: np.ndarray, targets: np.ndarray, block_bytes: int, least_bytes: int) -> np.ndarray | None:
    """
    Args:
        sources, targets: [n] where blocks begin; least_bytes: of a piece on average.
    Returns: [3, m] source, target and bytes of the pieces that they make where blocks lie side by side in both; None: too small ones.
    """
    least_of_sample = min(least_bytes, SAMPLE * block_bytes) // 2
    if len(sources) > SAMPLE and _joined(sources[:SAMPLE], targets[:SAMPLE], block_bytes, least_of_sample) is None:
        return None  # a long list of small pieces takes longer to look through than to copy
    is_first = np.ones(len(sources), dtype=bool)
    is_first[1:] = (np.diff(sources) != block_bytes) | (np.diff(targets) != block_bytes)
    starts = np.flatnonzero(is_first)
    if len(sources) * block_bytes < len(starts) * least_bytes:
        return None
    sizes = np.diff(np.append(starts, len(sources))).astype(np.uint64) * np.uint64(block_bytes)
    return np.stack([sources[starts], targets[starts], sizes])


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
