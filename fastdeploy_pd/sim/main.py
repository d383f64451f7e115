"""`fastdeploy-pd simulate`: serve a trace on a cluster that does not exist. See docs/simulator.md."""

from __future__ import annotations

import argparse
import random
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from fastdeploy_pd.clock import WallClock
from fastdeploy_pd.core import multiplexing, order
from fastdeploy_pd.core.placement import PlacementPolicy
from fastdeploy_pd.errors import ConfigError
from fastdeploy_pd.machine import check_output, free_memory_bytes, write_json
from fastdeploy_pd.sim import baselines, failures, latency, trace
from fastdeploy_pd.sim.cluster import Cluster, ClusterOptions
from fastdeploy_pd.sim.instance import MakePolicy
from fastdeploy_pd.sim.progress import Progress
from fastdeploy_pd.sim.report import Slo, rates_table, report, table
from fastdeploy_pd.sim.step_times import add_flags as add_step_time_flags
from fastdeploy_pd.sim.step_times import step_times


def _our_placement(name: str) -> PlacementPolicy:
    """Returns: a placement policy of `core`. Raises: ConfigError: there is none of that name."""
    if name not in multiplexing.PLACEMENTS:
        raise ConfigError(f"--placement is {name!r}; there are {', '.join(multiplexing.PLACEMENTS)}")
    return multiplexing.PLACEMENTS[name]()


@dataclass(frozen=True, slots=True)
class Policies:
    """Who knows policies by name: `core`, or, from the command line, whoever finds those of other packages too (`engine/policies.py`)."""

    prefill: MakePolicy = order.make_policy
    placement: Callable[[str], PlacementPolicy] = _our_placement

    def check(self, placement: str, prefill_policy: str) -> None:
        """Raises: ConfigError: one of the two is not there."""
        self.prefill(prefill_policy, lambda: None)
        if placement not in baselines.NAMES:
            try:
                self.placement(placement)
            except ConfigError as error:
                raise ConfigError(f"{error.message}; simulated only: {', '.join(baselines.NAMES)}") from error


