"""`fastdeploy-pd calibrate`: the step times of an engine, found from what its requests took, without access to its device.

A log of requests says when each arrived, got its first and its last token. Steps are not in it, so the formulas' coefficients are those
with which a simulated instance, under the same limits and the same arrivals, gives the requests the same times: a search over
simulations. It looks at one half of the requests; the errors that are told are the other half's.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdeploy_pd.core.placement import FewestTokens
from fastdeploy_pd.core.predictor import Predictor
from fastdeploy_pd.errors import ConfigError
from fastdeploy_pd.machine import check_output, write_json
from fastdeploy_pd.sim.cluster import Cluster, ClusterOptions, Record
from fastdeploy_pd.sim.fields import json_object, number, reason, whole
from fastdeploy_pd.sim.latency import from_coefficients
from fastdeploy_pd.sim.main import check_link, check_positive, parse_layout
from fastdeploy_pd.sim.report import summary, tpot_s
from fastdeploy_pd.sim.trace import UNREADABLE, Offered, opened

SPLITS: dict[str, Callable[[int, int], bool]] = {
    "alternate": lambda number, total: number % 2 == 0,
    "first-half": lambda number, total: number < total / 2,
}  #: which requests are fitted to: (number of a request, how many there are)
START = (1e-10, 1e-4, 1e-2, 1e-7, 1e-4, 1e-2)  #: a, b, c, d, e, f before anything is known, in seconds
STEPS = (
    0.2,
    0.05,
    0.01,
)  # of a coefficient's logarithm, to see what it does to times; they jump where a request misses a step
MAX_MOVE = 2.0  # of a coefficient's logarithm at once
MAX_ROUNDS = 20
TOLERANCE = 0.01  # of the squared errors, that a round must mend for another one to follow
LEAST_S = 1e-6  # a time, for its logarithm


@dataclass(frozen=True, slots=True)
class Measured:
    """One served request; seconds on the engine's clock, the first arrival at 0."""

    offered: Offered
    first_token_s: float
    last_token_s: float

    @property
    def ttft_s(self) -> float:
        """Arrival to the first token."""
        return self.first_token_s - self.offered.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time of a token after the first; None: there is none."""
        return tpot_s(self.offered, self.first_token_s, self.last_token_s)


def load(path: Path) -> list[Measured]:
    """Read a log of vLLM's request times, a JSON object a line, gzipped or not, as LLMServingSim's `bench run` writes it.

    Fields: input_toks, output_toks; arrival_time, on the front end's clock; queued_ts, first_token_ts, last_token_ts, on the engine's. The
    request that was queued soonest after its arrival tells how far the clocks are apart.
    Returns: in order of arrival.
    Raises: ConfigError: it cannot be read, a line is wrong, or there are fewer than ten.
    """
    rows = []
    try:
        with opened(path) as file:
            for place, line in enumerate(file, 1):
                try:
                    rows.append(_row(json_object(line)))
                except ValueError as error:
                    raise ConfigError(f"--requests {path} line {place} {error}") from error
    except UNREADABLE as error:
        raise ConfigError(f"--requests {path} {reason(error)}") from error
    if len(rows) < 10:
        raise ConfigError(f"--requests {path} has {len(rows)} requests; at least 10 are needed")
    rows.sort()
    between_s = min(queued - arrival for arrival, _, _, queued, _, _ in rows)
    zero_s, first_s = rows[0][0] + between_s, rows[0][0]
    return [
        Measured(Offered(n, arrival - first_s, num_input, num_output), first - zero_s, last - zero_s)
        for n, (arrival, num_input, num_output, _, first, last) in enumerate(rows)
    ]


def _row(line: dict[str, Any]) -> tuple[float, int, int, float, float, float]:
    arrival, queued, first, last = (
        number(line, name) for name in ("arrival_time", "queued_ts", "first_token_ts", "last_token_ts")
    )
    num_input, num_output = whole(line, "input_toks", 1), whole(line, "output_toks", 1)
    if not queued <= first <= last:
        raise ValueError(
            f"has queued_ts {queued}, first_token_ts {first}, last_token_ts {last}; none must be before the one before it"
        )
    return arrival, num_input, num_output, queued, first, last


def replay(measured: Sequence[Measured], predictor: Predictor, options: ClusterOptions) -> list[Record]:
    """Returns: [len(measured)] what simulated instances make of the same requests."""
    latency = from_coefficients(predictor.prefill, predictor.decode)
    return Cluster(options, latency, FewestTokens(), random.Random(0)).run([m.offered for m in measured])


def fit(
    measured: Sequence[Measured], options: ClusterOptions, is_used: Callable[[int, int], bool]
) -> tuple[Predictor, int]:
    """Search the coefficients with which the used requests' times come out.

    Returns: the predictor, and how many simulations it took.
    """
    used = [n for n in range(len(measured)) if is_used(n, len(measured))]
    num_runs = 0

    def residuals(logs: Sequence[float]) -> list[float]:
        nonlocal num_runs
        num_runs += 1
        records = replay(measured, _predictor(logs), options)
        return [
            math.log(max(simulated, LEAST_S) / max(real, LEAST_S))
            for n in used
            for simulated, real in zip(_times(records[n]), (measured[n].ttft_s, measured[n].tpot_s), strict=True)
            if simulated is not None and real is not None
        ]

    logs = [math.log(x) for x in START]
    for step in STEPS:
        logs = least_squares(residuals, logs, step)
    return _predictor(logs), num_runs


def _predictor(logs: Sequence[float]) -> Predictor:
    a, b, c, d, e, f = (math.exp(x) for x in logs)
    return Predictor((a, b, c), (d, e, f))


def _times(record: Record) -> tuple[float, float | None]:
    """Returns: TTFT and TPOT in seconds."""
    assert record.first_token_s is not None and record.end_s is not None
    offered = record.offered
    return record.first_token_s - offered.arrival_s, tpot_s(offered, record.first_token_s, record.end_s)


def least_squares(
    residuals: Callable[[Sequence[float]], list[float]], start: Sequence[float], step: float
) -> list[float]:
    """Returns: near `start` where the sum of the squared residuals is smallest, by slopes over `step` (Levenberg, Marquardt)."""
    point, found, damping = list(start), residuals(start), 1e-2
    size = len(point)
    for _ in range(MAX_ROUNDS):
        columns = [residuals([x + (step if i == j else 0.0) for j, x in enumerate(point)]) for i in range(size)]
        slopes = [[(new - old) / step for new, old in zip(column, found, strict=True)] for column in columns]
        matrix = [[_dot(u, v) for v in slopes] for u in slopes]
        gradient = [_dot(u, found) for u in slopes]
        cost = _dot(found, found)
        while damping < 1e6:
            damped = [
                [v + (damping * (v + 1e-6) if i == j else 0.0) for j, v in enumerate(r)] for i, r in enumerate(matrix)
            ]
            moves = [min(MAX_MOVE, max(-MAX_MOVE, x)) for x in solve(damped, gradient)]
            tried = [x - move for x, move in zip(point, moves, strict=True)]
            new = residuals(tried)
            if _dot(new, new) < cost:
                break
            damping *= 5
        else:
            return point
        point, found, damping = tried, new, max(damping / 5, 1e-4)
        if _dot(found, found) > cost * (1 - TOLERANCE):
            return point
    return point


def _dot(u: Sequence[float], v: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(u, v, strict=True))


def solve(matrix: Sequence[Sequence[float]], right: Sequence[float]) -> list[float]:
    """Returns: x of matrix x = right, the matrix being symmetric and positive definite (Gauss elimination)."""
    rows = [[*row, y] for row, y in zip(matrix, right, strict=True)]
    for i, pivot in enumerate(rows):
        for j, row in enumerate(rows):
            if i != j:
                factor = row[i] / pivot[i]
                rows[j] = [x - factor * y for x, y in zip(row, pivot, strict=True)]
    return [row[-1] / row[i] for i, row in enumerate(rows)]


def compare(measured: Sequence[Measured], records: Sequence[Record]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Returns: for ttft_s and tpot_s: mean and percentiles that were measured, that were simulated, and the latter's relative error;
    None where no request has more than one token.
    """
    found = {}
    simulated: list[tuple[float | None, ...]] = list(zip(*(_times(r) for r in records), strict=True))
    real: tuple[list[float | None], list[float | None]] = ([m.ttft_s for m in measured], [m.tpot_s for m in measured])
    for name, one, other in zip(("ttft_s", "tpot_s"), real, simulated, strict=True):
        left, right = summary(one), summary(other)
        error = {key: _error(left[key], right[key]) for key in left}
        errors = [abs(e) for m, s in zip(one, other, strict=True) if (e := _error(m, s)) is not None]
        error["per_request"] = sum(errors) / len(errors) if errors else None
        found[name] = {"measured": left, "simulated": right, "error": error}
    return found


