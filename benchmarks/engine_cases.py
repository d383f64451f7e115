"""What engines are timed on, ours and others': one device, random weights, greedy, no early stop, no prefix cache.

    python -m benchmarks.engine_cases ours.json vllm.json        (a table of two runs and their ratio)

A case is a number of prompts of random token ids, all given at once. It is timed with one output token, which is the prefill, and with
`output_len`, which is the prefill and output_len - 1 steps of decode; medians of the repeats after a run that is not counted.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


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
MAX_NUM_SEQS = max(case.requests for case in CASES.values())
#: answers prompts greedily with so many tokens each; returns how many each got
Generate = Callable[[list[list[int]], int], Sequence[int]]


def parser(description: str) -> argparse.ArgumentParser:
    """Returns: the flags that every engine's benchmark has."""
    flags = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    flags.add_argument(
        "--model", type=Path, required=True, help="directory; with dummy weights it needs only config.json"
    )
    flags.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    flags.add_argument("--load-format", choices=("auto", "dummy"), default="dummy")
    flags.add_argument("--max-model-len", type=int, default=8192)
    flags.add_argument("--max-num-batched-tokens", type=int, help="of a step (default: the engine's own)")
    flags.add_argument("--cases", type=lambda text: text.split(","), default=list(CASES), help=",".join(CASES))
    flags.add_argument("--repeats", type=int, default=3)
    flags.add_argument("--scale", type=float, default=1.0, help="of prompts, their lengths and their answers'")
    flags.add_argument("--json", type=Path, help="where to write the figures")
    return flags


def cases_of(args: argparse.Namespace) -> list[Case]:
    """Returns: the cases that were asked for. Raises: SystemExit: a name is unknown, or one does not fit; says which."""
    unknown = [name for name in args.cases if name not in CASES]
    if unknown:
        raise SystemExit(f"--cases: {', '.join(unknown)} is unknown; there are {', '.join(CASES)}")
    cases = [CASES[name].scaled(args.scale) for name in args.cases]
    for case in cases:
        if case.prompt_len + case.output_len > args.max_model_len:
            needed = case.prompt_len + case.output_len
            raise SystemExit(f"case {case.name} needs {needed} tokens; --max-model-len is {args.max_model_len}")
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
    vocab_size = json.loads((args.model / "config.json").read_text())["vocab_size"]
    results: dict[str, Any] = {**facts, "model": args.model.name, "dtype": args.dtype, "scale": args.scale, "cases": {}}
    for case in cases_of(args):
        row = measure(case, args.repeats, vocab_size, generate)
        results["cases"][case.name] = row
        sys.stdout.write(f"{case.name}: {', '.join(f'{k} {v:.4g}' for k, v in row.items())}\n")
        sys.stdout.flush()
    results["gpu_memory_mib"] = gpu_memory_mib()  # engines keep what they once had: at the end it is the peak
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    return results


def table(ours: dict[str, Any], other: dict[str, Any]) -> str:
    """Returns: both runs' figures in Markdown. A ratio is how much better ours is: above 1 everywhere ours wins."""
    names = [f"{r['engine']} {r['version']}" for r in (ours, other)]
    lines = [f"| case | figure | {names[0]} | {names[1]} | ratio |", "|---|---|---|---|---|"]
    rows: list[tuple[str, str, Any, Any]] = [
        (case, name, ours["cases"][case][name], other["cases"][case][name])
        for case in ours["cases"]
        if case in other["cases"]
        for name in ("prefill_tok_s", "decode_tok_s", "step_ms")
    ]
    rows += [("", name, ours.get(name), other.get(name)) for name in ("ready_s", "gpu_memory_mib")]
    for case, name, a, b in rows:
        if a and b:
            ratio = a / b if name.endswith("tok_s") else b / a
            lines.append(f"| {case} | {name} | {a:,.5g} | {b:,.5g} | {ratio:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the table of two runs."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("ours", type=Path)
    arguments.add_argument("other", type=Path)
    args = arguments.parse_args()
    ours, other = (json.loads(path.read_text()) for path in (args.ours, args.other))
    for name in ("model", "dtype", "scale"):
        if ours[name] != other[name]:
            raise SystemExit(f"the runs cannot be compared: {name} is {ours[name]!r} and {other[name]!r}")
    sys.stdout.write(table(ours, other))


if __name__ == "__main__":
    main()
