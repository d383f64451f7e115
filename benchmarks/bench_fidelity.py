"""The simulator beside a real pair on this machine's CPU: the same requests, 1P1D, the same objectives.

    python -m benchmarks.bench_fidelity

A prefill and a decode instance of the demo model serve random prompts, none of them alike, that arrive as a Poisson process. `simulate` gets
their lengths and arrivals, what a hand-over takes beside its steps, and step times of two kinds: those that `fastdeploy-pd profile` measures on an
idle machine, and those that `fastdeploy-pd calibrate` finds in every other request, 0, 2, 4, ... Requests 1, 3, 5, ... are what is compared.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.client import Answer, ask
from fastdeploy_pd.launch.embedded_redis import EmbeddedRedis
from fastdeploy_pd.launch.local import LocalCluster
from fastdeploy_pd.sim.report import summary

FLAGS = [
    "--ops",
    "torch",
    "--max-num-seqs",
    "32",
    "--max-num-batched-tokens",
    "512",
    "--num-gpu-blocks-override",
    "800",
]
ENV = {"OMP_NUM_THREADS": "1"}
CLI = [sys.executable, "-m", "fastdeploy_pd.entrypoints.cli"]
BLOCKS, BLOCK_TOKENS = 800, 64
KV_BYTES = 4096  # a token of the demo model; a link in memory is no limit
LENGTHS, NUM_OUTPUT = (32, 1500), (16, 64)


def offered(count: int, rate: float, seed: int) -> list[dict[str, Any]]:
    """Returns: rows of a trace, `rate` a second."""
    rng, rows, now_s = random.Random(seed), [], 0.0
    for _ in range(count):
        low, high = LENGTHS
        num_input = round(low * (high / low) ** rng.random())
        rows.append(
            {
                "timestamp": now_s * 1e3,
                "input_length": num_input,
                "output_length": rng.randint(*NUM_OUTPUT),
                "hash_ids": [],
            }
        )
        now_s += rng.expovariate(rate)
    return rows


async def serve(url: str, rows: list[dict[str, Any]]) -> list[Answer]:
    """Returns: the answers, each request sent when it is due."""
    rng = random.Random(7)
    prompts = [[rng.randrange(10, 1500) for _ in range(r["input_length"])] for r in rows]
    begun_s = asyncio.get_running_loop().time()

    async def one(row: dict[str, Any], prompt: list[int]) -> Answer:
        await asyncio.sleep(begun_s + row["timestamp"] / 1e3 - asyncio.get_running_loop().time())
        return await ask(url, "demo", prompt, row["output_length"])

    return await asyncio.gather(*(one(r, p) for r, p in zip(rows, prompts, strict=True)))


def real(rows: list[dict[str, Any]], profile: Path) -> list[Answer]:
    """Returns: what a prefill and a decode instance answer."""
    with (
        EmbeddedRedis() as redis,
        LocalCluster(redis.url, "fidelity", [*FLAGS, "--profile-path", str(profile)], ENV) as cluster,
    ):
        cluster.start(["prefill", "decode"])
        url = cluster.instances[1].http_url
        asyncio.run(serve(url, offered(12, 4.0, 99)))  # connections, first hand-overs
        return asyncio.run(serve(url, rows))


def calibrated(rows: list[dict[str, Any]], answers: list[Answer], latency_ms: float, out: Path) -> Path:
    """Returns: `out`, with the step times that these requests' times speak of."""
    log = out.with_suffix(".log")
    with log.open("w") as file:
        for row, answer in zip(rows, answers, strict=True):
            names = ("input_toks", "output_toks", "arrival_time", "queued_ts", "first_token_ts", "last_token_ts")
            times = (answer.sent_s, answer.sent_s, answer.event_s[0], answer.event_s[-1])
            values = (row["input_length"], row["output_length"], *times)
            file.write(json.dumps(dict(zip(names, values, strict=True))) + "\n")
    subprocess.run([*CLI, "calibrate", "--requests", str(log), "--json", str(out), *pool(latency_ms)], check=True)
    return out


