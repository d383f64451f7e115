"""TTFT, TPOT and tokens a second of 1P1D against one mixed instance on the demo model, and the hand-over's stages.

python -m benchmarks.bench_serving --json out.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from benchmarks.client import Answer, ask
from fastdeploy_pd.launch.embedded_redis import EmbeddedRedis
from fastdeploy_pd.launch.local import LocalCluster

PROMPT_TOKENS = (32, 512)
OUTPUT_TOKENS = 64


def percentile(values: list[float], share: float) -> float:
    """Returns: the value below which `share` of them lie."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


async def load(urls: list[str], concurrency: int, num_requests: int) -> dict[str, float]:
    """Keep `concurrency` requests in flight. Returns: the figures of the run."""
    rng = random.Random(1)
    limit = asyncio.Semaphore(concurrency)

    async def go(number: int) -> Answer:
        prompt = [rng.randrange(3, 2000) for _ in range(rng.choice(PROMPT_TOKENS))]
        async with limit:
            return await ask(urls[number % len(urls)], "demo", prompt, OUTPUT_TOKENS)

    start_s = time.perf_counter()
    answers = await asyncio.gather(*(go(n) for n in range(num_requests)))
    seconds = time.perf_counter() - start_s
    ttft, tpot = [a.ttft_s * 1000 for a in answers], [a.tpot_s * 1000 for a in answers]
    return {
        "concurrency": concurrency,
        "ttft_p50_ms": percentile(ttft, 0.5), "ttft_p99_ms": percentile(ttft, 0.99),
        "tpot_p50_ms": percentile(tpot, 0.5), "tpot_p99_ms": percentile(tpot, 0.99),
        "output_tokens_per_s": num_requests * OUTPUT_TOKENS / seconds,
    }  # fmt: skip


def handover_totals(urls: list[str]) -> Counter[str]:
    """Returns: of all instances together, the sum (seconds), count and buckets of each hand-over stage, and bytes, since their start."""
    totals: Counter[str] = Counter()
    for url in urls:
        for line in httpx.get(url + "/metrics").text.splitlines():
            name, _, value = line.rpartition(" ")
            if name.startswith("fastdeploy_pd:handover_stage_seconds_"):
                kind = name.split("seconds_")[1].split("{")[0]
                stage = name.split('stage="')[1].split('"')[0]
                limit = " " + name.split('le="')[1].split('"')[0] if kind == "bucket" else ""
                totals[f"{kind} {stage}{limit}"] += float(value)
            elif name.startswith("fastdeploy_pd:handover_bytes_total"):
                totals["bytes"] += float(value)
    return totals


def stage_median_ms(totals: Counter[str], stage: str) -> float:
    """Returns: a hand-over stage's median in milliseconds, evenly spread within its bucket."""
    start = f"bucket {stage} "
    counts = sorted((float(name.removeprefix(start)), n) for name, n in totals.items() if name.startswith(start))
    half, (least, before) = counts[-1][1] / 2, (0.0, 0.0)
    for most, count in counts:
        if count >= half:
            return 1e3 * (least + (most - least) * (half - before) / (count - before)) if count > before else 1e3 * most
        least, before = most, count
    return math.nan


def stage_means(totals: Counter[str]) -> dict[str, float]:
    """Returns: mean milliseconds of each hand-over stage, how many there were, and bytes."""
    counts = {name[6:]: count for name, count in totals.items() if name.startswith("count ") and count}
    means = {f"{stage}_ms": totals[f"sum {stage}"] / count * 1000 for stage, count in counts.items()}
    return {**means, "count": max(counts.values(), default=0), "bytes": totals["bytes"]}


def run(ops: str, num_requests: int) -> dict[str, Any]:
    """Returns: the figures of each topology."""
    results: dict[str, Any] = {}
    env = {"OMP_NUM_THREADS": "1"}
    for name, roles, protocol in (
        ("mixed", ["mixed"], "shm,tcp"),
        ("1P1D shm", ["prefill", "decode"], "shm"),
        ("1P1D tcp", ["prefill", "decode"], "tcp"),
    ):
        flags = [
            "--ops",
            ops,
            "--max-num-seqs",
            "16",
            "--cache-transfer-protocol",
            protocol,
            "--no-enable-prefix-caching",
        ]
        with EmbeddedRedis() as redis, LocalCluster(redis.url, "bench", flags, env) as cluster:
            urls = [i.http_url for i in cluster.start(roles)]
            asyncio.run(load(urls, 2, 4))
            results[name] = [asyncio.run(load(urls, c, num_requests)) for c in (1, 8)]
            if len(roles) > 1:
                results[name].append({"handover": stage_means(handover_totals(urls))})
    return results


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--ops", default="paddle")
    parser.add_argument("--requests", type=int, default=40)
    args = parser.parse_args()
    results = run(args.ops, args.requests)
    text = json.dumps(results, indent=1)
    sys.stdout.write(text + "\n")
    if args.json:
        args.json.write_text(text)


if __name__ == "__main__":
    main()
