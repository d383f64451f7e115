"""A client of streamed completions that costs little: it notes what arrives when, and reads it after the run.

httpx takes a tenth of a millisecond for an event; a cluster that emits ten thousand a second would be waiting for its client.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

TIMEOUT_S = 900.0
READ_BYTES = 1 << 18


@dataclass(slots=True)
class Answer:
    """One streamed answer; times are seconds of this machine's monotonic clock."""

    sent_s: float
    event_s: list[float] = field(default_factory=list)  #: when each event that carries tokens had arrived
    num_tokens: int = 0
    error: str = ""  #: why there is no whole answer

    @property
    def ttft_s(self) -> float:
        """Time to the first token."""
        return self.event_s[0] - self.sent_s

    @property
    def tpot_s(self) -> float:
        """Time for each token after the first."""
        return (self.event_s[-1] - self.event_s[0]) / max(1, self.num_tokens - 1)

    @property
    def e2e_s(self) -> float:
        """Time to the last token."""
        return self.event_s[-1] - self.sent_s

    @property
    def itl_s(self) -> list[float]:
        """Times between events."""
        return [after - before for before, after in pairwise(self.event_s)]


@dataclass(slots=True)
class Received:
    """What came of a stream, not looked at yet."""

    sent_s: float
    reads: list[tuple[float, bytes]] = field(default_factory=list)
    error: str = ""

    def answer(self) -> Answer:
        """Returns: what it says."""
        if self.error:
            return Answer(self.sent_s, error=self.error)
        data = b"".join(piece for _, piece in self.reads)
        head, _, body = data.partition(b"\r\n\r\n")
        if head.split(b" ", 2)[1:2] != [b"200"]:
            return Answer(self.sent_s, error=(head[:80] + b": " + body[:300]).decode(errors="replace"))
        return self._read(data, len(head) + 4)

    def _read(self, data: bytes, place: int) -> Answer:
        """An event never spans two chunks of HTTP, because servers send each as it is made; it may span two reads."""
        answer, reads, num_bytes = Answer(self.sent_s), iter(self.reads), 0
        arrived_s, is_whole = 0.0, b"data: [DONE]" in data[-100:]
        while (start := data.find(b"data: {", place)) >= 0:
            place = data.find(b"\n\n", start)
            if place < 0:
                break
            while num_bytes < place:
                arrived_s, piece = next(reads)
                num_bytes += len(piece)
            event: dict[str, Any] = json.loads(data[start + 6 : place])
            if "error" in event:
                return Answer(self.sent_s, error=str(event["error"]))
            if event.get("choices"):
                answer.event_s.append(arrived_s)
            if event.get("usage"):
                answer.num_tokens = event["usage"]["completion_tokens"]
        return answer if is_whole and answer.event_s else Answer(self.sent_s, error="the stream broke off")


async def post(
    url: str, path: str, body: bytes, headers: dict[str, str] | None = None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Send a JSON body. Returns: a connection that the server closes behind its answer. Raises: OSError."""
    target = urlsplit(url)
    reader, writer = await asyncio.open_connection(target.hostname, target.port)
    lines = {"Host": target.netloc, "Content-Type": "application/json", "Content-Length": str(len(body))}
    lines |= {"Connection": "close", **(headers or {})}
    head = f"POST {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    writer.write(head.encode() + b"\r\n" + body)
    return reader, writer


def completion(model: str, prompt: list[int], num_tokens: int) -> bytes:
    """Returns: a body that asks for exactly so many tokens, streamed, with usage at the end."""
    body = {"model": model, "prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
    return json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()


async def stream(url: str, body: bytes) -> Received:
    """Returns: everything that a server answers; what goes wrong is in its `error`."""
    received = Received(time.perf_counter())
    writer = None
    try:
        async with asyncio.timeout(TIMEOUT_S):
            reader, writer = await post(url, "/v1/completions", body)
            while data := await reader.read(READ_BYTES):
                received.reads.append((time.perf_counter(), data))
    except OSError as error:  # TimeoutError is one
        received.error = f"{type(error).__name__}: {error}"
    finally:
        if writer is not None:
            writer.close()
    return received


async def ask(url: str, model: str, prompt: list[int], num_tokens: int) -> Answer:
    """Returns: one answer. Raises: RuntimeError: it is not whole; says why."""
    answer = (await stream(url, completion(model, prompt, num_tokens))).answer()
    if answer.error or answer.num_tokens != num_tokens:
        raise RuntimeError(answer.error or f"{answer.num_tokens} tokens came instead of {num_tokens}")
    return answer
