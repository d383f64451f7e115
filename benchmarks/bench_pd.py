"""Two GPUs under the same recorded traffic, used in six ways: ours and vLLM's, prefill and decode together or apart (layouts.py).

    make bench-pd ARGS='--model DIR --load-format dummy --json pd.json'
    python -m benchmarks.bench_pd --device cpu --scale 0.02 --requests 40 --rates 2,8        (a try on the demo model, ours alone)

Requests come as in a conversation trace of Mooncake's (data/README.md), its rhythm stretched to each rate, with random token ids:
equal where the trace says that prompts begin alike, new ones for every rate, the same for every layout. A request attains its SLO if its
TTFT is at most 5 times the unloaded TTFT of a prompt as long (the fastest layout's, between measured lengths interpolated; or --reference)
and its TPOT at most 100 ms. Goodput counts those that do, a second, from the first arrival to the last answer's end.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import uvloop

from benchmarks.bench_serving import handover_totals, percentile, stage_means, stage_median_ms
from benchmarks.checks import (
    SCALE,
    ended,
    model_directory,
    model_facts,
    names_of,
    need_gpus,
    rates,
    read_object,
)
from benchmarks.client import Answer, ask, completion, stream
from benchmarks.layouts import LAYOUTS, MODEL_NAME, TOPIC, TPOT_MS, TTFT_FACTOR, Running, instance_flags
from benchmarks.trace import MAX_INPUT_TOKENS, NUM_REQUESTS, TraceRequest, arrivals, load
from fastdeploy_pd.errors import ConfigError, FastDeployPDError
from fastdeploy_pd.flags import DEMO_MODEL, Parser, integer, number
from fastdeploy_pd.launch.up import check_instances
from fastdeploy_pd.machine import check_output, write_json

UNLOADED_LENGTHS = (64, 512, 1024, 2048, 4096, MAX_INPUT_TOKENS)
UNLOADED_REPEATS = 3
SETTLE_S = 8.0  # ours prepare what the start does not need while nothing comes
SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
Reference = dict[int, float]  # prompt tokens -> unloaded TTFT in ms


class ReportedRequest(msgspec.Struct):
    """A request's row, as `judge` needs it; this class and the next ones say what a report must have."""

    num_input: int
    ttft_ms: float
    tpot_ms: float
    e2e_ms: float


class ReportedRun(msgspec.Struct):
    """One rate of a layout."""

    rate: float
    seconds: float
    requests: Annotated[list[ReportedRequest | None], msgspec.Meta(min_length=1)]
    itl_ms: dict[str, float]
    handover: dict[str, float] = {}


class ReportedLayout(msgspec.Struct):
    """What was measured of a layout."""

    title: str
    unloaded_ttft_ms: Annotated[dict[int, float], msgspec.Meta(min_length=1)]
    runs: list[ReportedRun]


class Report(msgspec.Struct):
    """What --json writes, as --join needs it."""

    model: str
    scale: float
    max_model_len: int
    max_num_batched_tokens: int | None
    layouts: Annotated[dict[str, ReportedLayout], msgspec.Meta(min_length=1)]


class Measure(msgspec.Struct):
    """What --json writes, as --reference needs it."""

    reference_ttft_ms: Annotated[dict[int, Annotated[float, msgspec.Meta(gt=0)]], msgspec.Meta(min_length=1)]


async def unloaded(urls: Sequence[str], vocab_size: int, scale: float) -> Reference:
    """Returns: the median TTFT of one request at a time, by prompt length."""
    rng, reference = random.Random(0), {}
    for length in sorted({max(2, round(n * scale)) for n in UNLOADED_LENGTHS}):
        ttft_ms = []
        for turn in range(len(urls) + UNLOADED_REPEATS):  # the first of each server warms it up
            prompt = [rng.randrange(vocab_size) for _ in range(length)]
            answer = await ask(urls[turn % len(urls)], MODEL_NAME, prompt, 2)
            ttft_ms.append(answer.ttft_s * 1e3)
        reference[length] = statistics.median(ttft_ms[len(urls) :])
    return reference


