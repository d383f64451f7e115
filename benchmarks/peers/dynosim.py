"""NVIDIA's DynoSim (`dynamo.replay` of ai-dynamo 1.4.2, with numpy) serving the same trace with the same step times, judged as ours is."""

from __future__ import annotations

import gzip
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from fastdeploy_pd.sim import latency, trace
from fastdeploy_pd.sim.report import Slo, summary

CONTEXTS, BATCHES = 100, 100
MAX_CONTEXT, MOST_TOKENS, MOST_STREAMS = 131_072, 3_000_000, 256
BLOCK_TOKENS = 64
SLO = Slo(5.0, 100.0)

#: run by the peer's Python: the grids as DynoSim reads them
SAVE = "import sys, json, numpy; numpy.savez(sys.argv[1], **{k: numpy.array(v, float) for k, v in json.load(sys.stdin).items()})"


def replay(
    peer: str, path: Path, most: int | None, grids: Path, profile: str, rate: float, layout: str, router: str
) -> dict[str, Any]:
    """
    Args:
        peer: a Python that has ai-dynamo and numpy.
        most: the trace's first so many requests alone.
        grids: the folder of the profile; decode is linearised as DynoSim wants it.
        layout: 8M, or as 6P2D.
        router: kv_router or round_robin.
    Returns: `slo_attainment`, of all offered requests, and `ttft_s` and `tpot_ms`.
    """
    requests = trace.load(path, most)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_grids(peer, grids, profile, folder / "grids.npz")
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        (folder / "trace.jsonl").write_bytes(b"".join(data.splitlines(keepends=True)[:most]))
        command = [
            *(peer, "-m", "dynamo.replay", str(folder / "trace.jsonl"), "--trace-format", "mooncake"),
            *("--trace-block-size", "512", "--replay-mode", "offline", "--router-mode", router),
            *("--arrival-speedup-ratio", str(rate / trace.own_rate(requests))),
            *("--report-json", str(folder / "r.json"), "--report-jsonl", str(folder / "r.jsonl")),
            *_engine_flags(profile, layout, folder / "grids.npz"),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"DynoSim ended with status {done.returncode}:\n{done.stderr[-2000:]}")
        rows = [json.loads(line) for line in (folder / "r.jsonl").read_text().splitlines()]
    return judge(rows, latency.read(grids, profile))


def judge(rows: list[dict[str, Any]], times: latency.Latency) -> dict[str, Any]:
    """Returns: of DynoSim's own rows what `simulate` reports; a request of one token has no TPOT."""
    ttfts, tpots, num_met = [], [], 0
    for row in rows:
        if row["terminal_status"] != "completed":
            continue
        num_later = row["output_length"] - 1
        tpot_ms = (row["last_token_ms"] - row["first_token_ms"]) / max(1, num_later)
        ttfts.append(row["ttft_ms"] / 1e3)
        tpots.append(tpot_ms if num_later else None)
        is_early = row["ttft_ms"] <= SLO.ttft_x * times.prefill_ms(row["input_length"])
        num_met += is_early and tpot_ms <= SLO.tpot_ms
    return {"slo_attainment": num_met / len(rows), "ttft_s": summary(ttfts), "tpot_ms": summary(tpots)}


def _engine_flags(profile: str, layout: str, grids: Path) -> list[str]:
    num_tokens, kv_bytes = latency.KNOWN_POOLS[profile]
    engine = {
        "block_size": BLOCK_TOKENS,
        "num_gpu_blocks": num_tokens // BLOCK_TOKENS,
        "planner_profile_data": str(grids),
        "kv_bytes_per_token": kv_bytes,
        "kv_transfer_bandwidth": 50,
    }
    if layout.endswith("M"):
        return ["--num-workers", layout[:-1], "--extra-engine-args", json.dumps(engine)]
    num_prefill, num_decode = layout.removesuffix("D").split("P")
    flags = ["--num-prefill-workers", num_prefill, "--num-decode-workers", num_decode]
    for role in ("prefill", "decode"):
        flags += [f"--{role}-engine-args", json.dumps({**engine, "worker_type": role})]
    return flags


def _write_grids(peer: str, grids: Path, profile: str, out: Path) -> None:
    """Write a profile as DynoSim reads it: prefill by prompt length, decode by KV tokens and mean context."""
    grid, fitted = latency.read(grids, profile), latency.read(grids, profile, "dynosim")
    lengths = sorted([128 << i for i in range(11)] + [3072 << i for i in range(6)])
    tokens = [MOST_TOKENS * i / (BATCHES - 1) for i in range(BATCHES)]
    contexts = [64 + (MAX_CONTEXT - 64) * i / (CONTEXTS - 1) for i in range(CONTEXTS)]
    values = {
        "prefill_isl": lengths,
        "prefill_ttft_ms": [grid.prefill_ms(n) for n in lengths],
        "decode_active_kv_tokens": tokens,
        "decode_context_length": contexts,
        "decode_itl": [
            [fitted.decode_curve(min(MOST_STREAMS, max(1, round(k / c))))(k) for c in contexts] for k in tokens
        ],
    }
    subprocess.run([peer, "-c", SAVE, str(out)], input=json.dumps(values), text=True, check=True)
