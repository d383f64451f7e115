"""The front end alone: how many streamed tokens a core carries, and how much later than the engine a client sees them.

    python -m benchmarks.bench_frontend --json out.json

A server process runs the real application over an engine that emits one character a token and stream at each step; a client process
reads all streams from raw sockets. The loads: "plain" is a bare FastAPI application that streams ready bytes, one event a turn of the
loop, to compare with; "lockstep" starts the next step when every stream has taken the last one (one event a
token: what the code path costs), "bundles" does so with eight tokens a step (what comes together goes out together), "paced" makes
a step every 25 ms, as a decode batch does, and compares when each token was emitted with when it was received.
Tokens a core and second are tokens over the server process's CPU time, the stub engine's own included.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from starlette.types import ASGIApp

from fastdeploy_pd.engine.client import Mailbox
from fastdeploy_pd.engine.client_api import HealthReport
from fastdeploy_pd.entrypoints.openai.app import create_app
from fastdeploy_pd.entrypoints.openai.http_protocol import BoundedHttpProtocol
from fastdeploy_pd.entrypoints.serving import ServingOptions
from fastdeploy_pd.entrypoints.tokenizer import Tokenizer
from fastdeploy_pd.flags import DEMO_MODEL
from fastdeploy_pd.request import FinishReason, Request, TokenChunk

LETTER = b"Z"  # what every token decodes to; nothing else in an event contains it
TOKENS = 1000
BUNDLE = 8
PACE_S = 0.025
TIMEOUT_S = 120.0
LOADS = ("plain", "lockstep", "bundles", "paced")


class SteppedEngine:
    """An `EngineClient` whose streams all get tokens at each step, from when they are all there."""

    def __init__(self, token_id: int, num_streams: int, bundle: int, pace_s: float) -> None:
        self._token_id, self._num_streams = token_id, num_streams
        self._bundle, self._pace_s = bundle, pace_s
        self._streams: dict[str, Mailbox] = {}
        self._num_untaken = 0
        self._taken = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.step_s: list[float] = []  #: when each token index was emitted
        self.cpu_s = 0.0
        self.kernel_s = 0.0  #: of cpu_s: mostly writes to sockets

    async def generate(self, request: Request) -> AsyncIterator[list[TokenChunk]]:
        """Yield what each step emits."""
        mailbox = self._streams[request.request_id] = Mailbox()
        if len(self._streams) == self._num_streams:
            self._task = asyncio.create_task(self._run())
        while True:
            chunks = await mailbox.take()
            yield chunks
            self._num_untaken -= 1
            if self._num_untaken <= 0:
                self._taken.set()
            if chunks[-1].finish_reason is not None:
                return

    async def _run(self) -> None:
        before, start_s, num_steps = resource.getrusage(resource.RUSAGE_SELF), time.monotonic(), 0
        for index in range(0, TOKENS, self._bundle):
            count = min(self._bundle, TOKENS - index)
            if self._pace_s:
                await asyncio.sleep(start_s + num_steps * self._pace_s - time.monotonic())
                num_steps += 1
            self._taken.clear()
            self._num_untaken = len(self._streams)
            self.step_s += [time.monotonic()] * count
            for request_id, mailbox in self._streams.items():
                for k in range(count):
                    mailbox.put(self._chunk(request_id, index + k))
            if not self._pace_s and index + count < TOKENS:
                await self._taken.wait()
        await asyncio.sleep(0.3)
        after = resource.getrusage(resource.RUSAGE_SELF)
        self.kernel_s = after.ru_stime - before.ru_stime
        self.cpu_s = self.kernel_s + after.ru_utime - before.ru_utime

    def _chunk(self, request_id: str, index: int) -> TokenChunk:
        reason = FinishReason.LENGTH if index == TOKENS - 1 else None
        return TokenChunk(request_id, 1, index, (self._token_id,), reason)

    async def health(self) -> HealthReport:
        """Returns: the measurements, for the client."""
        return HealthReport(True, {"step_s": self.step_s, "cpu_s": self.cpu_s, "kernel_s": self.kernel_s})


def plain_app() -> FastAPI:
    """Returns: what any stream costs with this server: no engine, no text, no requests to keep apart."""
    app = FastAPI()
    head = (
        b'data: {"id":"chatcmpl-%032x","object":"chat.completion.chunk","created":1700000000,"model":"m","choices":['
        % 0
    )
    data = head + b'{"index":0,"delta":{"content":"%s"},"logprobs":null,"finish_reason":null}]}\n\n' % LETTER
    before: list[resource.struct_rusage] = []

    async def events() -> AsyncIterator[bytes]:
        before.append(resource.getrusage(resource.RUSAGE_SELF))
        for _ in range(TOKENS):
            yield data
            await asyncio.sleep(0)

    @app.post("/v1/chat/completions")
    async def stream() -> StreamingResponse:
        return StreamingResponse(events(), media_type="text/event-stream")

    @app.get("/health")
    async def health() -> dict[str, Any]:
        after = resource.getrusage(resource.RUSAGE_SELF)
        kernel_s = after.ru_stime - before[0].ru_stime
        return {"step_s": [], "kernel_s": kernel_s, "cpu_s": kernel_s + after.ru_utime - before[0].ru_utime}

    return app


def cluster_app(arguments: argparse.Namespace) -> ASGIApp:
    """Returns: the real application over a `SteppedEngine`."""
    tokenizer = Tokenizer.from_directory(DEMO_MODEL)
    token_id = tokenizer.encode(LETTER.decode())[0]
    engine = SteppedEngine(token_id, arguments.streams, arguments.bundle, arguments.pace_s)
    return create_app(engine, tokenizer, ServingOptions(("m",), 4096, tokenizer.vocab_size))


def serve(arguments: argparse.Namespace) -> None:
    """The server process."""
    app = plain_app() if arguments.plain else cluster_app(arguments)
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    part = Path(arguments.port_file + ".part")
    part.write_text(str(listener.getsockname()[1]))
    part.rename(arguments.port_file)
    config = uvicorn.Config(
        app, loop=arguments.loop, http=BoundedHttpProtocol, log_level="error", access_log=False, lifespan="off"
    )
    uvicorn.Server(config).run(sockets=[listener])


def read_streams(port: int, num_streams: int) -> list[list[tuple[float, bytes]]]:
    """Returns: for each stream, what arrived when."""
    body = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": TOKENS, "stream": True}
    data = json.dumps(body).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
    arrivals: list[list[tuple[float, bytes]]] = [[] for _ in range(num_streams)]
    with selectors.DefaultSelector() as selector:
        for number in range(num_streams):
            connection = socket.create_connection(("127.0.0.1", port))
            connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(data) + data)
            connection.setblocking(False)
            selector.register(connection, selectors.EVENT_READ, (connection, arrivals[number]))
        num_open, deadline_s = num_streams, time.monotonic() + TIMEOUT_S
        while num_open:
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"{num_open} of {num_streams} streams did not end within {TIMEOUT_S:g} s")
            for key, _ in selector.select(1.0):
                connection, arrived = key.data
                received = connection.recv(1 << 18)
                arrived.append((time.monotonic(), received))
                if not received or received.endswith(b"0\r\n\r\n"):
                    selector.unregister(connection)
                    connection.close()
                    num_open -= 1
    return arrivals


def latencies_s(arrivals: list[list[tuple[float, bytes]]], step_s: list[float]) -> list[float]:
    """Returns: for every token, seconds between its emission and its arrival."""
    found = []
    for stream in arrivals:
        number = 0
        for arrived_s, data in stream:
            events = data.partition(b"\r\n\r\n")[2] if data.startswith(b"HTTP") else data
            for _ in range(events.count(LETTER)):
                found.append(arrived_s - step_s[number])
                number += 1
        if number != TOKENS:
            raise ValueError(f"a stream had {number} tokens, not {TOKENS}")
    return found


def get_health(port: int) -> dict[str, Any]:
    """Returns: what the server's engine measured."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n")
        data = b""
        while received := connection.recv(65536):
            data += received
    measured: dict[str, Any] = json.loads(data.partition(b"\r\n\r\n")[2])
    return measured