async def replay(urls: Sequence[str], requests: list[TraceRequest], rate: float, vocab_size: int) -> list[Answer]:
    """Send every request when its time has come, to the servers in turn. Returns: the answers, in the trace's order."""
    bodies = [completion(MODEL_NAME, r.prompt(vocab_size, f"rate {rate}"), r.num_output) for r in requests]
    start_s = time.perf_counter() + 0.1

    async def send(number: int, arrival_s: float) -> Any:
        await asyncio.sleep(start_s + arrival_s - time.perf_counter())
        return await stream(urls[number % len(urls)], bodies[number])

    received = await asyncio.gather(*(send(n, s) for n, s in enumerate(arrivals(requests, rate))))
    answers = [r.answer() for r in received]
    for answer, request in zip(answers, requests, strict=True):
        if not answer.error and answer.num_tokens != request.num_output:
            answer.error = f"{answer.num_tokens} tokens came instead of {request.num_output}"
    return answers


def run_layout(name: str, requests: list[TraceRequest], vocab_size: int, args: argparse.Namespace) -> dict[str, Any]:
    """Start a layout, measure it unloaded and at every rate, end it. Returns: what was measured."""
    began_s = time.perf_counter()
    with LAYOUTS[name].start(args) as running:
        ready_s = time.perf_counter() - began_s
        say(f"{name}: ready after {ready_s:.1f} s")
        if args.device != "cpu":
            time.sleep(SETTLE_S)
        reference = uvloop.run(unloaded(running.urls, vocab_size, args.scale))
        runs = [measure(name, running, requests, rate, vocab_size) for rate in args.rates]
    return {"title": LAYOUTS[name].title, "ready_s": ready_s, "unloaded_ttft_ms": reference, "runs": runs}


def measure(name: str, running: Running, requests: list[TraceRequest], rate: float, vocab_size: int) -> dict[str, Any]:
    """Returns: one rate's answers, as numbers, and our hand-overs' stages."""
    before = handover_totals(running.metrics_urls)
    answers = uvloop.run(replay(running.urls, requests, rate, vocab_size))
    good = [a for a in answers if not a.error]
    say(f"{name}: {rate:g} req/s: {len(good)} of {len(answers)} answered")
    totals = handover_totals(running.metrics_urls)
    totals.subtract(before)
    stages = stage_means(totals)
    if (
        "overhead_ms" in stages
    ):  # what a pair costs that one instance does not: waits, the last blocks, checksums, messages
        stages["overhead_median_ms"] = stage_median_ms(totals, "overhead")
    return {
        "rate": rate,
        "seconds": max((a.event_s[-1] for a in good), default=0.0) - min(a.sent_s for a in answers),
        "requests": [
            None
            if a.error
            else {
                "num_input": r.num_input,
                "ttft_ms": a.ttft_s * 1e3,
                "tpot_ms": a.tpot_s * 1e3,
                "e2e_ms": a.e2e_s * 1e3,
            }
            for a, r in zip(answers, requests, strict=True)
        ],
        "itl_ms": {p: percentile([s * 1e3 for a in good for s in a.itl_s] or [0.0], q) for p, q in SHARES.items()},
        "errors": sorted({a.error for a in answers if a.error}),
        **({"handover": stages} if stages["count"] else {}),
    }


def judge(run: dict[str, Any], reference: Reference) -> None:
    """Add percentiles, SLO attainment and goodput to a run; a request without an answer attains nothing."""
    lengths = sorted(reference)
    good = [r for r in run["requests"] if r is not None]
    for name in ("ttft_ms", "tpot_ms", "e2e_ms"):
        run[name] = {p: percentile([r[name] for r in good] or [0.0], q) for p, q in SHARES.items()}
    attained = 0
    for request in good:
        limit_ms = TTFT_FACTOR * float(np.interp(request["num_input"], lengths, [reference[n] for n in lengths]))
        attained += request["ttft_ms"] <= limit_ms and request["tpot_ms"] <= TPOT_MS
    run["failed"] = len(run["requests"]) - len(good)
    run["slo_attainment"] = attained / len(run["requests"])
    run["goodput_req_s"] = attained / run["seconds"] if good else 0.0


