"""GPU to GPU where neither RDMA nor a way between the GPUs is there: device -> pinned host memory -> TCP -> pinned host memory -> device.

    python -m benchmarks.bench_staging --json out.json        (two GPUs; no PyTorch needed)

Two processes, a DevicePool on a GPU each; the pool's blocks change their places. Lanes share the work; each has a connection, a thread
that copies and one that sends (or receives), and a few buffers that go round between the two, so that PCIe and the network work at once.
Beside it, in the same run: each stage alone. Medians of several rounds; every round's checksums are compared.
"""

from __future__ import annotations

import argparse
import ctypes
import queue
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from ctypes import byref, c_size_t, c_uint, c_void_p
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import child
from benchmarks.checks import ended, need_gpus
from benchmarks.job import NUM_LAYERS, Job, fill
from benchmarks.peers.ours import layout_of
from fastdeploy_pd.errors import ConfigError
from fastdeploy_pd.flags import Parser, integer
from fastdeploy_pd.machine import check_output, write_json
from fastdeploy_pd.transfer.device_pool import DevicePool
from rdma_comm.cuda.blocks import BlockMover
from rdma_comm.cuda.driver import Gpu

PORTABLE_AND_MAPPED = 3  # pinned for every context, and a kernel can reach it under the host's address
FILL_BYTES = 64 << 20
SOCKET_BUFFER_BYTES = 4 << 20
TIMEOUT_S = 60.0


class Buffers:
    """Pieces of pinned host memory that go round between a filling and an emptying thread."""

    def __init__(self, gpu: Gpu, count: int, num_bytes: int) -> None:
        self._gpu, self._pointer = gpu, c_void_p()
        gpu.call("cuMemHostAlloc", byref(self._pointer), c_size_t(count * num_bytes), c_uint(PORTABLE_AND_MAPPED))
        self.address, self.num_bytes = int(self._pointer.value or 0), num_bytes
        self.view = memoryview((ctypes.c_char * (count * num_bytes)).from_address(self.address)).cast("B")
        self.free: queue.Queue[int] = queue.Queue()  # offsets
        self.full: queue.Queue[tuple[int, int]] = queue.Queue()  # (offset, number of the chunk)
        for index in range(count):
            self.free.put(index * num_bytes)

    def close(self) -> None:
        """Give the memory back. Raises: CudaError."""
        self.view.release()
        self._gpu.call("cuMemFreeHost", self._pointer)


class Lane:
    """One connection's share: every `step`-th chunk of a job, beginning with `first`."""

    def __init__(self, pool: DevicePool, connection: socket.socket, arguments: argparse.Namespace, first: int) -> None:
        self._pool, self._connection = pool, connection
        self._first, self._step = first, arguments.lanes
        self._mover = BlockMover(pool.gpu, arguments.ctas)
        self._buffers = Buffers(pool.gpu, arguments.buffers, arguments.chunk_kib << 10)

    def _chunks(self, places: np.ndarray, size: int) -> list[np.ndarray]:
        each = self._buffers.num_bytes // size
        return [places[i : i + each] for i in range(self._first * each, len(places), self._step * each)]

    def _copy(self, places: np.ndarray, offset: int, size: int, is_outward: bool) -> None:
        host, packed = self._buffers.address + offset, np.arange(len(places), dtype=np.uint64) * np.uint64(size)
        if is_outward:
            self._mover.copy(self._pool.pointer, host, places, packed, size)
        else:
            self._mover.copy(host, self._pool.pointer, packed, places, size)

    def send(self, places: np.ndarray, size: int, is_staged: bool = True, is_sent: bool = True) -> None:
        """Send the lane's share.

        Args:
            places: [n] uint64 offsets of blocks in the pool; size: bytes of each.
            is_staged, is_sent: False leaves that stage out, to see the other's speed.
        """
        chunks, buffers = self._chunks(places, size), self._buffers

        def stage() -> None:
            for number, chunk in enumerate(chunks):
                offset = buffers.free.get(timeout=TIMEOUT_S)
                if is_staged:
                    self._copy(chunk, offset, size, is_outward=True)
                buffers.full.put((offset, number))

        def transmit() -> None:
            for chunk in chunks:
                offset, _ = buffers.full.get(timeout=TIMEOUT_S)
                if is_sent:
                    self._connection.sendall(buffers.view[offset : offset + len(chunk) * size])
                buffers.free.put(offset)

        together([stage, transmit])

    def receive(self, places: np.ndarray, size: int, is_staged: bool = True, is_sent: bool = True) -> None:
        """Take the lane's share: as `send`."""
        chunks, buffers = self._chunks(places, size), self._buffers

        def take() -> None:
            for number, chunk in enumerate(chunks):
                offset, wanted = buffers.free.get(timeout=TIMEOUT_S), len(chunk) * size
                view, taken = buffers.view[offset : offset + wanted], 0
                while is_sent and taken < wanted:
                    count = self._connection.recv_into(view[taken:])
                    if not count:
                        raise RuntimeError("the connection ended")
                    taken += count
                buffers.full.put((offset, number))

        def place() -> None:
            for _ in chunks:
                offset, number = buffers.full.get(timeout=TIMEOUT_S)
                if is_staged:
                    self._copy(chunks[number], offset, size, is_outward=False)
                buffers.free.put(offset)

        together([take, place])

    def close(self) -> None:
        """Give everything back."""
        self._mover.close()
        self._buffers.close()
        self._connection.close()


