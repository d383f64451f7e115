"""Simulations in processes of their own, so that several run at once and each can be measured; what they say, in tables."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any, TypeVar

from fastdeploy_pd.sim import main as simulator
from fastdeploy_pd.sim.plan import highest_between
from fastdeploy_pd.sim.progress import Progress

T = TypeVar("T")
Row = dict[str, Any]
GOAL = 0.9  # share of the requests that are in time at a rate which is held
RATE_ERROR = 0.005  # of the highest such rate


def simulate(flags: Sequence[str]) -> Row:
    """Returns: what `fastdeploy-pd simulate` reports with these flags, one --rate among them, but for its instances; and what it took.

    `wall_s` and `cpu_s` include reading the trace and reporting; `most_bytes` is this process's most resident memory.
    """
    parser = argparse.ArgumentParser()
    simulator.add_flags(parser)
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    args = parser.parse_args(flags)
    (args.rate,) = args.rate
    found = simulator.simulate(args)
    taken = {"wall_s": time.perf_counter() - wall_s, "cpu_s": time.process_time() - cpu_s}
    return {
        **{name: value for name, value in found.items() if name not in ("flags", "instances")},
        **taken,
        "most_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def held_rate(flags: Sequence[str], row: Row) -> float | None:
    """Returns: the rate up to which GOAL of the requests are in time, by bisection within a row of `by_rate`; None: it is not within."""
    missed = next((n for n, share in enumerate(row["shares"]) if share < GOAL), 0)
    if not missed:
        return None

    def holds(rate: float) -> bool:
        return bool(simulate([*flags, "--rate", str(rate)])["slo_attainment"] >= GOAL)

    return highest_between(holds, row["rates"][missed - 1], row["rates"][missed], RATE_ERROR)


def run_all(label: str, calls: Sequence[Callable[[], T]], jobs: int) -> list[T]:
    """Call each in another process, so many at once; stderr says how far it is. Returns: what they return, in order."""
    context = multiprocessing.get_context("spawn")
    with Progress(label, len(calls)) as progress, ProcessPoolExecutor(jobs, context, _hush) as pool:
        found: list[T] = []
        for result in pool.map(_call, calls):
            found.append(result)
            progress.reach(len(found))
    return found


def run_each(calls: Sequence[Callable[[], T]]) -> list[T]:
    """Call each in a fresh process, one after the other, which says on stderr how far it is: for what is measured."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        return list(pool.map(_call, calls))


def _call(function: Callable[[], T]) -> T:
    return function()


def _hush() -> None:
    sys.stderr = open(os.devnull, "w")  # several would write their progress over each other


def by_rate(label: str, named: Mapping[str, Sequence[str]], rates: Sequence[float], jobs: int) -> list[Row]:
    """Returns: a row for each of the named flags with `shares`, of the requests that are in time, rate by rate."""
    calls = [partial(simulate, [*flags, "--rate", str(rate)]) for flags in named.values() for rate in rates]
    shares = iter([run["slo_attainment"] for run in run_all(label, calls, jobs)])
    return [{"name": name, "rates": list(rates), "shares": [next(shares) for _ in rates]} for name in named]


def add_held(label: str, named: Mapping[str, Sequence[str]], rows: Sequence[Row], jobs: int) -> None:
    """Add to each row of `by_rate` what `held_rate` says, as `held`."""
    calls = [partial(held_rate, named[row["name"]], row) for row in rows]
    for row, held in zip(rows, run_all(label, calls, jobs), strict=True):
        row["held"] = held


def held_text(row: Row) -> str:
    """Returns: a row's `held` for a table."""
    if row["held"] is not None:
        return f"{row['held']:.2f}"
    return f"< {row['rates'][0]:g}" if row["shares"][0] < GOAL else f"> {row['rates'][-1]:g}"


def percent(share: float, digits: int = 1) -> str:
    """Returns: a share of all as in "99.9"."""
    return f"{100 * share:.{digits}f}"


def spread(summary: Mapping[str, float | None], digits: int) -> str:
    """Returns: "p50 / p90 / p99" of a report's summary."""
    return " / ".join(f"{summary[p] or 0.0:.{digits}f}" for p in ("p50", "p90", "p99"))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns: Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("|" + "|".join(f" {cell} " if cell else " " for cell in line) + "|" for line in lines)
