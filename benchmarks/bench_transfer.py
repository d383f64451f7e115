"""Speed of the KV transfers beside what others would use, every one in the same run and turn by turn, so that noise hits all alike.

    python -m benchmarks.bench_transfer --json out.json

loopback  1 GiB between two processes, in one piece and as scattered blocks: tcp and shm, a plain socket, one thread's copy, Mooncake, NIXL
connect   two processes that never spoke, until the first block has arrived
rdma      rdma_comm and `rdma` beside perftest: on this machine's NIC, or else in a virtual machine with soft-RoCE

Figures are medians. "landed": until the last byte has left the source for good, or has landed, as the source knows it; "arrived" (ours
alone): until the receiver has reported the epoch, with both sides' checksums computed, which is what a request waits for.
Peers that are not installed are listed with the command that installs them. Those that listen on all interfaces run in a network
namespace that has loopback alone; where none can be made they don't run. Everything runs on the first two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.checks import ended
from benchmarks.connect import connect_times
from benchmarks.job import Job, fill
from benchmarks.pair import MARK, Pair, marked
from benchmarks.peers import PEERS, perftest
from fastdeploy_pd.flags import Parser, integer
from fastdeploy_pd.machine import check_output, write_json

SECTIONS = ("loopback", "connect", "rdma")
CASES = {"one piece": False, "scattered": True}
OURS, OTHERS = ("tcp", "shm"), ("mooncake tcp", "nixl", "nixl UCX_TLS=tcp")
ALIKE = {
    "tcp": ("mooncake tcp", "nixl UCX_TLS=tcp"),
    "shm": ("nixl",),
}  # the same kind of way: a network, or one machine
AIM_BEYOND_PEERS, AIM_OF_PERFTEST, AIM_CONNECT_MS = 1.2, 0.95, 20.0
TURN_TIMEOUT_S = 300.0
NAMESPACE = 'ip link set lo up && exec "$@"'
Row = dict[str, Any]


def namespace_prefix() -> list[str]:
    """Returns: what to put before a command for it to see a loopback device and nothing else; [] if that can't be had."""
    prefix = ["unshare", "-n" if os.getuid() == 0 else "-rn", "sh", "-c", NAMESPACE, "sh"]
    try:
        is_possible = subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        is_possible = False
    return prefix if is_possible else []


# one turn: a process of its own


def turn(name: str, pool_bytes: int, block_bytes: int, repeats: int, seed: int) -> None:
    """Print one way's figures of one turn: by case, lists of GB/s landed and arrived. One more job before each case warms up."""
    try:
        pair = Pair(name, pool_bytes, block_bytes)
    except ImportError as error:
        sys.stdout.write(MARK + json.dumps({"absent": str(error)}) + "\n")
        return
    figures: dict[str, list[tuple[float, float]]] = {}
    for case, is_scattered in CASES.items():
        figures[case] = []
        for number in range(repeats + 1):
            seed += 1
            job = Job(pool_bytes, block_bytes, is_scattered, seed)
            landed_s, arrived_s = pair.move(job)
            if number:
                figures[case].append((pool_bytes / landed_s / 1e9, pool_bytes / arrived_s / 1e9))
        pair.check(job)
    sys.stdout.write(MARK + json.dumps(figures) + "\n")
    sys.stdout.flush()
    pair.close()
    os._exit(0)  # NIXL's destructors crash at an interpreter's end


def copy_turn(pool_bytes: int, block_bytes: int, repeats: int, seed: int) -> dict[str, list[tuple[float, float]]]:
    """Returns: as `turn` prints: one thread that copies memory to memory."""
    source, target = np.zeros(pool_bytes, np.uint8), np.zeros(pool_bytes, np.uint8)
    fill(source)
    figures: dict[str, list[tuple[float, float]]] = {}
    for case, is_scattered in CASES.items():
        local, remote, size = Job(pool_bytes, block_bytes, is_scattered, seed).pieces()
        figures[case] = []
        for number in range(repeats + 1):
            began_s = time.perf_counter()
            for start, goal in zip(local.tolist(), remote.tolist(), strict=True):
                target[goal : goal + size] = source[start : start + size]
            speed = pool_bytes / (time.perf_counter() - began_s) / 1e9
            if number:
                figures[case].append((speed, speed))
    return figures


# the measuring process