OURS = Policies()
MOST_INSTANCES = 100_000
REQUEST_BYTES, ROW_BYTES = 600, 3000  # that a served request takes, and its row of the report


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `simulate`."""
    add = parser.add_argument
    add("--trace", required=True, metavar="FILE", help="Mooncake JSONL or Azure CSV, .gz or not; or `synthetic`")
    add_step_time_flags(parser)
    add(
        "--layout",
        required=True,
        help="instances, as in 6P2D, 8M or 2P4D2M: Prefill, Decode, Mixed; auto:8: eight whose work the SLOs decide",
    )
    rate_help = "requests/s; the trace is sped up or slowed down to it (default: its own); several: a run for each"
    add("--rate", type=parse_rates, metavar="R[,R...]", help=rate_help)
    add("--max-requests", type=int, metavar="N", help="the trace's first N alone, or of synthetic ones")
    add("--repeat", type=int, default=1, metavar="N", help="the requests N times over, sharing no prefixes (default 1)")
    placements = ", ".join([*multiplexing.PLACEMENTS, *baselines.NAMES])
    add("--placement", help=f"{placements}, or an entry point's name (default fewest-tokens; with auto:N slo)")
    orders = ", ".join(order.POLICIES)
    add("--prefill-policy", help=f"{orders}, or an entry point's name (default fcfs; with auto:N slack)")
    known = "(default: what a profile's file says, or known)"
    add("--num-blocks", type=int, help=f"KV blocks of an instance {known}")
    add("--kv-bytes-per-token", type=int, help=f"KV bytes of a token in all layers {known}")
    add("--max-num-batched-tokens", type=int, default=8192, help="most tokens of prompts in a step (default 8192)")
    lone_help = "the same of a prompt while there is nothing else to compute; 0: no more (default); an instance on a GPU takes 8192"
    add("--max-lone-prompt-tokens", type=int, default=0, help=lone_help)
    add_instance_flags(parser)
    fail_help = "at TIME (s) the instance of this number, from 0, dies; SECONDS later it is back, empty; repeatable"
    add("--fail", action="append", metavar="TIME:INSTANCE[:SECONDS][,...]", help=fail_help)
    add("--seed", type=int, default=0, help="of placement's coins and of synthetic requests (default 0)")
    add("--json", type=Path, metavar="OUT", help="where the report goes; the table goes to stdout in any case")
    add("--per-request", action="store_true", help="a row a request in the report of --json")
    add_synthetic_flags(parser)


def add_instance_flags(parser: argparse.ArgumentParser) -> None:
    """Add what says how well instances must serve, and what they are like whatever they run on."""
    add = parser.add_argument
    add("--slo-ttft-x", type=float, default=5.0, help="most TTFT, in units of the unloaded prefill time (default 5)")
    add("--slo-tpot-ms", type=float, default=100.0, help="most mean time per output token (default 100)")
    add("--block-size", type=int, default=64, help="tokens a KV block (default 64)")
    add("--kv-gb-per-s", type=float, default=50.0, help="10^9 bytes/s that a prefill instance can send (default 50)")
    add("--kv-latency-ms", type=float, default=1.0, help="from a hand-over's last byte to decode's start (default 1)")
    add("--max-num-seqs", type=int, default=256, help="most sequences in a step (default 256)")
    add("--no-prefix-caching", action="store_true", help="compute every prompt anew")


def add_synthetic_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `--trace synthetic`."""
    synthetic = parser.add_argument_group("--trace synthetic", "random requests, as of `vllm bench serve`")
    for f in fields(trace.Synthetic):
        kind = float if isinstance(f.default, float) else int
        synthetic.add_argument(_flag(f.name), type=kind, help=f"(default {f.default})")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _fill_synthetic(args: argparse.Namespace) -> None:
    """Give the flags of `--trace synthetic` their defaults. Raises: ConfigError: one is given with a trace that is a file."""
    for f in fields(trace.Synthetic):
        value = getattr(args, f.name)
        if value is None:
            setattr(args, f.name, f.default)
        elif args.trace != "synthetic":
            raise ConfigError(
                f"{_flag(f.name)} is {value}, which only --trace synthetic has a use for; with --trace {args.trace} it must be left out"
            )


def run(args: argparse.Namespace, policies: Policies = OURS) -> int:
    """Returns: exit status. Raises: ConfigError: a flag or a file is wrong."""
    check_output(args.json)
    if args.per_request and not args.json:
        raise ConfigError("--per-request adds rows to the report; give --json, where it goes")
    clock = WallClock()
    runs = []
    for rate in args.rate or (None,):
        begun_s = clock.now_s()
        found = simulate(argparse.Namespace(**{**vars(args), "rate": rate}), policies)
        taken_s = clock.now_s() - begun_s
        speed = f"simulated in {taken_s:.1f} s, {found['span_s'] / taken_s:.0f} x real time"
        if not found["finished"]:
            sys.stderr.write(f"warning: no request was served: {found.get('refused_because', 'all failed')}\n")
        died = f"{failures.table(found)}\n\n" if args.fail else ""
        sys.stdout.write(f"{table(found)}\n\n{died}{speed}\n\n")
        runs.append(found)
    if len(runs) > 1:
        sys.stdout.write(f"{rates_table(runs)}\n")
        flags = {**runs[0]["flags"], "rate": list(args.rate)}
        runs = [{"flags": flags, "runs": [{k: v for k, v in r.items() if k != "flags"} for r in runs]}]
    if args.json:
        write_json(args.json, runs[0])
    return 0


def parse_rates(text: str) -> tuple[float, ...]:
    """Returns: "1.7,3.4" as numbers, rising. Raises: ArgumentTypeError: they are not numbers."""
    try:
        return tuple(sorted({float(x) for x in text.split(",")}))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not allowed; it must be numbers, as in 3.4 or 1.7,3.4,6.8"
        ) from None


