"""Copies of scattered blocks from one GPU to another between two processes, through CUDA IPC, and what they cost who computes meanwhile.

    python -m benchmarks.bench_ipc --json out.json        (two GPUs with NVLink, PyTorch)

A process owns the source GPU, this one the target; it pulls. Medians of several rounds; every copy's bytes are compared once. Where NIXL is
installed (pip install --no-deps nixl-cu13), it is timed beside (peers/nixl_gpu.py).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from ctypes import c_size_t, c_ulonglong
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import child
from benchmarks.checks import ended, need_gpus
from fastdeploy_pd.core.layout import KVLayout
from fastdeploy_pd.errors import ConfigError
from fastdeploy_pd.flags import Parser
from fastdeploy_pd.machine import check_output, write_json
from fastdeploy_pd.transfer.base import EpochArrived, EpochSent, Transfer, TransferEvent
from fastdeploy_pd.transfer.device_pool import DevicePool
from fastdeploy_pd.transfer.select import build
from rdma_comm.cuda.blocks import BlockMover, planes
from rdma_comm.cuda.driver import Gpu, Stream

POOL_BYTES = 4 << 30
MOVED_BYTES = 1 << 30  # of one epoch
EPOCHS = 4
BLOCKS_KIB = (4, 8, 16, 32, 64, 256, 1024)
CTAS = (8, 16, 24, 32, 48, 66, 132)
ROUNDS = 7
MATRIX = 8192
LOAD_S, LOAD_TURNS = 0.4, 3
PACE_GB_S = 6.0  # KV of a whole prefill GPU: 44,000 tokens a second of Llama-3-8B
PACED_BYTES, PACED_EPOCHS = 64 << 20, 60
COPY_AND_DIGEST = BlockMover.copy_and_digest


def source_process(pipe: Connection) -> None:
    """Own GPU 0: a pool of random bytes; on demand multiply matrices and say how fast."""
    import torch

    gpu = Gpu(0)
    pool = gpu.allocate(POOL_BYTES)
    chunk = np.random.default_rng(0).integers(0, 256, 256 << 20, dtype=np.uint8)
    for start in range(0, POOL_BYTES, chunk.nbytes):
        chunk[:8] = np.frombuffer(np.uint64(start).tobytes(), np.uint8)
        gpu.write(pool + start, chunk)
    pipe.send(gpu.export(pool))
    while (asked := pipe.recv()) is not None:
        if asked == "digest":
            pipe.send(digest_seconds(gpu, pool))
        elif isinstance(asked, KVLayout):
            send_paced(pipe, gpu, torch, asked)
        elif isinstance(asked, tuple):
            send_epochs(pipe, gpu, *asked)
        else:
            pipe.send(products_per_second(torch, 0, asked))


def hand_over_layouts() -> dict[int, KVLayout]:
    """Returns: by KiB of a block in one layer, 16 layers whose pool holds EPOCHS of MOVED_BYTES and half as much more."""
    shapes = {8: (16, 1), 32: (64, 1), 64: (16, 8), 256: (64, 8)}
    return {
        kib: KVLayout(16, 3 * EPOCHS * MOVED_BYTES // 32 // (kib << 10), heads, block_size, 128, "float16")
        for kib, (block_size, heads) in shapes.items()
    }


def epoch_blocks(layout: KVLayout, seed: int) -> list[list[int]]:
    """Returns: of EPOCHS epochs MOVED_BYTES' worth of blocks each, scattered."""
    count = MOVED_BYTES // layout.num_layers // layout.block_bytes
    blocks: list[int] = np.random.default_rng(seed).permutation(layout.num_blocks).tolist()
    return [blocks[number * count : (number + 1) * count] for number in range(EPOCHS)]


def copy_alone(self: BlockMover, *arguments: Any) -> np.ndarray:
    """BlockMover.copy_and_digest without checksums."""
    self.copy(*arguments[:5], planes=arguments[6])
    return np.zeros(len(arguments[3]), np.uint64)