def fastest(references: Sequence[Reference]) -> Reference:
    """Returns: the least unloaded TTFT of each length, so that all layouts are held to one."""
    return {length: min(r[length] for r in references) for length in references[0]}


def tables(results: dict[str, Any]) -> str:
    """Returns: every layout at every rate, and our hand-overs, in Markdown."""
    columns = ("TTFT ms", "TPOT ms", "ITL ms", "E2E s")
    lines = [
        f"| layout | req/s | {' | '.join(f'{c} p50 / p90 / p99' for c in columns)} | SLO | goodput req/s | failed |"
    ]
    lines.append("|" + "---|" * 9)
    handovers = []
    for layout in results["layouts"].values():
        for run in layout["runs"]:
            cells = [" / ".join(f"{v:.4g}" for v in run[n].values()) for n in ("ttft_ms", "tpot_ms", "itl_ms")]
            cells.append(" / ".join(f"{v / 1e3:.3g}" for v in run["e2e_ms"].values()))
            end = f"{run['slo_attainment']:.1%} | {run['goodput_req_s']:.2f} | {run['failed']}"
            lines.append(f"| {layout['title']} | {run['rate']:g} | {' | '.join(cells)} | {end} |")
            if "handover" in run:
                h = run["handover"]
                names = (
                    "queue_ms",
                    "prefill_ms",
                    "wire_ms",
                    "drain_ms",
                    "hand_over_ms",
                    "overhead_ms",
                    "overhead_median_ms",
                )
                means = " | ".join(f"{h[n]:.4g}" if n in h else "" for n in names)
                handovers.append(
                    f"| {layout['title']} | {run['rate']:g} | {h['count']:.0f} | {h['bytes'] / 1e9:.3g} | {means} |"
                )
    if handovers:
        head = "| layout | req/s | hand-overs | GB | queue | prefill | wire | drain | hand-over | overhead, mean ms | median |"
        lines += ["", head, "|" + "---|" * 11, *handovers]
    return "\n".join(lines) + "\n"