def measure(load: str, num_streams: int, loop: str) -> dict[str, Any]:
    """Returns: one row of results."""
    bundle, pace_s = (BUNDLE if load == "bundles" else 1), (PACE_S if load == "paced" else 0.0)
    with tempfile.TemporaryDirectory() as directory:
        port_file = Path(directory) / "port"
        command = [sys.executable, "-m", "benchmarks.bench_frontend", "--serve", "--streams", str(num_streams)]
        command += ["--bundle", str(bundle), "--pace-s", str(pace_s), "--loop", loop, "--port-file", str(port_file)]
        command += ["--plain"] if load == "plain" else []
        server = subprocess.Popen(command)
        try:
            while not port_file.exists():
                if server.poll() is not None:
                    raise RuntimeError(f"the server ended with status {server.returncode}")
                time.sleep(0.02)
            arrivals = read_streams(int(port_file.read_text()), num_streams)
            time.sleep(0.5)
            measured = get_health(int(port_file.read_text()))
        finally:
            server.terminate()
            server.wait()
    return row(load, num_streams, loop, arrivals, measured)


def row(
    load: str, num_streams: int, loop: str, arrivals: list[list[tuple[float, bytes]]], measured: dict[str, Any]
) -> dict[str, Any]:
    """Returns: the figures of one measurement."""
    tokens = num_streams * TOKENS
    first_s = min(s[0][0] for s in arrivals)
    figures = {}
    if measured["step_s"]:
        first_s = measured["step_s"][0]
        cuts_s = statistics.quantiles(latencies_s(arrivals, measured["step_s"]), n=100)
        figures = {"added_p50_ms": round(1e3 * cuts_s[49], 2), "added_p99_ms": round(1e3 * cuts_s[98], 2)}
    wall_s = max(s[-1][0] for s in arrivals) - first_s
    return {
        "load": load,
        "streams": num_streams,
        "loop": loop,
        "tokens": tokens,
        "tokens_per_s": round(tokens / wall_s),
        "tokens_per_core_s": round(tokens / measured["cpu_s"]),
        "cpu_us_per_token": round(1e6 * measured["cpu_s"] / tokens, 2),
        "kernel_us_per_token": round(1e6 * measured["kernel_s"] / tokens, 2),
        **figures,
    }


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--loop", choices=("uvloop", "asyncio"), default="uvloop", help="the server's event loop")
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=list(LOADS))
    parser.add_argument("--num-streams", nargs="+", type=int, default=[64, 256])
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--streams", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--bundle", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--pace-s", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--port-file", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments)
        return
    rows = []
    for load in arguments.loads:
        for num_streams in arguments.num_streams:
            rows.append(measure(load, num_streams, arguments.loop))
            sys.stdout.write(json.dumps(rows[-1]) + "\n")
            sys.stdout.flush()
    if arguments.json:
        result = {"num_cores": os.cpu_count(), "pace_ms": 1000 * PACE_S, "rows": rows}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
