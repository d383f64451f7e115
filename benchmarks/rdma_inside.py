"""What bench_transfer measures where there is an RDMA device: rdma_comm and the `rdma` transfer beside perftest, turn by turn.

python -m benchmarks.rdma_inside --rounds 5        (two processes of this machine; prints one line of JSON)
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from typing import Any

import numpy as np

from benchmarks.connect import connect_times
from benchmarks.job import NUM_LAYERS, Job
from benchmarks.pair import MARK, Pair, claim_output
from benchmarks.peers import perftest
from rdma_comm.endpoint import Endpoint, Options, Region

SIZES = (4 << 10, 64 << 10, 256 << 10, 1 << 20)
TIMEOUT_S = 60.0


class End:
    """One process's endpoint, with a pool that the other may read and write."""

    def __init__(self, pool_bytes: int) -> None:
        self.endpoint = Endpoint(Options.from_environment(os.environ))
        self.pool = np.ones(pool_bytes, np.uint8)
        self.region: Region = self.endpoint.register(self.pool.ctypes.data, pool_bytes, self.pool, True)
        self.link = self.endpoint.connection("the other process")

    def offer(self) -> str:
        """Returns: a line for the other process."""
        return json.dumps(self.link.offer([self.region])) + "\n"

    def connect(self, line: str) -> None:
        """Join with the other process's offer."""
        self.link.connect([self.region], json.loads(line))


def partner(pool_bytes: int) -> None:
    """The passive process: offer a pool, until the input ends."""
    output, end = claim_output(), End(pool_bytes)
    output.write(end.offer())
    output.flush()
    end.connect(sys.stdin.readline())
    output.write("\n")
    output.flush()
    sys.stdin.read()


class Bench:
    """The measuring process."""

    def __init__(self, pool_bytes: int) -> None:
        self.pool_bytes = pool_bytes
        self.end = End(pool_bytes)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.rdma_inside", "--partner", str(pool_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": ":".join(p for p in sys.path if p)},
        )
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("the other process was started without pipes")
        self.end.connect(self._process.stdout.readline())
        self._process.stdin.write(self.end.offer())
        self._process.stdin.flush()
        self._process.stdout.readline()
        rail = self.end.endpoint.rails[0]
        self._device, self._gid_index = rail.nic.name, rail.gid.index
        self._pairs = {size: Pair("rdma", pool_bytes, size) for size in SIZES}
        self._seed = 0

    def round(self, size: int, num_bytes: int) -> dict[str, float]:
        """Returns: by name, GB/s of num_bytes in messages of one size (`*_us`: microseconds of one message)."""
        found: dict[str, float] = {}
        count = num_bytes // size
        for name in ("write", "read"):
            found[f"ib_{name}_bw"] = perftest.run(f"ib_{name}_bw", self._device, self._gid_index, size, max(5, count))
            for is_scattered in (False, True):
                found[f"{name} {'scattered' if is_scattered else 'contiguous'}"] = self._blocks(
                    name, size, count, is_scattered
                )
        for is_scattered in (False, True):
            self._seed += 1
            wire_s, _ = self._pairs[size].move(Job(self.pool_bytes, size, is_scattered, self._seed))
            found[f"transfer {'scattered' if is_scattered else 'contiguous'}"] = self.pool_bytes / wire_s / 1e9
        for name in ("write", "read"):
            found[f"ib_{name}_lat us"] = perftest.run(f"ib_{name}_lat", self._device, self._gid_index, size, 10)
            found[f"{name} us"] = 1e6 * float(np.median([self._one(name, size) for _ in range(10)]))
        return found

    def _one(self, name: str, size: int) -> float:
        places, sizes = np.zeros(1, np.int64), np.full(1, size, np.int64)
        began_s = time.perf_counter()
        getattr(self.end.link, name)(places, places, sizes, TIMEOUT_S)
        return time.perf_counter() - began_s

    def _blocks(self, name: str, size: int, count: int, is_scattered: bool) -> float:
        rng, slots = np.random.default_rng(self._seed), self.pool_bytes // size
        self._seed += 1
        orders = [rng.permutation(slots) if is_scattered else np.arange(slots) for _ in range(2)]
        local, remote = (order[:count] * size for order in orders)
        sizes = np.full(count, size, np.int64)
        began_s = time.perf_counter()
        getattr(self.end.link, name)(local, remote, sizes, TIMEOUT_S)
        return count * size / (time.perf_counter() - began_s) / 1e9

    def close(self) -> None:
        """End the other processes."""
        for pair in self._pairs.values():
            pair.close()
        self._process.communicate()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mib", type=int, default=16, help="bytes a figure, in MiB (default 16: for soft-RoCE)")
    parser.add_argument("--connects", type=int, default=200, help="fresh pairs (default 200)")
    parser.add_argument("--partner", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.partner:
        partner(arguments.partner)
        return
    pool_bytes = arguments.mib << 20
    if pool_bytes % (NUM_LAYERS * SIZES[-1]):
        parser.error(f"--mib {arguments.mib} must be a multiple of {NUM_LAYERS}")
    if missing := perftest.missing():
        sys.stdout.write(MARK + json.dumps({"absent": missing}) + "\n")
        return
    bench = Bench(pool_bytes)
    rounds: dict[int, dict[str, list[float]]] = {size: defaultdict(list) for size in SIZES}
    for number in range(arguments.rounds + 1):
        for size in SIZES:
            figures = bench.round(size, pool_bytes if size > SIZES[0] else pool_bytes // 2)
            if number:  # the first is a warm-up
                for name, figure in figures.items():
                    rounds[size][name].append(figure)
    bench.close()
    connects = {name: connect_times(name, arguments.connects) for name in ("rdma", "tcp")}
    results: dict[str, Any] = {"rounds": rounds, "connect": connects}
    sys.stdout.write(MARK + json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