def simulate(args: argparse.Namespace, policies: Policies = OURS) -> dict[str, Any]:
    """Returns: the report of one run, headed by the flags that made it. Raises: ConfigError: a flag or a file is wrong."""
    check_positive(args, "rate", "max_requests", "repeat", "num_blocks", "kv_bytes_per_token", "max_num_batched_tokens")
    check_instance_flags(args)
    is_auto = args.layout.startswith("auto:")
    args.placement = args.placement or ("slo" if is_auto else "fewest-tokens")
    args.prefill_policy = args.prefill_policy or ("slack" if is_auto else "fcfs")
    policies.check(args.placement, args.prefill_policy)
    rng = random.Random(args.seed)
    times = step_times(args)
    once = offer(args, rng)
    slo = Slo(args.slo_ttft_x, args.slo_tpot_ms)
    cluster = make_cluster(args.placement, _options(args), times, slo, rng, policies)
    died = None
    if args.fail:
        if args.placement in baselines.NAMES:
            raise ConfigError(
                f"--fail goes with a --placement of {', '.join(multiplexing.PLACEMENTS)}; it is {args.placement}"
            )
        parsed = failures.parse(args.fail, len(cluster.instances))
        _warn_of_late_failures(parsed, trace.last_arrival_s(once, args.repeat), args.rate)
        died = failures.Failures(cluster, parsed)
    check_memory(len(once) * args.repeat, args.per_request)
    with Progress("simulating", len(once) * args.repeat) as progress:
        cluster.on_arrival = progress.reach
        records = cluster.run(trace.repeated(once, args.repeat))
    flags = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ("command", "json")}
    found = {"flags": flags, **report(records, cluster.instances, times, slo, args.per_request)}
    if died is not None:
        found |= {"failed": sum(r.is_failed for r in records), "failures": died.rows()}
    return found


def _warn_of_late_failures(found: Sequence[failures.Failure], last_s: float, rate: float | None) -> None:
    """Say of each failure that comes when no request comes any more; it is not refused: of several rates it may suit others."""
    for f in found:
        if f.at_s > last_s:
            with_rate = "" if rate is None else f" with --rate {rate:g}"
            sys.stderr.write(
                f"warning: --fail {f.at_s:g}:{f.index} lies after the last arrival, which is at {last_s:.2f} s{with_rate}, and tests "
                "little or nothing; it must be earlier, or --repeat higher\n"
            )


def check_positive(args: argparse.Namespace, *flags: str) -> None:
    """Raises: ConfigError: one of these flags is given and not above 0, or beyond all reason."""
    for flag in flags:
        value = getattr(args, flag)
        if value is not None and not 1e-9 <= value <= 1e15:
            allowed = "a whole number from 1" if isinstance(value, int) else "above 0, from 1e-9"
            raise ConfigError(f"{_flag(flag)} is {value}; it must be {allowed} to 1e15")


def check_memory(num_requests: int, has_rows: bool) -> None:
    """Raises: ConfigError: so many requests do not fit into the memory that is free; says both sizes."""
    needed, free = num_requests * (REQUEST_BYTES + ROW_BYTES * has_rows), free_memory_bytes()
    if free is not None and needed > free:
        rows = ", with --per-request," if has_rows else ""
        raise ConfigError(
            f"{num_requests} requests{rows} need about {needed / 1e9:.0f} GB of memory, and {free / 1e9:.1f} GB are free; "
            "it must be fewer: --num-prompts, --max-requests, --repeat"
        )


def check_instance_flags(args: argparse.Namespace) -> None:
    """Raises: ConfigError: a flag of `add_instance_flags` is out of range."""
    check_positive(args, "slo_ttft_x", "slo_tpot_ms", "block_size", "max_num_seqs")
    check_link(args)


def check_link(args: argparse.Namespace) -> None:
    """Raises: ConfigError: --kv-gb-per-s or --kv-latency-ms is out of range."""
    check_positive(args, "kv_gb_per_s")
    if not 0 <= args.kv_latency_ms <= 1e9:
        raise ConfigError(f"--kv-latency-ms is {args.kv_latency_ms}; it must be from 0 to 1e9")