def together(tasks: list[Callable[[], None]]) -> None:
    """Run tasks in a thread each until all have ended. Raises: RuntimeError: one has failed."""
    failures: list[BaseException] = []

    def run(task: Callable[[], None]) -> None:
        try:
            task()
        except Exception as error:  # noqa: BLE001  # passed on
            failures.append(error)

    threads = [threading.Thread(target=run, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise RuntimeError(f"a stage failed: {failures[0]!r}") from failures[0]


def lanes(pool: DevicePool, connections: list[socket.socket], arguments: argparse.Namespace) -> list[Lane]:
    """Returns: a lane a connection."""
    for connection in connections:
        connection.settimeout(TIMEOUT_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return [Lane(pool, connection, arguments, number) for number, connection in enumerate(connections)]


def source_process(pipe: Connection, arguments: argparse.Namespace) -> None:
    """Own the first GPU: fill a pool, and send what is asked for."""
    gpu = Gpu(arguments.gpus[0])
    pool = DevicePool(layout_of(arguments.block_kib << 10, arguments.pool_mib << 20), gpu)
    content = np.empty(arguments.pool_mib << 20, np.uint8)
    fill(content)
    for start in range(0, len(content), FILL_BYTES):
        gpu.write(pool.pointer + start, content[start : start + FILL_BYTES])
    del content
    port = pipe.recv()
    connections = []
    for _ in range(arguments.lanes):
        connections.append(socket.create_connection(("127.0.0.1", port)))
        connections[-1].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
    ways = lanes(pool, connections, arguments)
    while (asked := pipe.recv()) is not None:
        job, is_staged, is_sent = asked
        places, _, size = job.pieces()
        began_s = time.perf_counter()
        together([partial(way.send, places.astype(np.uint64), size, is_staged, is_sent) for way in ways])
        taken_s = time.perf_counter() - began_s
        pipe.send((taken_s, pool.digest(job.blocks()[0], job.seed)))
    for way in ways:
        way.close()
    pool.close()


class Receiver:
    """This process: owns the second GPU, asks for jobs, measures."""

    def __init__(self, pipe: Connection, arguments: argparse.Namespace) -> None:
        self._pipe, self._arguments = pipe, arguments
        self._pool = DevicePool(layout_of(arguments.block_kib << 10, arguments.pool_mib << 20), Gpu(arguments.gpus[1]))
        with socket.create_server(("127.0.0.1", 0)) as listener:
            # Before anything is connected: the window is agreed on then.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER_BYTES)
            listener.settimeout(TIMEOUT_S)
            pipe.send(listener.getsockname()[1])
            connections = [listener.accept()[0] for _ in range(arguments.lanes)]
        self._ways = lanes(self._pool, connections, arguments)
        self._seed = 0

    def whole(self) -> float:
        """Returns: seconds from the first call until all is in the second GPU. Raises: RuntimeError: it is not what was sent."""
        job = self._ask(True, True)
        _, places, size = job.pieces()
        began_s = time.perf_counter()
        self._run(places, size, True, True)
        taken_s = time.perf_counter() - began_s
        if self._pipe.recv()[1] != self._pool.digest(job.blocks()[1], job.seed):
            raise RuntimeError("the bytes that arrived are not those that were sent")
        return taken_s

    def stages(self) -> dict[str, float]:
        """Returns: seconds of each stage alone: out of the GPU, over TCP, into the GPU."""
        found = {}
        self._ask(True, False)
        found["device to host"] = float(self._pipe.recv()[0])
        job = self._ask(False, True)
        _, places, size = job.pieces()
        began_s = time.perf_counter()
        self._run(places, size, False, True)
        found["tcp"] = time.perf_counter() - began_s
        self._pipe.recv()
        began_s = time.perf_counter()
        self._run(places, size, True, False)
        found["host to device"] = time.perf_counter() - began_s
        return found

    def _ask(self, is_staged: bool, is_sent: bool) -> Job:
        self._seed += 1
        job = Job(self._arguments.pool_mib << 20, self._arguments.block_kib << 10, True, self._seed)
        self._pipe.send((job, is_staged, is_sent))
        return job

    def _run(self, places: np.ndarray, size: int, is_staged: bool, is_sent: bool) -> None:
        targets = places.astype(np.uint64)
        together([partial(way.receive, targets, size, is_staged, is_sent) for way in self._ways])

    def close(self) -> None:
        """End both processes' parts."""
        self._pipe.send(None)
        for way in self._ways:
            way.close()
        self._pool.close()


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns: medians, GB/s, and the aim: the slowest stage alone."""
    pipe, process = child.start(source_process, arguments)
    receiver = Receiver(pipe, arguments)
    times_s: dict[str, list[float]] = {"whole": [], "device to host": [], "tcp": [], "host to device": []}
    for number in range(arguments.rounds + 1):
        found = {"whole": receiver.whole(), **receiver.stages()}
        if number:  # the first warms up
            for name, taken_s in found.items():
                times_s[name].append(taken_s)
    receiver.close()
    process.join(TIMEOUT_S)
    speeds = {name: (arguments.pool_mib << 20) / statistics.median(taken) / 1e9 for name, taken in times_s.items()}
    slowest = min(speed for name, speed in speeds.items() if name != "whole")
    return {"gb_s": speeds, "of_the_slowest_stage": speeds["whole"] / slowest}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns: the flags. Raises: ConfigError: one is wrong, or there are not so many GPUs here."""
    count = integer(1)
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--gpus", type=integer(0, 1023), nargs=2, default=(0, 1), metavar="N", help="source and target (default 0 1)"
    )
    parser.add_argument("--pool-mib", type=count, default=1024, help="bytes of a round (default 1024)")
    parser.add_argument("--block-kib", type=count, default=64, help="bytes of a block in a layer (default 64)")
    parser.add_argument("--chunk-kib", type=count, default=4096, help="bytes of a buffer (default 4096)")
    parser.add_argument("--buffers", type=count, default=4, help="of a lane, on each side (default 4)")
    parser.add_argument(
        "--lanes", type=count, nargs="+", default=[1, 2, 4, 8], help="connections; several are compared"
    )
    parser.add_argument("--ctas", type=count, default=16, help="a copy's share of the GPU (default 16)")
    parser.add_argument("--rounds", type=count, default=7)
    arguments = parser.parse_args(argv)
    chunk_kib, block_kib, pool_mib = arguments.chunk_kib, arguments.block_kib, arguments.pool_mib
    if chunk_kib % block_kib:
        raise ConfigError(f"--chunk-kib is {chunk_kib}; it must be a multiple of --block-kib, {block_kib}")
    if pool_mib << 10 < NUM_LAYERS * block_kib:
        least = -(-NUM_LAYERS * block_kib // 1024)
        raise ConfigError(f"--pool-mib is {pool_mib}; with --block-kib {block_kib} it must be at least {least}")
    check_output(arguments.json)
    need_gpus(f"--gpus {' '.join(map(str, arguments.gpus))}", max(arguments.gpus) + 1)
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Returns: 0. Raises: ConfigError: see `parse`."""
    arguments = parse(argv)
    results = {}
    for count in arguments.lanes:
        found = measure(argparse.Namespace(**{**vars(arguments), "lanes": count}))
        results[count] = found
        stages = ", ".join(f"{name} {speed:.2f}" for name, speed in found["gb_s"].items())
        sys.stdout.write(
            f"{count} lanes, GB/s: {stages}; whole is {found['of_the_slowest_stage']:.2f} of the slowest stage\n"
        )
        sys.stdout.flush()
    if arguments.json:
        write_json(arguments.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(ended(lambda: child.watched(main)))
