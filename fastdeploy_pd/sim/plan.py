"""`fastdeploy-pd plan`: the fewest GPUs, and the layout, chunk size and placement on them, that hold a rate; and how much more they would hold.

Numbers of GPUs are tried from the smallest on. Of the candidates with so many, those whose prefill instances cannot be enough are left
out by arithmetic; the others serve the beginning of the trace, the better half of them a piece four times as long, and so on until the
last ones have served all of it (successive halving: Jamieson and Talwalkar, AISTATS 2016). If one of these meets the goal, it is the
answer, and bisection finds the highest rate at which it still does.
"""

from __future__ import annotations

import argparse
import math
import random
import re
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastdeploy_pd.errors import ConfigError
from fastdeploy_pd.machine import check_output, write_json
from fastdeploy_pd.sim import baselines, latency, trace
from fastdeploy_pd.sim import main as simulator
from fastdeploy_pd.sim.cluster import ClusterOptions
from fastdeploy_pd.sim.latency import Latency
from fastdeploy_pd.sim.main import OURS, Policies
from fastdeploy_pd.sim.progress import Progress
from fastdeploy_pd.sim.report import Slo, report
from fastdeploy_pd.sim.trace import TRACE_BLOCK_TOKENS, Offered

FIRST_REQUESTS = 150  # that every candidate serves
GROWTH = 4  # how much longer the next piece is
FEWEST = 2  # candidates that stay to the end, if there are so many
LEEWAY = 0.15  # below the goal, that a candidate may be on a piece of the trace
RATE_ERROR = 0.02  # of the highest rate that is held
MOST_DOUBLINGS = 6
MOST_CANDIDATES = 50_000


@dataclass(frozen=True, slots=True, eq=False)
class Kind:
    """What an instance can be: a profile, and how many GPUs it takes."""

    name: str
    gpus: int
    times: Latency
    num_blocks: int
    kv_bytes_per_token: int


@dataclass(frozen=True, slots=True)
class Candidate:
    """A cluster that may do."""

    kind: Kind
    layout: str  #: as in "PPD"
    placement: str
    prefill_policy: str
    max_num_batched_tokens: int

    @property
    def gpus(self) -> int:
        """How many it takes."""
        return self.kind.gpus * len(self.layout)

    @property
    def name(self) -> str:
        """Its layout as `simulate --layout` takes it."""
        return "".join(f"{self.layout.count(k)}{k}" for k in "PDM" if k in self.layout)


@dataclass(frozen=True, slots=True)
class Result:
    """How a candidate did on the first requests."""

    candidate: Candidate
    num_requests: int
    attainment: float
    ttft_p90_s: float

    def row(self) -> dict[str, Any]:
        """Returns: what the JSON file says of it."""
        c = self.candidate
        return {
            "gpus": c.gpus, "layout": c.name, "profile": c.kind.name, "placement": c.placement,
            "prefill_policy": c.prefill_policy,
            "max_num_batched_tokens": c.max_num_batched_tokens, "requests": self.num_requests,
            "slo_attainment": self.attainment, "ttft_p90_s": self.ttft_p90_s,
        }  # fmt: skip


