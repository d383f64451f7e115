"""What engines are timed on, ours and others': one device, random weights, greedy, no early stop, no prefix cache.

    python -m benchmarks.engine_cases ours.json vllm.json        (a table of two runs and their ratio)

A case is a number of prompts of random token ids, all given at once. It is timed with one output token, which is the prefill, and with
`output_len`, which is the prefill and output_len - 1 steps of decode; medians of the repeats after a run that is not counted. `--alone`
times prompts one at a time until their first token, as who sends one to an idle engine waits for it; medians of ALONE_REPEATS.
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.checks import SCALE, ended, integers, model_directory, model_facts, names_of, need_fields, read_object
from fastdeploy_pd.errors import ConfigError
from fastdeploy_pd.flags import Parser, integer
from fastdeploy_pd.machine import check_output, write_json
from fastdeploy_pd.sim.fields import number


@dataclass(frozen=True, slots=True)
class Case:
    """Prompts of the same length, and how many tokens each is answered with."""

    name: str
    requests: int
    prompt_len: int
    output_len: int

    def scaled(self, scale: float) -> Case:
        """Returns: a smaller one, for a machine that is slower by as much."""
        sizes = (self.requests, self.prompt_len, self.output_len)
        requests, prompt_len, output_len = (max(n, round(v * scale)) for n, v in zip((1, 2, 2), sizes, strict=True))
        return replace(self, requests=requests, prompt_len=prompt_len, output_len=output_len)


CASES = {
    case.name: case
    for case in (
        Case("b1", 1, 1024, 128),
        Case("b8", 8, 1024, 128),
        Case("b64", 64, 1024, 128),
        Case("b256", 256, 1024, 128),
        Case("long", 2, 7936, 128),
    )
}
ALONE_REPEATS, ALONE_WARM_UP = 9, 3
MOST_MODEL_LEN = 8192  # where --max-model-len is not given
FIGURES = ("prefill_tok_s", "decode_tok_s", "step_ms")  # that are compared
MAX_NUM_SEQS = max(case.requests for case in CASES.values())
#: answers prompts greedily with so many tokens each; returns how many each got
Generate = Callable[[list[list[int]], int], Sequence[int]]


def parser(description: str) -> argparse.ArgumentParser:
    """Returns: the flags that every engine's benchmark has."""
    flags = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    model_help = "directory, or `demo`; with dummy weights it needs only config.json"
    flags.add_argument("--model", type=model_directory, required=True, help=model_help)
    dtypes = ("float32", "bfloat16", "float16")
    flags.add_argument("--dtype", choices=dtypes, help="default: bfloat16, on a CPU float32")
    flags.add_argument("--load-format", choices=("auto", "dummy"), default="dummy")
    flags.add_argument("--max-model-len", type=integer(2), help="default: 8192, or what the model allows if less")
    flags.add_argument("--max-num-batched-tokens", type=integer(1), help="of a step (default: the engine's own)")
    flags.add_argument("--cases", type=names_of(CASES), default=list(CASES), help=",".join(CASES))
    flags.add_argument("--repeats", type=integer(1), default=3)
    flags.add_argument(
        "--alone",
        type=integers,
        default=[],
        metavar="N,...",
        help="tokens of prompts that are timed one at a time, whatever --scale",
    )
    flags.add_argument("--scale", type=SCALE, default=1.0, help="of prompts, their lengths and their answers'")
    flags.add_argument("--json", type=Path, help="where to write the figures")
    return flags


def complete(args: argparse.Namespace, device: str = "cuda") -> None:
    """Give flags that were left out what fits the model and the device.

    Raises: ConfigError: what is to be read or written cannot be, or a case does not fit; says which.
    """
    check_output(args.json)
    _, most = model_facts(args.model)
    args.dtype = args.dtype or ("float32" if device == "cpu" else "bfloat16")
    args.max_model_len = args.max_model_len or min(MOST_MODEL_LEN, most)
    cases_of(args)
    if args.alone and max(args.alone) >= args.max_model_len:
        raise ConfigError(
            f"--alone: {max(args.alone)} is not allowed; it must be below --max-model-len, {args.max_model_len}"
        )


def cases_of(args: argparse.Namespace) -> list[Case]:
    """Returns: the cases that were asked for. Raises: ConfigError: one does not fit; says which."""
    cases = [CASES[name].scaled(args.scale) for name in args.cases]
    for case in cases:
        if case.prompt_len + case.output_len > args.max_model_len:
            needed = case.prompt_len + case.output_len
            raise ConfigError(
                f"case {case.name} needs {needed} tokens; --max-model-len is {args.max_model_len}: it must be as much, or "
                f"--scale, which is {args.scale:g}, less, or --cases without {case.name}"
            )
    return cases


def figures(case: Case, t_1_s: float, t_n_s: float) -> dict[str, float]:
    """Returns: the rates that the two times make."""
    steps, decode_s = case.output_len - 1, t_n_s - t_1_s
    return {
        "t_1_s": t_1_s,
        "t_n_s": t_n_s,
        "prefill_tok_s": case.requests * case.prompt_len / t_1_s,
        "decode_tok_s": case.requests * steps / decode_s,
        "step_ms": 1e3 * decode_s / steps,
    }


