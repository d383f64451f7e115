"""NIXL (UCX) from one GPU to another between two processes: what bench_ipc has beside itself.

    python -m benchmarks.peers.nixl_gpu --json out.json        (two GPUs with NVLink, PyTorch, nixl-cu13)

A process owns the source GPU, this one pulls, as bench_ipc does. The request's handle (descriptor lists and all) is made before the clock
starts, which a server cannot do; there are no checksums. After the last pull a sample of the blocks is compared.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import statistics
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

POOL_BYTES = 2 << 30
MOVED_BYTES = 1 << 30
BLOCKS_KIB = (8, 32, 64, 256)
ROUNDS = 4


def agent_of(name: str, device: int) -> tuple[Any, Any]:
    """Returns: (an agent, its pool on a GPU), the pool registered. Raises: ImportError: no NIXL or no PyTorch."""
    import torch
    from nixl_cu13._api import nixl_agent, nixl_agent_config

    torch.cuda.set_device(device)
    pool = torch.randint(0, 255, (POOL_BYTES,), dtype=torch.uint8, device=f"cuda:{device}")
    torch.cuda.synchronize()
    agent = nixl_agent(name, nixl_agent_config(backends=["UCX"]))
    agent.register_memory(pool)
    return agent, pool


def source_process(pipe: Connection) -> None:
    """Own GPU 0's pool; answer with its bytes where asked."""
    agent, pool = agent_of("source", 0)
    pipe.send((agent.get_agent_metadata(), pool.data_ptr()))
    while (asked := pipe.recv()) is not None:
        start, size = asked
        pipe.send(pool[start : start + size].cpu().numpy().tobytes())
    os._exit(0)  # without destructors, in which the library crashes


def pull_speed(agent: Any, peer: str, pool: Any, base: int, pipe: Connection, block_bytes: int) -> float:
    """Returns: GB/s of MOVED_BYTES, scattered on both sides if a block is less than all of it. Raises: RuntimeError."""
    rng, count = np.random.default_rng(block_bytes), MOVED_BYTES // block_bytes
    theirs, ours = (rng.permutation(POOL_BYTES // block_bytes)[:count] * block_bytes for _ in range(2))
    lists = [
        agent.get_xfer_descs([(start + place, block_bytes, device) for place in places.tolist()], mem_type="VRAM")
        for places, start, device in ((ours, pool.data_ptr(), 1), (theirs, base, 0))
    ]
    handle = agent.initialize_xfer("READ", *lists, peer)
    taken_s = []
    for _ in range(ROUNDS):
        began_s = time.perf_counter()
        state = agent.transfer(handle)
        while state == "PROC":
            state = agent.check_xfer_state(handle)
        taken_s.append(time.perf_counter() - began_s)
        if state != "DONE":
            raise RuntimeError(f"NIXL's transfer ended as {state}")
    agent.release_xfer_handle(handle)
    size = min(block_bytes, 1 << 20)
    for one, other in list(zip(theirs.tolist(), ours.tolist(), strict=True))[:: max(1, count // 16)]:
        pipe.send((one, size))
        if pipe.recv() != pool[other : other + size].cpu().numpy().tobytes():
            raise RuntimeError(f"a block of {block_bytes} bytes is not what was sent")
    return MOVED_BYTES / statistics.median(taken_s[1:]) / 1e9  # the first connects


def main() -> int:
    """Returns: 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    context = mp.get_context("spawn")
    pipe, other = context.Pipe()
    process = context.Process(target=source_process, args=(other,), daemon=True)
    process.start()
    agent, pool = agent_of("target", 1)
    metadata, base = pipe.recv()
    peer = agent.add_remote_agent(metadata)
    found = {"one piece": pull_speed(agent, peer, pool, base, pipe, MOVED_BYTES)}
    for kib in BLOCKS_KIB:
        found[f"{kib} KiB"] = pull_speed(agent, peer, pool, base, pipe, kib << 10)
    sys.stdout.write(f"NIXL, GB/s: { ({name: round(speed, 1) for name, speed in found.items()}) }\n")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    sys.stdout.flush()
    pipe.send(None)
    process.join(10)
    os._exit(0)


if __name__ == "__main__":
    main()
