"""The front end alone: streams and tokens a second of one API process over a stub engine, and the latency it adds.

    python -m benchmarks.bench_frontend --json out.json
The server runs in a process of its own under uvicorn and uvloop; the clients are raw sockets in this one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from fastdeploy_pd.config import DEMO_MODEL
from fastdeploy_pd.entrypoints.openai.app import create_app
from fastdeploy_pd.entrypoints.tokenizer import Tokenizer
from fastdeploy_pd.launch.embedded_redis import free_port
from tests.entrypoints.stub import StubEngine, stub_options

NUM_TOKENS = 300


def serve(port: int, pace_s: float) -> None:
    """Run the server."""
    import uvicorn

    tokenizer = Tokenizer.from_directory(DEMO_MODEL)
    app = create_app(StubEngine(tokenizer.encode(" one two three"), pace_s), tokenizer, stub_options())
    uvicorn.run(app, host="127.0.0.1", port=port, http="httptools", loop="auto", log_level="warning", access_log=False)


async def stream(port: int, gaps: list[float]) -> None:
    """One streamed completion over a raw connection; records the times between reads."""
    body = json.dumps(
        {"model": "demo", "prompt": "x", "max_tokens": NUM_TOKENS, "ignore_eos": True, "temperature": 0, "stream": True}
    ).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    last_s = time.perf_counter()
    tail = b""
    while b"[DONE]" not in tail:
        data = await reader.read(1 << 16)
        if not data:
            raise RuntimeError("the stream broke off")
        now_s = time.perf_counter()
        gaps.append(now_s - last_s)
        last_s, tail = now_s, (tail + data)[-64:]
    writer.close()


async def load(port: int, num_streams: int) -> tuple[float, list[float]]:
    """Returns: seconds for all streams, and the gaps between reads."""
    gaps: list[float] = []
    start_s = time.perf_counter()
    await asyncio.gather(*(stream(port, gaps) for _ in range(num_streams)))
    return time.perf_counter() - start_s, gaps


def measure(num_streams: int, pace_s: float) -> dict[str, float]:
    """Start a server, load it, end it."""
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.bench_frontend", "--serve", str(port), "--pace", str(pace_s)]
    server = subprocess.Popen(command, env={**os.environ})
    try:
        for _ in range(200):
            try:
                asyncio.run(load(port, 1))
                break
            except OSError:
                time.sleep(0.1)
        before = os.times()
        ticks = os.sysconf("SC_CLK_TCK")
        cpu_before = (
            sum(int(x) for x in Path(f"/proc/{server.pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]) / ticks
        )
        seconds, gaps = asyncio.run(load(port, num_streams))
        cpu_s = (
            sum(int(x) for x in Path(f"/proc/{server.pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]) / ticks
            - cpu_before
        )
        del before
    finally:
        server.terminate()
        server.wait()
    gaps.sort()
    added = [g - pace_s for g in gaps]
    return {
        "streams": num_streams, "pace_ms": pace_s * 1000, "tokens_per_s": num_streams * NUM_TOKENS / seconds,
        "tokens_per_core_s": num_streams * NUM_TOKENS / max(cpu_s, 1e-9),
        "added_p50_ms": added[len(added) // 2] * 1000, "added_p99_ms": added[int(len(added) * 0.99)] * 1000,
    }  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", type=int)
    parser.add_argument("--pace", type=float, default=0.0)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.pace)
        return
    results = [measure(n, p) for p in (0.0, 0.02) for n in (64, 256)]
    text = json.dumps(results, indent=1)
    sys.stdout.write(text + "\n")
    if args.json:
        args.json.write_text(text)


if __name__ == "__main__":
    main()