class Planner:
    """Searches; `search` once, then `highest_rate`."""

    def __init__(
        self,
        offered: Sequence[Offered],
        slo: Slo,
        goal: float,
        base: ClusterOptions,
        seed: int = 0,
        known: Policies = OURS,
    ) -> None:
        """
        Args:
            offered: at the rate that is to be held.
            goal: share of the requests that must meet the SLO.
            base: what is the same in all candidates.
        """
        self._offered, self._slo, self._goal, self._base, self._seed = offered, slo, goal, base, seed
        self._known = known
        self.results: dict[Candidate, Result] = {}  #: each candidate's longest run
        self.num_left_out = 0  #: by arithmetic
        self.num_runs = 0
        self._served_s: dict[Kind, float] = {}  # least prefill work that meets the goal

    def search(self, candidates: Sequence[Candidate], on_run: Callable[[Candidate], object]) -> Result | None:
        """Returns: the best of those with the fewest GPUs that meet the goal; None if none does."""
        for gpus in sorted({c.gpus for c in candidates}):
            group = [c for c in candidates if c.gpus == gpus]
            possible = [c for c in group if self._is_possible(c)]
            self.num_left_out += len(group) - len(possible)
            best = self._best(possible, on_run)
            if best is not None and best.attainment >= self._goal:
                return best
        return None

    def _best(self, group: Sequence[Candidate], on_run: Callable[[Candidate], object]) -> Result | None:
        size = min(FIRST_REQUESTS, len(self._offered))
        while group:
            results = []
            for candidate in group:
                on_run(candidate)
                results.append(self.serve(candidate, self._offered[:size]))
                self.results[candidate] = results[-1]
            results.sort(key=lambda r: (-r.attainment, r.ttft_p90_s))
            if size == len(self._offered):
                return results[0]
            kept = results[: max(FEWEST, -(-len(results) // 2))]
            group = [r.candidate for r in kept if r.attainment >= self._goal - LEEWAY]
            size = min(size * GROWTH, len(self._offered))
        return None

    def serve(self, candidate: Candidate, offered: Sequence[Offered]) -> Result:
        """Returns: how a candidate does on these requests."""
        options = replace(
            self._base,
            kinds=candidate.layout,
            num_blocks=candidate.kind.num_blocks,
            kv_bytes_per_token=candidate.kind.kv_bytes_per_token,
            max_num_batched_tokens=candidate.max_num_batched_tokens,
            prefill_policy=candidate.prefill_policy,
            is_predicted=simulator.predicts(candidate.placement, candidate.prefill_policy),
        )
        times, rng = candidate.kind.times, random.Random(self._seed)
        cluster = simulator.make_cluster(candidate.placement, options, times, self._slo, rng, self._known)
        found = report(cluster.run(offered), cluster.instances, times, self._slo)
        self.num_runs += 1
        return Result(candidate, len(offered), found["slo_attainment"], found["ttft_s"]["p90"] or 0.0)

    def highest_rate(self, candidate: Candidate, on_run: Callable[[Candidate], object]) -> float:
        """Returns: the highest rate, from that of `offered` on, at which a candidate meets the goal, to RATE_ERROR.

        Every rate that is tried is one that can be printed: at the rate that a reader sees the goal was met.
        """

        def holds(rate: float) -> bool:
            on_run(candidate)
            return self.serve(candidate, trace.at_rate(self._offered, rate)).attainment >= self._goal

        low = trace.own_rate(self._offered)
        high = printable(low * 1.25)
        for _ in range(MOST_DOUBLINGS):
            if not holds(high):
                break
            low, high = high, printable(high * 2)
        else:
            return low
        return highest_between(holds, low, high, RATE_ERROR, printable)

    def _is_possible(self, candidate: Candidate) -> bool:
        """Whether prefill is done in time if nothing else is computed, no cached block is ever lost, and the longest prompts fail."""
        served_s = self._served_s.get(candidate.kind)
        if served_s is None:
            works = sorted(prefill_works(self._offered, candidate.kind.times, self._base.enable_prefix_caching))
            served_s = self._served_s[candidate.kind] = sum(works[: int(self._goal * len(works))])
        num_prefills = sum(kind in "PM" for kind in candidate.layout)
        span_s = self._offered[-1].arrival_s + self._slo.ttft_x * candidate.kind.times.alone_s(
            max(o.num_input for o in self._offered)
        )
        return served_s <= span_s * (num_prefills or len(candidate.layout))


def highest_between(
    holds: Callable[[float], bool],
    low: float,
    high: float,
    error: float,
    rounded: Callable[[float], float] = lambda rate: rate,
) -> float:
    """Returns: by bisection, the highest rate that holds, to an error in shares of it; low holds, high does not.

    Args:
        rounded: a rate, or the next lower one that may be tried.
    """
    while high > low * (1 + error):
        middle = rounded((low * high) ** 0.5)
        if middle <= low:
            break
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def printable(rate: float) -> float:
    """Returns: a rate, rounded down to what is printed of it: two decimals, or three digits where these are more."""
    places = _num_places(rate)
    return float(f"{math.floor(rate * 10**places * (1 + 1e-12)) / 10**places:.{places}f}")


def rate_text(rate: float) -> str:
    """Returns: a printable rate as text, and any other, which was asked for or is the trace's own, with more digits."""
    text = f"{rate:.{_num_places(rate)}f}"
    return text if math.isclose(float(text), rate, rel_tol=1e-9) else f"{rate:.6g}"


def _num_places(rate: float) -> int:
    return max(2, 2 - math.floor(math.log10(rate)))


def prefill_works(offered: Sequence[Offered], times: Latency, finds_prefixes: bool) -> Iterator[float]:
    """Yields: seconds of each prompt's prefill if all blocks of all earlier prompts are cached."""
    seen: set[int] = set()
    for o in offered:
        num_cached = 0
        for hash_id in o.hash_ids:
            if hash_id not in seen:
                break
            num_cached += TRACE_BLOCK_TOKENS
        seen.update(o.hash_ids)
        start = min(num_cached, o.num_input - 1) if finds_prefixes else 0
        yield times.step_s([(start, o.num_input, True)], 0, 0)


def candidates_of(
    kinds: Sequence[Kind], gpus: int, policies: Sequence[tuple[str, str]], chunks: Sequence[int]
) -> list[Candidate]:
    """Make mixed instances alone, and any split in prefill and decode instances, on at most so many GPUs.

    Args:
        policies: (placement, prefill policy); published placements go with fcfs alone, and with layouts they are made for.
        chunks: most tokens of prompts in a step.
    """
    found = []
    for kind in kinds:
        for num in range(1, gpus // kind.gpus + 1):
            for layout in ("M" * num, *("P" * p + "D" * (num - p) for p in range(1, num))):
                for placement, prompts in policies:
                    if baselines.allows(placement, layout):
                        found += [Candidate(kind, layout, placement, prompts, chunk) for chunk in chunks]
    return found


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `plan`; those of the trace and of the instances are `simulate`'s."""
    add = parser.add_argument
    add("--gpus", type=int, required=True, help="the most GPUs that may be used")
    add("--goal", type=float, default=0.9, help="share of requests that must meet both objectives (default 0.9)")
    add("--trace", required=True, metavar="FILE", help="as of `simulate`")
    add("--rate", type=float, help="requests/s that are to be held (default: the trace's own)")
    add("--max-requests", type=int, metavar="N", default=2000, help="the trace's first N alone (default 2000)")
    add("--latency", type=Path, required=True, metavar="PATH", help="as of `simulate`; files: several, joined by ,")
    add("--profile", default="", help="with a directory: which NAME, as in 8b-h200-tp1; several, joined by ,")
    add("--latency-model", choices=latency.MODELS, default="grid", help="with a directory (default grid)")
    add("--gpus-per-instance", help="one for each profile (default: N of a profile's word tpN, else 1)")
    add("--num-blocks", help="KV blocks of an instance, one for each profile (default: known for some profiles)")
    add("--kv-bytes-per-token", help="one for each profile (default: known for some profiles)")
    add("--placement", default="slo", help="names as of `simulate`, joined by , (default slo)")
    add(
        "--prefill-policy",
        default="slack",
        help="names as of `simulate`, joined by ,; each with each of our placements (default slack)",
    )
    add("--max-num-batched-tokens", default="2048,8192", help="chunk sizes to try (default 2048,8192)")
    simulator.add_instance_flags(parser)
    add("--seed", type=int, default=0, help="of placement's coins and of synthetic requests (default 0)")
    add("--json", type=Path, metavar="OUT", help="where all that was tried goes; a table goes to stdout in any case")
    simulator.add_synthetic_flags(parser)


def run(args: argparse.Namespace, known: Policies = OURS) -> int:
    """Returns: exit status, 1 if nothing meets the goal. Raises: ConfigError: a flag or a file is wrong."""
    simulator.check_positive(args, "rate", "max_requests", "gpus")
    simulator.check_instance_flags(args)
    check_output(args.json)
    if not 0 < args.goal <= 1:
        raise ConfigError(f"--goal is {args.goal}; it must be above 0 and at most 1")
    placements, orders = args.placement.split(","), args.prefill_policy.split(",")
    for placement in placements:
        for name in orders:
            known.check(placement, name)
    # Published placements have an order of their own, and fcfs stands for it.
    policies = [(p, o) for p in placements for o in (["fcfs"] if p in baselines.NAMES else orders)]
    kinds = _kinds(args)
    chunks = _counts(args.max_num_batched_tokens, "--max-num-batched-tokens")
    check_size(args.gpus, kinds, len(policies) * len(chunks))
    candidates = candidates_of(kinds, args.gpus, policies, chunks)
    if not candidates:
        smallest = min(k.gpus for k in kinds)
        raise ConfigError(f"--gpus is {args.gpus}; the smallest instance takes {smallest}, and placements may need two")
    offered = simulator.offer(args, random.Random(args.seed))
    slo = Slo(args.slo_ttft_x, args.slo_tpot_ms)
    planner = Planner(offered, slo, args.goal, simulator.instance_options(args), args.seed, known)
    found = plan(planner, candidates, trace.own_rate(offered))
    sys.stdout.write(_table(found))
    if args.json:
        flags = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ("command", "json")}
        write_json(args.json, {"flags": flags, **found})
    return 0 if found["best"] else 1


def check_size(gpus: int, kinds: Sequence[Kind], num_settings: int) -> None:
    """Raises: ConfigError: there is more to try than anybody would wait for; says how many GPUs are the most.

    Args:
        num_settings: policies times chunk sizes, that each layout is tried with.
    """

    def num_candidates(most: int) -> int:  # n instances are n layouts: all mixed, or 1 to n - 1 of them prefill
        return num_settings * sum((n := most // kind.gpus) * (n + 1) // 2 for kind in kinds)

    if num_candidates(gpus) > MOST_CANDIDATES:
        most = bisect_right(range(gpus), MOST_CANDIDATES, key=num_candidates) - 1
        raise ConfigError(
            f"--gpus is {gpus}: {num_candidates(gpus)} layouts, policies and chunk sizes to try; it must be {most} at most, for {MOST_CANDIDATES}"
        )


def plan(planner: Planner, candidates: Sequence[Candidate], rate: float) -> dict[str, Any]:
    """Returns: the best candidate with the highest rate that it holds, or None, and all others that were tried, the best first."""
    with Progress("planning", len(candidates)) as progress:

        def on_run(candidate: Candidate) -> None:
            done = len(planner.results) + planner.num_left_out
            progress.reach(done, f"planning: {candidate.name} on {candidate.gpus} GPU{'s' * (candidate.gpus > 1)}")

        best = planner.search(candidates, on_run)
        highest = planner.highest_rate(best.candidate, on_run) if best else None
    others = sorted(
        (r for r in planner.results.values() if r is not best),
        key=lambda r: (-r.num_requests, -r.attainment, r.candidate.gpus, r.ttft_p90_s),
    )
    return {
        "rate": rate,
        "best": best and {**best.row(), "highest_rate": highest},
        "others": [r.row() for r in others],
        "left_out": planner.num_left_out,
        "not_tried": len(candidates) - len(planner.results) - planner.num_left_out,
        "simulations": planner.num_runs,
    }


def _kinds(args: argparse.Namespace) -> list[Kind]:
    if args.latency.is_dir():
        names = [n for n in args.profile.split(",") if n]
        if not names:
            raise ConfigError(f"--profile must be given with --latency {args.latency}, a directory")
        times = [latency.read(args.latency, n, args.latency_model) for n in names]
    else:
        names = str(args.latency).split(",")
        times = [latency.read_profile(Path(n)) for n in names]
    words = [re.search(r"(?:^|-)tp(\d+)(?:-|$)", n.lower()) for n in names]
    known = [latency.pool_of(None if args.latency.is_dir() else Path(n), n) for n in names]
    gpus = _each(args.gpus_per_instance, "--gpus-per-instance", names) or [int(w[1]) if w else 1 for w in words]
    blocks: Sequence[int | None] = _each(args.num_blocks, "--num-blocks", names) or [
        k[0] // max(1, args.block_size) if k else None for k in known
    ]
    kv_bytes: Sequence[int | None] = _each(args.kv_bytes_per_token, "--kv-bytes-per-token", names) or [
        k[1] if k else None for k in known
    ]
    found = []
    for name, num_gpus, time, num_blocks, num_bytes in zip(names, gpus, times, blocks, kv_bytes, strict=True):
        if num_blocks is None or num_bytes is None:
            raise ConfigError(f"--num-blocks and --kv-bytes-per-token must be given for {name}")
        found.append(Kind(name, num_gpus, time, num_blocks, num_bytes))
    return found


def _each(text: str | None, flag: str, names: Sequence[str]) -> list[int] | None:
    if text is None:
        return None
    counts = _counts(text, flag)
    if len(counts) != len(names):
        raise ConfigError(f"{flag} is {text}; it must be {len(names)} numbers, one for each of {', '.join(names)}")
    return counts


def _counts(text: str, flag: str) -> list[int]:
    if not re.fullmatch(r"0*[1-9]\d*(,0*[1-9]\d*)*", text):
        raise ConfigError(f"{flag} is {text!r}; it must be whole numbers above 0, joined by ,")
    return [int(n) for n in text.split(",")]


def _table(found: dict[str, Any]) -> str:
    best, rate = found["best"], found["rate"]
    lines = [f"{found['simulations']} simulations; {found['left_out']} candidates left out by arithmetic"]
    if best is None:
        lines.append(f"nothing meets the goal at {rate_text(rate)} requests/s; the nearest:")
    else:
        lines += [
            f"best: --layout {best['layout']} --placement {best['placement']} --prefill-policy {best['prefill_policy']} "
            f"--max-num-batched-tokens {best['max_num_batched_tokens']}, profile {best['profile']}: {best['gpus']} GPU{'s' * (best['gpus'] > 1)}",
            f"  {100 * best['slo_attainment']:.1f} % at {rate_text(rate)} requests/s; holds the goal up to "
            f"{rate_text(best['highest_rate'])} requests/s (margin {100 * (best['highest_rate'] / rate - 1):.0f} %)",
            "runners-up:",
        ]
    lines.append("GPUs  layout    profile               placement, order       chunk  requests  attainment  TTFT p90 s")
    for r in found["others"][:10]:
        lines.append(
            f"{r['gpus']:>4}  {r['layout']:10}{r['profile'][-20:]:22}{r['placement'] + ', ' + r['prefill_policy']:22}{r['max_num_batched_tokens']:>6}"
            f"{r['requests']:>10}{100 * r['slo_attainment']:>10.1f} %{r['ttft_p90_s']:>12.2f}"
        )
    return "\n".join(lines) + "\n"
