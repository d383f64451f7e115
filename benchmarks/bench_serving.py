"""TTFT, TPOT and tokens a second of 1P1D against one mixed instance on the demo model, and the hand-over's stages.

python -m benchmarks.bench_serving --json out.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from fastdeploy_pd.launch.embedded_redis import EmbeddedRedis
from fastdeploy_pd.launch.local import LocalCluster

PROMPT_TOKENS = (32, 512)
OUTPUT_TOKENS = 64


def percentile(values: list[float], share: float) -> float:
    """Returns: the value below which `share` of them lie."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


async def one(client: httpx.AsyncClient, url: str, prompt: list[int]) -> tuple[float, float]:
    """Returns: TTFT and TPOT in seconds, as a client sees them."""
    body = {"model": "demo", "prompt": prompt, "max_tokens": OUTPUT_TOKENS, "temperature": 0, "ignore_eos": True}
    start_s, first_s, last_s, count = time.perf_counter(), 0.0, 0.0, 0
    request = {**body, "stream": True, "return_token_ids": True}
    async with client.stream("POST", url + "/v1/completions", json=request) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                last_s = time.perf_counter()
                first_s = first_s or last_s
                count += len(json.loads(line[6:])["choices"][0].get("token_ids", ()))
    if count != OUTPUT_TOKENS:
        raise RuntimeError(f"{count} tokens came instead of {OUTPUT_TOKENS}")
    return first_s - start_s, (last_s - first_s) / (count - 1)


async def load(urls: list[str], concurrency: int, num_requests: int) -> dict[str, float]:
    """Keep `concurrency` requests in flight. Returns: the figures of the run."""
    rng = random.Random(1)
    limit = asyncio.Semaphore(concurrency)
    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=concurrency)) as client:

        async def go(number: int) -> tuple[float, float]:
            prompt = [rng.randrange(3, 2000) for _ in range(rng.choice(PROMPT_TOKENS))]
            async with limit:
                return await one(client, urls[number % len(urls)], prompt)

        start_s = time.perf_counter()
        results = await asyncio.gather(*(go(n) for n in range(num_requests)))
        seconds = time.perf_counter() - start_s
    ttft, tpot = [r[0] * 1000 for r in results], [r[1] * 1000 for r in results]
    return {
        "concurrency": concurrency,
        "ttft_p50_ms": percentile(ttft, 0.5), "ttft_p99_ms": percentile(ttft, 0.99),
        "tpot_p50_ms": percentile(tpot, 0.5), "tpot_p99_ms": percentile(tpot, 0.99),
        "output_tokens_per_s": num_requests * OUTPUT_TOKENS / seconds,
    }  # fmt: skip


def stage_means(urls: list[str]) -> dict[str, float]:
    """Returns: mean milliseconds of each hand-over stage, and bytes, from the instances' metrics."""
    sums: dict[str, float] = {}
    counts: dict[str, float] = {}
    num_bytes = 0.0
    for url in urls:
        for line in httpx.get(url + "/metrics").text.splitlines():
            if line.startswith("fastdeploy_pd:handover_stage_seconds_") and "bucket" not in line:
                stage, value = line.split('stage="')[1].split('"')[0], float(line.rsplit(" ", 1)[1])
                target = sums if "_sum{" in line else counts
                target[stage] = target.get(stage, 0.0) + value
            elif line.startswith("fastdeploy_pd:handover_bytes_total"):
                num_bytes += float(line.rsplit(" ", 1)[1])
    means = {f"{s}_ms": sums[s] / counts[s] * 1000 for s in sums if counts.get(s)}
    return {**means, "count": max(counts.values(), default=0.0), "bytes": num_bytes}


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
                results[name].append({"handover": stage_means(urls)})
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