def loopback(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns: {rows, absent, load}: every way's medians, GB/s."""
    prefix, absent = namespace_prefix(), {}
    found: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    names = ["copy", "socket", *OURS, *OTHERS]
    sizes = (arguments.pool_mib << 20, arguments.block_kib << 10)
    loads = [os.getloadavg()[0]]
    for number in range(arguments.rounds):
        for name in names:
            if name in absent:
                continue
            if name == "copy":
                figures: dict[str, Any] = copy_turn(*sizes, arguments.repeats, number)
            elif PEERS[name].is_foreign and not prefix:
                figures = {"absent": "no network namespace can be made (unshare, as root or with user namespaces)"}
            else:
                call = ["--turn", name, *map(str, (*sizes, arguments.repeats, 1000 * number))]
                figures = call_turn(prefix, call)
            if "absent" in figures:
                absent[name] = f"{figures['absent']}; {PEERS[name].install}"
                continue
            for case, pairs in figures.items():
                found[name, case] += pairs
        loads.append(os.getloadavg()[0])
    medians = {key: tuple(statistics.median(x) for x in zip(*pairs, strict=True)) for key, pairs in found.items()}
    return {"rows": loopback_rows(names, medians), "absent": absent, "load": loads, "raw": {
        f"{name}, {case}": pairs for (name, case), pairs in found.items()}}  # fmt: skip


def call_turn(prefix: list[str], call: list[str]) -> dict[str, Any]:
    """Returns: what a turn printed. Raises: RuntimeError: it has failed; with its last words."""
    command = [*prefix, sys.executable, "-m", "benchmarks.bench_transfer", *call]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TURN_TIMEOUT_S, check=False)
    if done.returncode:
        raise RuntimeError(f"{call[1]} ended with {done.returncode}:\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
    return marked(done.stdout)


def loopback_rows(names: list[str], medians: dict[tuple[str, str], tuple[float, ...]]) -> list[Row]:
    """Returns: one row a case and way; landed over the best of Mooncake and NIXL in that case: of all of them, of those alike."""
    rows = []
    for case in CASES:

        def over_best(own: str, others: tuple[str, ...], case: str = case) -> float | None:
            speeds = [medians[name, case][0] for name in others if (name, case) in medians]
            return medians[own, case][0] / max(speeds) if speeds else None

        for name in names:
            if (name, case) not in medians:
                continue
            row: Row = {"case": case, "name": name, "landed": medians[name, case][0]}
            if name in OURS:
                row["arrived"] = medians[name, case][1]
                row["over_peers"], row["over_alike"] = over_best(name, OTHERS), over_best(name, ALIKE[name])
            row["over_socket"] = over_best(name, ("socket",))
            rows.append(row)
    return rows


def connects(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns: by backend, milliseconds: median and P99."""
    return {name: summary_ms(connect_times(name, arguments.connects)) for name in OURS}


def summary_ms(times_s: list[float]) -> dict[str, float]:
    """Returns: milliseconds: median and P99 of so many."""
    return {
        "count": len(times_s), "p50_ms": 1e3 * float(np.percentile(times_s, 50)), "p99_ms": 1e3 * float(np.percentile(times_s, 99))
    }  # fmt: skip


def rdma(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns: {where, rows, connect}, or {absent}."""
    from rdma_comm.devices import list_nics

    call = ("--rounds", str(arguments.rounds), "--connects", str(arguments.connects))
    if any(nic.active_port for nic in list_nics()):
        if missing := perftest.missing():
            return {"absent": missing}
        command = [sys.executable, "-m", "benchmarks.rdma_inside", *call, "--mib", str(arguments.pool_mib)]
        where, printed = "this machine", subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    else:
        try:
            import pytest

            from tests.rdma.conftest import run_in_vm

            where, printed = "soft-RoCE, emulated machine", run_in_vm("benchmarks.rdma_inside", *call, timeout_s=1800)
        except ImportError as error:
            return {"absent": f"{error}; pip install -r requirements-test.txt"}
        except pytest.skip.Exception as reason:
            return {"absent": f"{reason}, and {perftest.INSTALL}"}
    found = marked(printed)
    if "absent" in found:
        return found
    rows = [rdma_row(int(size), figures) for size, figures in found["rounds"].items()]
    return {
        "where": where, "rows": rows, "raw": found["rounds"],
        "connect": {name: summary_ms(times_s) for name, times_s in found["connect"].items()},
    }  # fmt: skip


def rdma_row(size: int, figures: dict[str, list[float]]) -> Row:
    """Returns: medians of one message size; ratios are medians of each round's ratio; 0 where there is no figure."""
    row: Row = {"bytes": size}
    for (
        name,
        values,
    ) in figures.items():  # in a busy emulated machine perftest has printed 0: no figure
        row[name] = statistics.median([value for value in values if value] or [0.0])

    def ratio(name: str, reference: str) -> float:
        pairs = [(a, b) for a, b in zip(figures[name], figures[reference], strict=True) if b]
        return statistics.median([a / b for a, b in pairs] or [0.0])

    for name in ("write", "read"):
        row[f"{name} over ib_{name}_bw"] = ratio(f"{name} contiguous", f"ib_{name}_bw")
        row[f"{name} scattered over contiguous"] = ratio(f"{name} scattered", f"{name} contiguous")
    row["transfer over ib_read_bw"] = ratio("transfer contiguous", "ib_read_bw")
    row["transfer scattered over contiguous"] = ratio("transfer scattered", "transfer contiguous")
    return row


# tables


def loopback_table(results: dict[str, Any]) -> list[str]:
    """Returns: lines for a person."""
    names = ("landed", "arrived", "over_peers", "over_alike", "over_socket")
    lines = [
        "GB/s; landed over the best of Mooncake and NIXL "
        f"(aim {AIM_BEYOND_PEERS} for one of ours), over the best that is alike (a network, or one machine), over the socket",
        f"{'':28}" + "".join(f"{name:>13}" for name in names),
    ]
    for row in results["rows"]:
        cells = (f"{row[name]:13.2f}" if row.get(name) else " " * 13 for name in names)
        lines.append(f"{row['case']:10} {row['name']:17}" + "".join(cells))
    return lines + [f"absent: {name}: {reason}" for name, reason in results["absent"].items()]


def connect_table(results: dict[str, Any]) -> list[str]:
    """Returns: lines for a person."""
    return [
        f"{name:5} {row['count']} fresh pairs: first block after {row['p50_ms']:.1f} ms, P99 {row['p99_ms']:.1f} ms (aim {AIM_CONNECT_MS:.0f})"
        for name, row in results.items()
    ]


def rdma_table(results: dict[str, Any]) -> list[str]:
    """Returns: lines for a person."""
    if "absent" in results:
        return [f"absent: rdma: {results['absent']}"]
    names = list(results["rows"][0])
    lines = [
        f"{results['where']}: MB/s, us, ratios (aim {AIM_OF_PERFTEST} of perftest from 64 KiB; scattered 0.95 of contiguous)"
    ]
    for name in names:
        scale = 1e3 if " over " not in name and not name.endswith(" us") and name != "bytes" else 1
        cells = (f"{row[name] * scale:12.2f}" if name != "bytes" else f"{row[name]:12}" for row in results["rows"])
        lines.append(f"{name:36}" + "".join(cells))
    return lines + connect_table(results["connect"])


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print tables, write JSON. Returns: 0. Raises: ConfigError: a flag is wrong."""
    count = integer(1)
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument(
        "--only", choices=SECTIONS, action="append", help="measure this alone; may be given several times"
    )
    parser.add_argument("--rounds", type=count, default=5, help="turns of each way (default 5)")
    parser.add_argument("--repeats", type=count, default=3, help="jobs a case and turn (default 3)")
    parser.add_argument("--pool-mib", type=count, default=1024, help="bytes a job moves, in MiB (default 1024)")
    parser.add_argument(
        "--block-kib", type=count, default=64, help="bytes of a scattered block in a layer, in KiB (default 64)"
    )
    parser.add_argument("--connects", type=count, default=200, help="fresh pairs (default 200)")
    parser.add_argument("--turn", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.turn:
        turn(arguments.turn[0], *map(int, arguments.turn[1:]))
        return 0
    check_output(arguments.json)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    results: dict[str, Any] = {"num_cpus": len(os.sched_getaffinity(0)), "load": os.getloadavg()}
    sections = {
        "loopback": (loopback, loopback_table),
        "connect": (connects, connect_table),
        "rdma": (rdma, rdma_table),
    }
    for name in arguments.only or SECTIONS:
        measure, table = sections[name]
        results[name] = measure(arguments)
        sys.stdout.write("\n".join([f"-- {name}", *table(results[name])]) + "\n")
        sys.stdout.flush()
        if arguments.json:
            write_json(arguments.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(ended(main))
