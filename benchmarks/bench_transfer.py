"""Speed of the KV transfers between two processes of one machine, beside a plain socket and a plain copy in the same run.

    python benchmarks/bench_transfer.py --json out.json

One process sends scattered blocks of its pool, another receives them into scattered blocks of its own. Each figure is the median
of several epochs. "landed": until the last byte has left the source for good; "arrived": until the receiver has reported the epoch,
with both sides' checksums computed, which is what a request waits for.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fastdeploy_pd.core.layout import KVLayout
from fastdeploy_pd.transfer.base import EpochArrived, EpochSent, Transfer, TransferEvent
from fastdeploy_pd.transfer.layout import KVPool
from fastdeploy_pd.transfer.select import build

#: bytes of a block in one layer -> KV heads that make it so (64 tokens of 64 float32 each)
HEADS = {32 << 10: 1, 256 << 10: 8, 1 << 20: 32}
NUM_LAYERS = 4
CHUNK_BYTES = 1 << 20
TIMEOUT_S = 60.0


def layout_of(block_bytes: int, pool_bytes: int) -> KVLayout:
    """Returns: a layout of pool_bytes in blocks of block_bytes."""
    num_blocks = pool_bytes // NUM_LAYERS // block_bytes
    return KVLayout(NUM_LAYERS, num_blocks, HEADS[block_bytes], 64, 64, "float32")


def filled_pool(layout: KVLayout) -> KVPool:
    """Returns: a pool with every page touched."""
    pool = KVPool(layout)
    pool.array[:] = np.resize(np.random.default_rng(1).integers(0, 256, 1 << 20, dtype=np.uint8), layout.pool_bytes)
    return pool


def wait(transfer: Transfer) -> TransferEvent:
    """Returns: the transfer's next event. Raises: TimeoutError: none comes."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline_s:
        events = transfer.poll()
        if events:
            return events[0]
        time.sleep(0.0002)
    raise TimeoutError("the transfer reported nothing")


def say(**values: Any) -> None:
    """Tell the other process one line."""
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


# the receiving process


def receive_socket(num_bytes: int, repeats: int) -> None:
    """Take num_bytes over a plain connection, repeats times."""
    target = memoryview(bytearray(num_bytes))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        say(port=listener.getsockname()[1])
        connection, _ = listener.accept()
        with connection:
            for _ in range(repeats):
                taken = 0
                while taken < num_bytes:
                    taken += connection.recv_into(target[taken : taken + CHUNK_BYTES])
                connection.sendall(b"!")


def receive_epochs(backend: str, block_bytes: int, pool_bytes: int, repeats: int) -> None:
    """Open one epoch after the other, as told, and say when each has arrived."""
    layout = layout_of(block_bytes, pool_bytes)
    transfer = build(backend, pool=filled_pool(layout), layout=layout, fingerprint="bench")
    blocks = list(range(layout.num_blocks))
    for number in range(repeats):
        random.Random(number).shuffle(blocks)
        transfer.open_epoch(str(number), blocks, number)
        say(descriptor=transfer.descriptor(), blocks=blocks)
        event = wait(transfer)
        if not isinstance(event, EpochArrived):
            raise RuntimeError(f"{event}")
        say(digests=event.digests)
        transfer.revoke(str(number))
    sys.stdin.readline()
    transfer.close()


# the measuring process