class Unchecked(DevicePool):
    """A pool whose checksums are not computed: what they cost."""

    def digest_layers(self, layers: Any, block_ids: Any, nonce: int, parts: int = 1) -> Any:
        """See DevicePool."""
        return np.zeros(len(block_ids), np.uint64)


def wait_events(transfer: Transfer, count: int) -> list[TransferEvent]:
    """Returns: the next things a transfer reports, in the order of their epochs."""
    events: list[TransferEvent] = []
    while len(events) < count:
        events += transfer.poll()
        time.sleep(0.00002)
    return sorted(events, key=lambda e: e.epoch)


def end_of(gpu: Gpu, layout: KVLayout, is_checked: bool, backend: str) -> tuple[DevicePool, Transfer]:
    """Returns: a pool and its transfer, in this process from now on with or without checksums."""
    BlockMover.copy_and_digest = COPY_AND_DIGEST if is_checked else copy_alone  # type: ignore[method-assign]
    pool = (DevicePool if is_checked else Unchecked)(layout, gpu)
    return pool, build(backend, pool=pool, layout=layout, fingerprint="m")


def send_epochs(pipe: Connection, gpu: Gpu, layout: KVLayout, is_checked: bool, backend: str) -> None:
    """Hand over what is asked for, until None is; answer with what the transfer has reported."""
    pool, transfer = end_of(gpu, layout, is_checked, backend)
    descriptor = pipe.recv()
    while (asked := pipe.recv()) is not None:
        seed, num_epochs = asked
        blocks = list(zip(epoch_blocks(layout, seed), epoch_blocks(layout, seed + 1), strict=True))[:num_epochs]
        pipe.send("ready")
        pipe.recv()
        for number, (local, remote) in enumerate(blocks):
            transfer.start(f"{seed}-{number}", 7, descriptor, remote)
            for layer in range(layout.num_layers):
                transfer.write(f"{seed}-{number}", [layer], local, remote)
            transfer.finish(f"{seed}-{number}")
        pipe.send(wait_events(transfer, num_epochs))
    transfer.close()
    pool.close()


def hand_over_speed(
    pipe: Connection, gpu: Gpu, layout: KVLayout, is_checked: bool = True, backend: str = "ipc"
) -> dict[str, float]:
    """Returns: GB/s from the word to begin until all have arrived, checksums of both sides included: of one epoch and of EPOCHS at once."""
    pipe.send((layout, is_checked, backend))
    pool, transfer = end_of(gpu, layout, is_checked, backend)
    pipe.send(transfer.descriptor())
    found = {}
    for num_epochs, name in ((1, "one_gb_s"), (EPOCHS, "several_gb_s")):
        taken_s = []
        for seed in range(0, 1000 * (ROUNDS + 1), 1000):
            seed += num_epochs * 10
            for number, remote in enumerate(epoch_blocks(layout, seed + 1)[:num_epochs]):
                transfer.open_epoch(f"{seed}-{number}", remote, 7)
            pipe.send((seed, num_epochs))
            pipe.recv()
            pipe.send("go")
            began_s = time.perf_counter()
            arrived = wait_events(transfer, num_epochs)
            taken_s.append(time.perf_counter() - began_s)
            for one, other in zip(arrived, pipe.recv(), strict=True):
                if (
                    not isinstance(other, EpochSent)
                    or not isinstance(one, EpochArrived)
                    or one.digests != other.digests
                ):
                    raise SystemExit(f"the hand-over failed: {str(one)[:200]} {str(other)[:200]}")
                transfer.revoke(one.epoch)
        found[name] = num_epochs * MOVED_BYTES / statistics.median(taken_s[1:]) / 1e9  # the first connects
    pipe.send(None)
    transfer.close()
    pool.close()
    return found