def _error(measured_s: float | None, simulated_s: float | None) -> float | None:
    """Returns: relative error; None: one of the two is not there."""
    if measured_s is None or simulated_s is None:
        return None
    return max(simulated_s, LEAST_S) / max(measured_s, LEAST_S) - 1


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `calibrate`."""
    add = parser.add_argument
    add("--requests", required=True, type=Path, metavar="FILE", help="a JSON object a request and line, .gz or not")
    add("--num-blocks", type=int, required=True, help="KV blocks of the engine")
    add("--block-size", type=int, default=16, help="tokens a KV block (default 16)")
    add("--max-num-seqs", type=int, default=256, help="most sequences in a step (default 256)")
    add("--max-num-batched-tokens", type=int, default=2048, help="most tokens of prompts in a step (default 2048)")
    add("--layout", default="1M", help="instances that served them, all alike, as in 1P1D (default 1M)")
    add("--kv-bytes-per-token", type=int, default=0, help="KV bytes of a token, where prefill instances send them")
    add("--kv-gb-per-s", type=float, default=50.0, help="10^9 bytes/s that a prefill instance can send (default 50)")
    add("--kv-latency-ms", type=float, default=1.0, help="from a hand-over's last byte to decode's start (default 1)")
    add("--fit-to", choices=sorted(SPLITS), default="alternate", help="the half that is fitted to (default alternate)")
    add("--json", type=Path, metavar="OUT", help="where the coefficients go, for `simulate --latency OUT`")


def run(args: argparse.Namespace) -> int:
    """Returns: exit status. Raises: ConfigError: a flag or a file is wrong."""
    check_positive(args, "num_blocks", "block_size", "max_num_seqs", "max_num_batched_tokens")
    check_link(args)
    check_output(args.json)
    measured = load(args.requests)
    options = ClusterOptions(
        kinds=parse_layout(args.layout),
        num_blocks=args.num_blocks,
        block_size=args.block_size,
        kv_bytes_per_token=args.kv_bytes_per_token,
        link_bytes_per_s=args.kv_gb_per_s * 1e9,
        link_latency_s=args.kv_latency_ms / 1e3,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        enable_prefix_caching=False,  # what the prompts have in common is not in the log
    )
    longest = max(m.offered.num_input + m.offered.num_output for m in measured)
    if longest > args.num_blocks * args.block_size:
        raise ConfigError(f"--num-blocks is {args.num_blocks}; a request of {longest} tokens does not fit into these")
    found = calibrate(measured, options, args.fit_to)
    sys.stdout.write(_table(found))
    if args.json:
        write_json(args.json, found)
    return 0


def calibrate(measured: Sequence[Measured], options: ClusterOptions, fit_to: str = "alternate") -> dict[str, Any]:
    """Returns: "prefill" [a, b, c] and "decode" [d, e, f] in seconds, and how well they foretell the requests they were not fitted to."""
    is_used = SPLITS[fit_to]
    predictor, num_runs = fit(measured, options, is_used)
    records = replay(measured, predictor, options)
    judged = [n for n in range(len(measured)) if not is_used(n, len(measured))]
    return {
        "prefill": list(predictor.prefill),
        "decode": list(predictor.decode),
        "fitted_to": fit_to,
        "simulations": num_runs,
        "judged_requests": len(judged),
        "judged": compare([measured[n] for n in judged], [records[n] for n in judged]),
    }


def _table(found: dict[str, Any]) -> str:
    lines = [
        f"T(n) = {found['prefill'][0]:.3g} n^2 + {found['prefill'][1]:.3g} n + {found['prefill'][2]:.3g} s",
        f"D(B, K) = {found['decode'][0]:.3g} K + {found['decode'][1]:.3g} B + {found['decode'][2]:.3g} s",
        "",
        f"the {found['judged_requests']} requests that were not fitted to:",
        f"{'':22}{'mean':>10}{'p50':>10}{'p90':>10}{'p99':>10}",
    ]
    for name, factor, unit in (("ttft_s", 1.0, "s"), ("tpot_s", 1e3, "ms")):
        parts = found["judged"][name]
        for part in ("measured", "simulated"):
            values = "".join(_cell(parts[part][k], factor, 10, ".3f") for k in ("mean", "p50", "p90", "p99"))
            lines.append(f"{name[:4].upper()} {part + ' ' + unit:17}{values}")
        errors = "".join(_cell(parts["error"][k], 1.0, 10, ".1%") for k in ("mean", "p50", "p90", "p99"))
        lines.append(f"{name[:4].upper()} {'error':17}{errors}")
    return "\n".join(lines) + "\n"


def _cell(value: float | None, factor: float, width: int, form: str) -> str:
    return f"{'-' if value is None else format(value * factor, form):>{width}}"