def start_receiver(*arguments: str | int) -> subprocess.Popen[str]:
    """Returns: this program's other half."""
    command = [sys.executable, __file__, "--receive", *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def hear(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Returns: the receiver's next line."""
    if process.stdout is None:
        raise RuntimeError("the receiver was started without a pipe")
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"the receiver ended with {process.wait()}")
    values: dict[str, Any] = json.loads(line)
    return values


def measure_copy(num_bytes: int, repeats: int) -> float:
    """Returns: GB/s of one thread copying memory."""
    source, target = np.ones(num_bytes, np.uint8), np.zeros(num_bytes, np.uint8)
    times_s = []
    for _ in range(repeats):
        started_s = time.perf_counter()
        np.copyto(target, source)
        times_s.append(time.perf_counter() - started_s)
    return num_bytes / statistics.median(times_s) / 1e9


def measure_socket(num_bytes: int, repeats: int) -> float:
    """Returns: GB/s of one plain TCP connection on the loopback device, in pieces of 1 MiB."""
    process = start_receiver("socket", num_bytes, repeats)
    source = memoryview(bytearray(b"\x5a") * num_bytes)
    times_s = []
    with socket.create_connection(("127.0.0.1", hear(process)["port"])) as connection:
        for _ in range(repeats):
            started_s = time.perf_counter()
            for first in range(0, num_bytes, CHUNK_BYTES):
                connection.sendall(source[first : first + CHUNK_BYTES])
            connection.recv(1)
            times_s.append(time.perf_counter() - started_s)
    process.communicate()
    return num_bytes / statistics.median(times_s) / 1e9


def measure_transfer(backend: str, block_bytes: int, pool_bytes: int, repeats: int) -> dict[str, float]:
    """Returns: GB/s landed and arrived."""
    layout = layout_of(block_bytes, pool_bytes)
    transfer = build(backend, pool=filled_pool(layout), layout=layout, fingerprint="bench")
    process = start_receiver(backend, block_bytes, pool_bytes, repeats)
    local, landed_s, arrived_s = list(range(layout.num_blocks)), [], []
    for number in range(repeats):
        random.Random(-1 - number).shuffle(local)
        told = hear(process)
        started_s = time.perf_counter()
        transfer.start(str(number), number, told["descriptor"], told["blocks"])
        for layer in range(NUM_LAYERS):
            transfer.write(str(number), layer, local, told["blocks"])
        transfer.finish(str(number))
        sent = wait(transfer)
        if not isinstance(sent, EpochSent):
            raise RuntimeError(f"{sent}")
        if tuple(hear(process)["digests"]) != sent.digests:
            raise RuntimeError("the bytes that arrived are not those that were sent")
        arrived_s.append(time.perf_counter() - started_s)
        landed_s.append(sent.wire_s)
    transfer.close()
    process.communicate("\n")
    # The first epoch makes the connection and maps pages: what a pair pays once.
    figures = {"landed": landed_s[1:], "arrived": arrived_s[1:]}
    return {name: layout.pool_bytes / statistics.median(times_s) / 1e9 for name, times_s in figures.items()}


def run(pool_bytes: int, repeats: int) -> dict[str, Any]:
    """Returns: all figures, GB/s."""
    copy, plain = measure_copy(pool_bytes, repeats), measure_socket(pool_bytes, repeats)
    rows = []
    for backend, reference in (("tcp", plain), ("shm", copy)):
        for block_bytes in HEADS:
            figures = measure_transfer(backend, block_bytes, pool_bytes, repeats + 1)
            ratio = figures["landed"] / reference
            rows.append({"backend": backend, "block_bytes": block_bytes, **figures, "landed_over_reference": ratio})
    return {
        "pool_bytes": pool_bytes,
        "num_cpus": os.cpu_count(),
        "copy_gb_per_s": copy,
        "plain_socket_gb_per_s": plain,
        "transfers": rows,
    }


def table(results: dict[str, Any]) -> str:
    """Returns: the figures for a person."""
    lines = [
        f"one thread's copy {results['copy_gb_per_s']:.1f} GB/s, plain socket {results['plain_socket_gb_per_s']:.1f} GB/s",
        "backend  block KiB  landed GB/s  arrived GB/s  landed / (tcp: socket, shm: copy)",
    ]
    for row in results["transfers"]:
        lines.append(
            f"{row['backend']:7}  {row['block_bytes'] >> 10:9}  {row['landed']:11.2f}  {row['arrived']:12.2f}  "
            f"{row['landed_over_reference']:.2f}"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--pool-mib", type=int, default=256, help="bytes an epoch moves, in MiB (default 256)")
    parser.add_argument("--repeats", type=int, default=7, help="epochs a figure (default 7)")
    parser.add_argument("--receive", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.receive:
        name, *numbers = arguments.receive
        if name == "socket":
            receive_socket(*map(int, numbers))
        else:
            receive_epochs(name, *map(int, numbers))
        return
    results = run(arguments.pool_mib << 20, arguments.repeats)
    sys.stdout.write(table(results))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