def send_paced(pipe: Connection, gpu: Gpu, torch: Any, layout: KVLayout) -> None:
    """Hand over small epochs at PACE_GB_S while this GPU multiplies matrices; answer with what is left of its speed."""
    pool, transfer = end_of(gpu, layout, True, "ipc")
    descriptor, blocks = pipe.recv()
    interval_s = PACED_BYTES / PACE_GB_S / 1e9

    def send() -> None:
        began_s = time.perf_counter()
        for number, ids in enumerate(blocks):
            time.sleep(max(0.0, began_s + number * interval_s - time.perf_counter()))
            transfer.start(f"paced-{number}", 7, descriptor, ids)
            for layer in range(layout.num_layers):
                transfer.write(f"paced-{number}", [layer], ids[::-1], ids)
            transfer.finish(f"paced-{number}")

    load_s = PACED_EPOCHS * interval_s
    before = products_per_second(torch, 0, load_s)
    thread = threading.Thread(target=send)
    thread.start()
    beside = products_per_second(torch, 0, load_s)
    thread.join()
    events = wait_events(transfer, PACED_EPOCHS)
    after = products_per_second(torch, 0, load_s)
    pipe.send((beside / ((before + after) / 2), {e.epoch: getattr(e, "digests", None) for e in events}))
    transfer.close()
    pool.close()


def paced_cost(pipe: Connection, gpu: Gpu, layout: KVLayout) -> float:
    """Returns: the share of its products a second that a GPU keeps while what it sends goes at PACE_GB_S, checksums and all: a median."""
    kept = []
    count = PACED_BYTES // layout.num_layers // layout.block_bytes
    for turn in range(LOAD_TURNS + 2):
        pipe.send(layout)
        pool, transfer = end_of(gpu, layout, True, "ipc")
        order: list[int] = np.random.default_rng(turn).permutation(layout.num_blocks).tolist()
        blocks = [order[n * count : (n + 1) * count] for n in range(PACED_EPOCHS)]
        for number, ids in enumerate(blocks):
            transfer.open_epoch(f"paced-{number}", ids, 7)
        pipe.send((transfer.descriptor(), blocks))
        arrived = {e.epoch: getattr(e, "digests", ()) for e in wait_events(transfer, PACED_EPOCHS)}
        share, sent = pipe.recv()
        if arrived != sent:
            raise SystemExit("the paced hand-overs failed")
        kept.append(share)
        transfer.close()
        pool.close()
    return statistics.median(kept)


def nixl_speeds() -> dict[str, float] | str:
    """Returns: NIXL's GB/s by block, or why there are none."""
    if importlib.util.find_spec("nixl_cu13") is None:
        return "not installed: pip install --no-deps nixl-cu13"
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "nixl.json"
        command = [sys.executable, "-m", "benchmarks.peers.nixl_gpu", "--json", str(path)]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=300)
        return json.loads(path.read_text()) if path.exists() else f"failed: {done.stderr[-2000:]}"


def products_per_second(torch: Any, device: int, seconds: float) -> float:
    """Returns: bf16 products of MATRIX x MATRIX a second, as a prefill's."""
    a, b = (torch.randn(MATRIX, MATRIX, dtype=torch.bfloat16, device=f"cuda:{device}") for _ in range(2))
    for _ in range(10):
        a @ b
    torch.cuda.synchronize(device)
    began_s, count = time.perf_counter(), 0
    while time.perf_counter() - began_s < seconds:
        for _ in range(20):
            a @ b
        torch.cuda.synchronize(device)
        count += 20
    return count / (time.perf_counter() - began_s)