def make_cluster(
    placement: str,
    options: ClusterOptions,
    times: latency.Latency,
    slo: Slo,
    rng: random.Random,
    policies: Policies = OURS,
) -> Cluster:
    """Returns: a cluster that places as that name says. Raises: ConfigError: the options are wrong, or there is no such policy."""
    if placement in baselines.NAMES:
        return baselines.make_cluster(placement, options, times, slo, rng)
    return Cluster(options, times, policies.placement(placement), rng, make_policy=policies.prefill)


def offer(args: argparse.Namespace, rng: random.Random) -> list[trace.Offered]:
    """Returns: the requests that the flags ask for. Raises: ConfigError: a flag or the trace is wrong."""
    _fill_synthetic(args)
    if args.trace == "synthetic":
        if args.rate is None:
            raise ConfigError("--trace synthetic has no rate of its own; give --rate")
        check_memory(args.num_prompts * getattr(args, "repeat", 1), getattr(args, "per_request", False))
        synthetic = trace.Synthetic(**{f.name: getattr(args, f.name) for f in fields(trace.Synthetic)})
        return synthetic.offered(args.rate, rng)[: args.max_requests]
    requests = trace.load(Path(args.trace), args.max_requests)
    return requests if args.rate is None else trace.at_rate(requests, args.rate)


def parse_layout(text: str) -> str:
    """Returns: a letter an instance: 2P1D is "PPD", auto:3 "MMM". Raises: ConfigError: that is no layout."""
    if match := re.fullmatch(r"auto:([1-9]\d*)", text):
        text = f"{match[1]}M"
    parts = re.findall(r"(\d+)([PDM])", text.upper())
    is_layout = parts and "".join(n + kind for n, kind in parts) == text.upper()
    if is_layout and sum(int(n) if len(n) < 10 else MOST_INSTANCES + 1 for n, _ in parts) > MOST_INSTANCES:
        raise ConfigError(f"--layout {text}: it must have at most {MOST_INSTANCES} instances")
    if not is_layout:
        raise ConfigError(f"--layout {text}: it must be counts before P, D or M, as in 6P2D or 8M, or auto:8")
    kinds = "".join(int(n) * kind for n, kind in parts)
    if not {"D", "M"} & set(kinds):
        raise ConfigError(f"--layout {text}: it must have at least one instance that decodes, D or M")
    return kinds


def _options(args: argparse.Namespace) -> ClusterOptions:
    known = latency.pool_of(args.latency, args.profile or "")
    num_blocks = args.num_blocks
    if num_blocks is None:
        if known is None:
            pools = ", ".join(latency.KNOWN_POOLS)
            hint = f" for --profile {args.profile}; it is known for {pools}" if args.profile else ""
            raise ConfigError("--num-blocks must be given" + hint)
        num_blocks = known[0] // max(1, args.block_size)
    return replace(
        instance_options(args),
        kinds=parse_layout(args.layout),
        num_blocks=num_blocks,
        kv_bytes_per_token=args.kv_bytes_per_token or (known[1] if known else 0),
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_lone_prompt_tokens=args.max_lone_prompt_tokens,
        prefill_policy=args.prefill_policy,
        is_predicted=predicts(args.placement, args.prefill_policy),
    )


def predicts(placement: str, prefill_policy: str) -> bool:
    """Returns: whether one of these policies needs to know how long steps take; those of other packages may."""
    return placement == "slo" or prefill_policy == "slack" or is_own(placement, prefill_policy)


def is_own(placement: str, prefill_policy: str) -> bool:
    """Returns: whether another package has brought one of these."""
    return placement not in (*multiplexing.PLACEMENTS, *baselines.NAMES) or prefill_policy not in order.POLICIES


def instance_options(args: argparse.Namespace) -> ClusterOptions:
    """Returns: what the flags of `add_instance_flags` say, for one instance without blocks."""
    return ClusterOptions(
        kinds="M",
        num_blocks=0,
        block_size=args.block_size,
        max_num_seqs=args.max_num_seqs,
        enable_prefix_caching=not args.no_prefix_caching,
        ttft_x=args.slo_ttft_x,
        tpot_s=args.slo_tpot_ms / 1e3,
        link_bytes_per_s=args.kv_gb_per_s * 1e9,
        link_latency_s=args.kv_latency_ms / 1e3,
    )
