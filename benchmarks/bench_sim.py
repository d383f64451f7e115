"""Our scheduling beside NVIDIA's, both simulated: the same trace, the same step times, the same objectives (docs/simulator.md).

    python -m benchmarks.bench_sim --trace conversation_trace.jsonl.gz --peer VENV/bin/python     # pip install ai-dynamo==1.4.2 numpy

Each setting is run by `fastdeploy-pd simulate` with `--placement slo --prefill-policy slack`, and by DynoSim (`dynamo.replay`) with its
KV-aware router in every layout; TTFT <= 5 x the unloaded prefill time and TPOT <= 100 ms, over all offered requests. DynoSim gets the grids
in its own form, decode linearised as it wants it. It needs no network.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from fastdeploy_pd.sim import latency, trace
from fastdeploy_pd.sim.report import Slo

DATA = Path(__file__).parents[1] / "tests" / "sim" / "data"
SETTINGS = (("70b-h200-tp4", 3.4), ("70b-h200-tp4", 6.8), ("8b-h200-tp1", 3.4), ("8b-h200-tp1", 10.2))
PEER_LAYOUTS = ("8M", "6P2D", "4P4D")
CONTEXTS, BATCHES = 100, 100
MAX_CONTEXT, MOST_TOKENS, MOST_STREAMS = 131_072, 3_000_000, 256
SLO = Slo(5.0, 100.0)
BLOCK_TOKENS = 64

#: run by the peer's Python: the grids as DynoSim reads them
SAVE = "import sys, json, numpy; numpy.savez(sys.argv[1], **{k: numpy.array(v, float) for k, v in json.load(sys.stdin).items()})"


def ours(path: Path, profile: str, rate: float, layout: str) -> dict[str, Any]:
    """Returns: attainment and percentiles of one run of ours."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [
            *(sys.executable, "-m", "fastdeploy_pd.entrypoints.cli", "simulate", "--trace", str(path), "--latency", str(DATA)),
            *("--profile", profile, "--layout", layout, "--rate", str(rate), "--json", str(out)),
            *("--placement", "slo", "--prefill-policy", "slack"),
        ]  # fmt: skip
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found = json.loads(out.read_text())
    return {"attainment": found["slo_attainment"], "ttft_s": found["ttft_s"], "tpot_ms": found["tpot_ms"]}


def peers_grids(peer: str, profile: str, out: Path) -> None:
    """Write a profile's grids in the form that DynoSim reads: prefill by prompt length, decode by KV tokens and mean context."""
    grid, fitted = latency.read(DATA, profile), latency.read(DATA, profile, "dynosim")
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


def peers(peer: str, path: Path, profile: str, rate: float, layout: str) -> dict[str, Any]:
    """Returns: attainment of one run of DynoSim."""
    requests = trace.load(path)
    num_tokens, kv_bytes = latency.KNOWN_POOLS[profile]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        peers_grids(peer, profile, folder / "grids.npz")
        plain = folder / "trace.jsonl"
        plain.write_bytes(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())
        engine = {
            "block_size": BLOCK_TOKENS,
            "num_gpu_blocks": num_tokens // BLOCK_TOKENS,
            "planner_profile_data": str(folder / "grids.npz"),
            "kv_bytes_per_token": kv_bytes,
            "kv_transfer_bandwidth": 50,
        }
        if layout.endswith("M"):
            flags = ["--num-workers", layout[:-1], "--extra-engine-args", json.dumps(engine)]
        else:
            num_prefill, num_decode = layout.removesuffix("D").split("P")
            flags = ["--num-prefill-workers", num_prefill, "--num-decode-workers", num_decode]
            for role in ("prefill", "decode"):
                flags += [f"--{role}-engine-args", json.dumps({**engine, "worker_type": role})]
        command = [
            *(peer, "-m", "dynamo.replay", str(plain), "--trace-format", "mooncake", "--trace-block-size", "512"),
            *("--replay-mode", "offline", "--arrival-speedup-ratio", str(rate / trace.own_rate(requests))),
            *("--router-mode", "kv_router", "--report-json", str(folder / "r.json"), "--report-jsonl", str(folder / "r.jsonl")),
        ]  # fmt: skip
        done = subprocess.run([*command, *flags], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"DynoSim ended with status {done.returncode}:\n{done.stderr[-2000:]}")
        rows = [json.loads(line) for line in (folder / "r.jsonl").read_text().splitlines()]
    grid, num_met = latency.read(DATA, profile), 0
    for row in rows:
        if row["terminal_status"] == "completed":
            tpot_ms = (row["last_token_ms"] - row["first_token_ms"]) / max(1, row["output_length"] - 1)
            is_early = row["ttft_ms"] <= SLO.ttft_x * grid.prefill_ms(row["input_length"])
            num_met += is_early and tpot_ms <= SLO.tpot_ms
    return {"attainment": num_met / len(rows)}


def main() -> int:
    """Returns: exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True, help="Mooncake's JSON lines, .gz or not")
    parser.add_argument("--peer", help="a Python that has ai-dynamo 1.4.2 and numpy; without it ours alone")
    parser.add_argument("--layout", default="8M", help="of ours (default 8M)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    for profile, rate in SETTINGS:
        row: dict[str, Any] = {"profile": profile, "rate": rate, "ours": ours(args.trace, profile, rate, args.layout)}
        line = f"{profile:14}{rate:6.1f} req/s   ours {args.layout} {row['ours']['attainment']:.1%}"
        for layout in PEER_LAYOUTS if args.peer else ():
            row[f"dynosim {layout}"] = peers(args.peer, args.trace, profile, rate, layout)
            line += f"   DynoSim {layout} {row[f'dynosim {layout}']['attainment']:.1%}"
        rows.append(row)
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