def say(text: str) -> None:
    """Print at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns: the flags. Raises: ConfigError: one is wrong."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=model_directory, default=DEMO_MODEL, help="directory (default: demo, the demo model)")
    add("--load-format", choices=("auto", "dummy"), default="auto", help="dummy: random weights of a config.json")
    add("--device", choices=("cpu", "cuda"), default="cuda")
    add("--gpus", type=lambda text: text.split(","), default=["0", "1"], help="two GPUs (default 0,1)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="as of an instance")
    add("--max-model-len", type=integer(4), help="default: 8192, or what the model allows if that is less")
    add("--max-num-batched-tokens", type=integer(1), help="of a step, everywhere (default: each engine's own)")
    add("--layouts", type=names_of(LAYOUTS), default=list(LAYOUTS), help=",".join(LAYOUTS))
    add("--rates", type=rates, default=[1, 2, 4, 6, 8, 12], help="req/s")
    add("--requests", type=integer(2, NUM_REQUESTS), default=300, help="of the trace")
    add("--scale", type=SCALE, default=1.0, help="of all lengths, for a slow machine")
    add("--reference", type=Path, help="JSON of an earlier run whose unloaded TTFT is the SLO's measure")
    add(
        "--join", type=lambda text: [Path(p) for p in text.split(",")], help="JSONs of runs: one report, nothing is run"
    )
    add("--vllm-python", default=sys.executable, help="interpreter that has vLLM (and NIXL)")
    add("--vllm-memory-utilization", type=number(float, 0.01, 1, "a number from 0.01 to 1"), default=0.85)
    add("--json", type=Path, help="where to write the figures")
    add("flags", nargs="*", help="behind `--`: further flags of our instances")
    args = parser.parse_args(argv)
    given = ",".join(args.gpus)
    args.gpus = list(dict.fromkeys(name.strip() for name in args.gpus if name.strip()))
    if args.device != "cpu" and len(args.gpus) < 2:
        raise ConfigError(f"--gpus: '{given}' is not allowed; it must name two GPUs, as in 0,1")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write. Returns: the exit status. Raises: ConfigError: something is wrong; says what."""
    args = parse(argv)
    check_output(args.json)
    if args.join:
        return join(args.join, args.json)
    reference = read_reference(args.reference) if args.reference else None
    if args.device != "cpu":
        need_gpus(f"--device {args.device} with --gpus {','.join(args.gpus[:2])}", 2, args.gpus[:2])
    vocab_size, most = model_facts(args.model)
    args.max_model_len = args.max_model_len or min(8192, most)
    if any(name.startswith("ours") for name in args.layouts):
        check_instances(instance_flags(args), TOPIC, ("mixed",))
    requests = load(args.requests, args.max_model_len, args.scale)
    results: dict[str, Any] = {
        "model": args.model.name,
        **{n: getattr(args, n) for n in ("device", "scale", "max_model_len", "max_num_batched_tokens", "flags")},
        "layouts": {},
    }
    for name in args.layouts:
        if why := LAYOUTS[name].missing(args):
            say(f"{name}: skipped: {why}")
            continue
        try:
            results["layouts"][name] = run_layout(name, requests, vocab_size, args)
        except (FastDeployPDError, RuntimeError) as error:
            say(f"{name}: failed: {error}")
    if not results["layouts"]:
        return 1
    if reference is None:
        reference = fastest([layout["unloaded_ttft_ms"] for layout in results["layouts"].values()])
    report(results, reference, args.json)
    return 0


def report(results: dict[str, Any], reference: Reference, path: Path | None) -> None:
    """Judge every run by one reference, print the tables, write the JSON."""
    results["reference_ttft_ms"] = reference
    for layout in results["layouts"].values():
        for run in layout["runs"]:
            judge(run, reference)
    say("\n" + tables(results))
    if path:
        write_json(path, results)


def read_report(path: Path, flag: str, kind: type[Report] | type[Measure]) -> dict[str, Any]:
    """Returns: what an earlier run wrote. Raises: ConfigError: the file cannot be read, or is no such report; says why."""
    found = read_object(path, flag)
    try:
        msgspec.json.decode(path.read_bytes(), type=kind)
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{flag}: {path} is no report of this benchmark, of its --json: {error}") from error
    return found


def read_reference(path: Path) -> Reference:
    """Returns: the unloaded TTFT that an earlier run was judged by. Raises: as `read_report`."""
    known = read_report(path, "--reference", Measure)["reference_ttft_ms"]
    return {int(length): ms for length, ms in known.items()}


def join(paths: Sequence[Path], path: Path | None) -> int:
    """One report of the layouts of several runs. Returns: 0. Raises: ConfigError: a file is no report, or they cannot be compared."""
    runs = [read_report(p, "--join", Report) for p in paths]
    for name in ("model", "scale", "max_model_len", "max_num_batched_tokens"):
        if len({run[name] for run in runs}) > 1:
            raise ConfigError(f"the runs cannot be compared: {name} is {', '.join(str(run[name]) for run in runs)}")
    results = {**runs[0], "layouts": {k: v for run in runs for k, v in run["layouts"].items()}}
    unloaded_ms = [{int(n): ms for n, ms in v["unloaded_ttft_ms"].items()} for v in results["layouts"].values()]
    if len({frozenset(reference) for reference in unloaded_ms}) > 1:
        raise ConfigError("the runs cannot be compared: their unloaded TTFT is that of prompts of different lengths")
    report(results, fastest(unloaded_ms), path)
    return 0


if __name__ == "__main__":
    sys.exit(ended(main))