def places(block_bytes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns: offsets in source and target pool of MOVED_BYTES in scattered blocks."""
    rng, count = np.random.default_rng(seed), MOVED_BYTES // block_bytes
    slots = POOL_BYTES // block_bytes
    return tuple((rng.permutation(slots)[:count] * block_bytes).astype(np.uint64) for _ in range(2))  # type: ignore[return-value]


def digest_seconds(gpu: Gpu, pool: int) -> float:
    """Returns: time to checksum MOVED_BYTES in blocks of 32 KiB that lie in 32 layers."""
    offsets = np.random.default_rng(5).permutation(POOL_BYTES // 32 >> 15)[:1024].astype(np.uint64) << np.uint64(15)
    mover, taken = BlockMover(gpu), []
    for _ in range(ROUNDS):
        began_s = time.perf_counter()
        mover.digest(pool, offsets, 32 << 10, 7, planes(0, np.arange(32) * (POOL_BYTES // 32), np.arange(32) * 4096))
        taken.append(time.perf_counter() - began_s)
    mover.close()
    return statistics.median(taken)


def copy_speed(mover: BlockMover, source: int, target: int, block_bytes: int) -> float:
    """Returns: GB/s of MOVED_BYTES."""
    taken = []
    for round_number in range(ROUNDS):
        offsets = places(block_bytes, round_number)
        began_s = time.perf_counter()
        mover.copy(source, target, *offsets, block_bytes)
        taken.append(time.perf_counter() - began_s)
    return MOVED_BYTES / statistics.median(taken) / 1e9


def one_piece_speed(gpu: Gpu, source: int, target: int) -> float:
    """Returns: GB/s of cudaMemcpyAsync, the driver's copy engine."""
    stream, taken = Stream(gpu), []
    for _ in range(ROUNDS):
        began_s = time.perf_counter()
        gpu.call("cuMemcpyAsync", c_ulonglong(target), c_ulonglong(source), c_size_t(MOVED_BYTES), stream.handle)
        stream.wait()
        taken.append(time.perf_counter() - began_s)
    return MOVED_BYTES / statistics.median(taken) / 1e9


def check(gpu: Gpu, mover: BlockMover, source: int, target: int, block_bytes: int) -> None:
    """Compare each tenth block that was copied."""
    offsets = places(block_bytes, 1)
    mover.copy(source, target, *offsets, block_bytes)
    for one, other in zip(*(o[::10][:200] for o in offsets), strict=True):
        if gpu.read(source + int(one), block_bytes) != gpu.read(target + int(other), block_bytes):
            raise SystemExit(f"blocks of {block_bytes} bytes differ")


def load_cost(
    pipe: Connection, torch: Any, mover: BlockMover, source: int, target: int, block_bytes: int
) -> dict[str, float]:
    """Returns: what is left of each GPU's matrix products a second beside copies of blocks without a pause, and their speed."""
    found: dict[str, float] = {}
    moved = [0, 0.0]

    def copies(is_over: threading.Event) -> None:
        offsets = places(block_bytes, 1)
        began_s = time.perf_counter()
        while not is_over.is_set():
            mover.copy(source, target, *offsets, block_bytes)
            moved[0] += MOVED_BYTES
        moved[1] += time.perf_counter() - began_s

    def products(on: str) -> float:
        if on == "target":
            return products_per_second(torch, 1, LOAD_S)
        pipe.send(LOAD_S)
        return float(pipe.recv())

    for on in ("source", "target"):
        moved[:] = [0, 0.0]
        ratios = []
        for _ in range(LOAD_TURNS):  # in turns: a GPU under load grows slower by itself
            alone, is_over = products(on), threading.Event()
            thread = threading.Thread(target=copies, args=(is_over,))
            thread.start()
            beside = products(on)
            is_over.set()
            thread.join()
            ratios.append(beside / ((alone + products(on)) / 2))
        found[f"{on}_speed_left"] = round(statistics.median(ratios), 4)
        found[f"{on}_copy_gb_s"] = round(moved[0] / moved[1] / 1e9, 1)
    return found


def engines(pipe: Connection, torch: Any, gpu: Gpu, source: int, target: int) -> dict[str, Any]:
    """Returns: by KiB of a block the speed of the kernel and of the copy engines, alone and beside products on either GPU."""
    found: dict[str, Any] = {}
    for name, engine_bytes in (("kernel", 1 << 60), ("engines", 0)):
        mover = BlockMover(gpu, engine_bytes=engine_bytes)
        for kib in (64, 256, 1024, 4096):
            check(gpu, mover, source, target, kib << 10)
            row = {"copy_gb_s": round(copy_speed(mover, source, target, kib << 10), 1)}
            found[f"{name} {kib}"] = row | load_cost(pipe, torch, mover, source, target, kib << 10)
            sys.stdout.write(f"{name} {kib} KiB: {found[f'{name} {kib}']}\n")
        mover.close()
    return found


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns: the flags. Raises: ConfigError: one is wrong, or this machine has not got two GPUs and a PyTorch for them."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--hand-overs", action="store_true", help="these alone")
    parser.add_argument(
        "--backend",
        choices=("ipc", "nccl"),
        default="ipc",
        help="that hands over: ipc, or nccl (NCCL_P2P_DISABLE=1 NCCL_SHM_DISABLE=1: by sockets)",
    )
    args = parser.parse_args(argv)
    check_output(args.json)
    need_gpus("this benchmark", 2)
    try:
        import torch
    except ImportError as error:
        raise ConfigError(f"this benchmark needs PyTorch for CUDA: {error}; pip install torch") from error
    if not torch.cuda.is_available():
        raise ConfigError(f"this benchmark needs PyTorch for CUDA; PyTorch {torch.__version__} cannot use a GPU here")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Returns: 0. Raises: ConfigError: see `parse`."""
    args = parse(argv)
    pipe, _ = child.start(source_process)
    handle, offset = pipe.recv()
    import torch

    gpu = Gpu(1)
    source, target = gpu.open(handle) + offset, gpu.allocate(POOL_BYTES)
    result: dict[str, Any] = {
        "one_piece_gb_s": one_piece_speed(gpu, source, target),
        "scattered_gb_s": {},
        "beside": {},
    }
    for ctas in () if args.hand_overs else CTAS:
        mover = BlockMover(gpu, ctas, max_blocks=1 << 18, engine_bytes=1 << 60)
        row = {}
        for kib in BLOCKS_KIB:
            if ctas == CTAS[-1]:
                check(gpu, mover, source, target, kib << 10)
            row[kib] = round(copy_speed(mover, source, target, kib << 10), 1)
        result["scattered_gb_s"][ctas] = row
        sys.stdout.write(f"{ctas:4} CTAs " + " ".join(f"{kib} KiB {speed}" for kib, speed in row.items()) + "\n")
        if ctas in (16, 32):
            result["beside"][ctas] = load_cost(pipe, torch, mover, source, target, 32 << 10)
            sys.stdout.write(f"     {result['beside'][ctas]}\n")
        sys.stdout.flush()
        mover.close()
    if not args.hand_overs:
        result["engines"] = engines(pipe, torch, gpu, source, target)
    result["digest_s"] = {"target": digest_seconds(gpu, target)}
    gpu.free(target)
    result["nixl_gb_s"] = nixl_speeds()
    sys.stdout.write(f"NIXL: {result['nixl_gb_s']}\n")
    layouts = hand_over_layouts()
    for is_checked, name in ((True, "hand_over"), (False, "without_checksums"))[: 2 if args.backend == "ipc" else 1]:
        result[name] = {k: hand_over_speed(pipe, gpu, lay, is_checked, args.backend) for k, lay in layouts.items()}
        sys.stdout.write(f"{name} {result[name]}\n")
    if args.backend == "ipc":
        result["paced_speed_left"] = {kib: paced_cost(pipe, gpu, layouts[kib]) for kib in (8, 64)}
        sys.stdout.write(f"the source keeps, at {PACE_GB_S:g} GB/s: {result['paced_speed_left']}\n")
    pipe.send("digest")
    result["digest_s"]["source"] = pipe.recv()
    sys.stdout.write(f"one piece {result['one_piece_gb_s']:.0f} GB/s; digests of 1 GiB {result['digest_s']}\n")
    if args.json:
        write_json(args.json, result)
    pipe.send(None)
    return 0


if __name__ == "__main__":
    sys.exit(ended(lambda: child.watched(main)))