def measure(case: Case, repeats: int, vocab_size: int, generate: Generate) -> dict[str, float]:
    """Returns: the figures of one case. Raises: RuntimeError: an answer had another length."""
    rng = random.Random(case.name)
    medians = []
    for num_tokens in (1, case.output_len):
        seconds = []
        for _ in range(1 + repeats):
            prompts = [[rng.randrange(vocab_size) for _ in range(case.prompt_len)] for _ in range(case.requests)]
            began_s = time.perf_counter()
            counts = generate(prompts, num_tokens)
            seconds.append(time.perf_counter() - began_s)
            if list(counts) != [num_tokens] * case.requests:
                raise RuntimeError(f"case {case.name}: answers of {sorted(set(counts))} tokens instead of {num_tokens}")
        medians.append(statistics.median(seconds[1:]))
    return figures(case, *medians)


def measure_alone(num_tokens: int, vocab_size: int, generate: Generate) -> float:
    """Returns: milliseconds that a prompt of so many tokens takes to its first one."""
    rng, seconds = random.Random(num_tokens), []
    for _ in range(ALONE_WARM_UP + ALONE_REPEATS):
        prompt = [rng.randrange(vocab_size) for _ in range(num_tokens)]
        began_s = time.perf_counter()
        generate([prompt], 1)
        seconds.append(time.perf_counter() - began_s)
    return 1e3 * statistics.median(seconds[ALONE_WARM_UP:])


def since_start_s() -> float:
    """Returns: seconds since this process was started, imports included. Source: proc(5), field 22."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / 100  # USER_HZ is 100 wherever Linux shows it


def gpu_memory_mib() -> int | None:
    """Returns: what is in use on the fullest GPU, by whatever process; None where nvidia-smi does not answer."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        used = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return max(map(int, used), default=None)


def run(args: argparse.Namespace, facts: dict[str, Any], generate: Generate) -> dict[str, Any]:
    """Measure the cases, print each, write --json. Returns: everything.

    Args:
        facts: what the engine says of itself; with ready_s, taken when it could answer.
    """
    vocab_size, _ = model_facts(args.model)
    results: dict[str, Any] = {**facts, "model": args.model.name, "dtype": args.dtype, "scale": args.scale, "cases": {}}
    for case in cases_of(args):
        row = measure(case, args.repeats, vocab_size, generate)
        results["cases"][case.name] = row
        sys.stdout.write(f"{case.name}: {', '.join(f'{k} {v:.4g}' for k, v in row.items())}\n")
        sys.stdout.flush()
    results["alone_ms"] = {}
    for num_tokens in args.alone:
        results["alone_ms"][str(num_tokens)] = ms = measure_alone(num_tokens, vocab_size, generate)
        sys.stdout.write(f"{num_tokens} tokens alone: {ms:.4g} ms\n")
        sys.stdout.flush()
    results["gpu_memory_mib"] = gpu_memory_mib()  # engines keep what they once had: at the end it is the peak
    if args.json:
        write_json(args.json, results)
    return results


def table(ours: dict[str, Any], other: dict[str, Any]) -> str:
    """Returns: both runs' figures in Markdown. A ratio is how much better ours is: above 1 everywhere ours wins."""
    names = [f"{r['engine']} {r['version']}" for r in (ours, other)]
    lines = [f"| case | figure | {names[0]} | {names[1]} | ratio |", "|---|---|---|---|---|"]
    rows: list[tuple[str, str, Any, Any]] = [
        (case, name, ours["cases"][case][name], other["cases"][case][name])
        for case in ours["cases"]
        if case in other["cases"]
        for name in FIGURES
    ]
    alone, others = ours["alone_ms"], other["alone_ms"]
    rows += [(f"{n} tokens alone", "ms", alone[n], others[n]) for n in alone if n in others]
    rows += [("", name, ours.get(name), other.get(name)) for name in ("ready_s", "gpu_memory_mib")]
    for case, name, a, b in rows:
        if a and b:
            ratio = a / b if name.endswith("tok_s") else b / a
            lines.append(f"| {case} | {name} | {a:,.5g} | {b:,.5g} | {ratio:.2f} |")
    return "\n".join(lines) + "\n"


def read_report(path: Path, name: str) -> dict[str, Any]:
    """Returns: what an engine's benchmark wrote with --json. Raises: ConfigError: the file is no such report; says why."""
    report = read_object(path, name)
    what = "bench_engine or peers.vllm_engine"
    need_fields(report, ("engine", "version", "model", "dtype", "scale", "cases"), name, path, what)
    cases = report["cases"] if isinstance(report["cases"], dict) else {"": None}
    try:
        for case, row in cases.items():
            if not isinstance(row, dict):
                raise ValueError(f"has no figures of case {case}")
            for figure in FIGURES:
                number(row, figure)
        alone = report.setdefault("alone_ms", {})  # older reports have none
        if not isinstance(alone, dict):
            raise ValueError("has an alone_ms that is no object")
        for length in alone:
            number(alone, length)
        for figure in ("ready_s", "gpu_memory_mib"):
            if report.get(figure) is not None:
                number(report, figure)
    except ValueError as error:
        raise ConfigError(f"{name}: {path} {error}; it must be what {what} wrote with --json") from error
    return report


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table of two runs. Returns: 0. Raises: ConfigError: a file is no report, or the two cannot be compared."""
    arguments = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("ours", type=Path, metavar="OURS")
    arguments.add_argument("other", type=Path, metavar="OTHER")
    args = arguments.parse_args(argv)
    ours, other = read_report(args.ours, "OURS"), read_report(args.other, "OTHER")
    for name in ("model", "dtype", "scale"):
        if ours[name] != other[name]:
            raise ConfigError(f"the runs cannot be compared: {name} is {ours[name]!r} and {other[name]!r}")
    sys.stdout.write(table(ours, other))
    return 0


if __name__ == "__main__":
    sys.exit(ended(main))