def pool(latency_ms: float) -> list[str]:
    """Returns: the flags that say what the instances are like."""
    return [
        *("--layout", "1P1D", "--num-blocks", str(BLOCKS), "--block-size", str(BLOCK_TOKENS), "--max-num-seqs", "32"),
        *("--max-num-batched-tokens", "512", "--kv-bytes-per-token", str(KV_BYTES), "--kv-latency-ms", str(latency_ms)),
    ]


def simulated(rows: list[dict[str, Any]], profile: Path, latency_ms: float) -> list[dict[str, Any]]:
    """Returns: rows of the report."""
    with tempfile.TemporaryDirectory() as folder:
        trace, out = Path(folder) / "trace.jsonl", Path(folder) / "out.json"
        trace.write_text("".join(json.dumps(r) + "\n" for r in rows))
        flags = ["--trace", str(trace), "--latency", str(profile), "--no-prefix-caching", *pool(latency_ms)]
        command = [*CLI, "simulate", *flags, "--per-request", "--json", str(out)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found: list[dict[str, Any]] = json.loads(out.read_text())["requests"]
        return found


def prefill_s(coefficients: list[float], num_tokens: int) -> float:
    """Returns: what a prompt takes by itself."""
    a, b, c = coefficients
    return a * num_tokens**2 + b * num_tokens + c


def objectives(text: str) -> list[tuple[str, float, bool, float]]:
    """Returns: (as given, TTFT in ms or as a factor, whether it is one, TPOT in ms) of each."""
    found = []
    for pair in text.split(","):
        ttft, _, tpot = pair.partition("/")
        found.append((pair, float(ttft.removesuffix("x")), ttft.endswith("x"), float(tpot)))
    return found


def line(name: str, values: list[float]) -> str:
    """Returns: mean and percentiles, for a person."""
    found = summary(values)
    return f"{name:22}" + "".join(f"{k} {v:8.1f}   " for k, v in found.items() if v is not None)


def main() -> int:
    """Returns: exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--rate", type=float, default=1.5, help="requests/s (default 1.5)")
    parser.add_argument(
        "--slo",
        type=objectives,
        default="5x/100,1000/40,400/12,300/9,250/7",
        help="pairs of a TTFT (ms, or so many times what the prompt takes by itself, as calibrated) and a TPOT (ms) (default: %(default)s)",
    )
    parser.add_argument("--latency-ms", type=float, default=12.0, help="of a hand-over, besides steps (default 12)")
    parser.add_argument("--profile", type=Path, help="measured before; default: measured now")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        profile = args.profile or Path(folder) / "profile.json"
        if args.profile is None:
            command = [*CLI, "profile", "--model", "demo", *FLAGS, "--profile-path", str(profile)]
            subprocess.run(command, check=True, env={**os.environ, **ENV})
        rows = offered(args.requests, args.rate, 3)
        answers = real(rows, profile)
        fitted = calibrated(rows, answers, args.latency_ms, Path(folder) / "calibrated.json")
        found = {
            "real": [(a.ttft_s * 1e3, a.tpot_s * 1e3) for a in answers[1::2]],
            **{
                name: [(r["ttft_s"] * 1e3, r["tpot_ms"]) for r in simulated(rows, path, args.latency_ms)[1::2]]
                for name, path in (("profile", profile), ("calibrated", fitted))
            },
        }
        alone_ms = [1e3 * prefill_s(json.loads(fitted.read_text())["prefill"], r["input_length"]) for r in rows[1::2]]
    for name, pairs in found.items():
        sys.stdout.write(line(f"{name} TTFT ms", [t for t, _ in pairs]) + "\n")
        sys.stdout.write(line(f"{name} TPOT ms", [p for _, p in pairs]) + "\n")
    for text, ttft, is_factor, tpot_ms in args.slo:
        sys.stdout.write(f"in time by {text:10}")
        for name, pairs in found.items():
            limits = [ttft * ms if is_factor else ttft for ms in alone_ms]
            met = sum(t <= limit and p <= tpot_ms for (t, p), limit in zip(pairs, limits, strict=True)) / len(pairs)
            sys.stdout.write(f"   {name} {met:.1%}")
        sys.stdout.write("\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
