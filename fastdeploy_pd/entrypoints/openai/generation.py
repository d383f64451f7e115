"""Runs the choices of one request side by side and measures them; chat and completions shape what comes out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any, Protocol

from fastdeploy_pd.clock import Clock
from fastdeploy_pd.engine.client_api import EngineClient
from fastdeploy_pd.entrypoints.serving import Choice, Delta, Serving
from fastdeploy_pd.errors import FastDeployPDError
from fastdeploy_pd.request import FinishReason, TokenChunk

LEAST_LOGPROB = -9999.0  # what OpenAI shows for a token that cannot be (JSON has no infinity)


class EndObserver(Protocol):
    """Receives the numbers of ended requests; see observe.metrics.FrontEndMetrics."""

    def ended(self, reason: str, num_prompt: int, num_output: int, ttft_s: float | None, e2e_s: float) -> None:
        """A request has ended."""
        ...


@dataclass(slots=True)
class Timing:
    """When one choice's tokens came, in seconds after its start."""

    start_s: float
    first_s: float | None = None
    last_s: float = 0.0


@dataclass(slots=True)
class Generation:
    """All choices of one HTTP request."""

    client: EngineClient
    serving: Serving
    choices: list[Choice]
    clock: Clock
    observer: EndObserver | None = None
    timings: list[Timing] = field(default_factory=list)

    def deltas(self) -> AsyncGenerator[tuple[Choice, Delta], None]:
        """Returns: what comes, of whichever choice. Closing it early aborts all of them."""
        start_s = self.clock.now_s()
        self.timings = [Timing(start_s) for _ in self.choices]
        # One choice alone is passed on as it is: each generator more costs every token.
        return self._one(self.choices[0], self.timings[0]) if len(self.choices) == 1 else self._several()

    async def _one(self, choice: Choice, timing: Timing) -> AsyncGenerator[tuple[Choice, Delta], None]:
        reason = "abort"
        stream = self.client.generate(choice.request)
        try:
            async for chunks in stream:
                delta = self._take(choice, timing, chunks)
                yield choice, delta
                if delta.finish_reason is not None:
                    reason = delta.finish_reason.value
                    return
        except FastDeployPDError:
            reason = "error"
            raise
        finally:
            await stream.aclose()
            self._ended(choice, timing, reason)

    def _take(self, choice: Choice, timing: Timing, chunks: list[TokenChunk]) -> Delta:
        timing.last_s = self.clock.now_s() - timing.start_s
        if timing.first_s is None:
            timing.first_s = timing.last_s
        return self.serving.push(choice, chunks)

    def _ended(self, choice: Choice, timing: Timing, reason: str) -> None:
        if self.observer is not None:
            e2e_s = self.clock.now_s() - timing.start_s
            self.observer.ended(reason, len(choice.request.prompt_token_ids), choice.num_output, timing.first_s, e2e_s)

    async def _several(self) -> AsyncGenerator[tuple[Choice, Delta], None]:
        arrived: asyncio.Queue[tuple[Choice, Delta] | FastDeployPDError | None] = asyncio.Queue()

        async def pump(choice: Choice, timing: Timing) -> None:
            try:
                async for item in self._one(choice, timing):
                    arrived.put_nowait(item)
            except FastDeployPDError as error:
                arrived.put_nowait(error)
                return
            arrived.put_nowait(None)

        tasks = [asyncio.create_task(pump(c, t)) for c, t in zip(self.choices, self.timings, strict=True)]
        try:
            num_open = len(tasks)
            while num_open:
                item = await arrived.get()
                if isinstance(item, FastDeployPDError):
                    raise item
                if item is None:
                    num_open -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def usage(self) -> dict[str, Any]:
        """Returns: OpenAI's usage object; a prompt with several answers counts once."""
        prompts = {id(c.request.prompt_token_ids): len(c.request.prompt_token_ids) for c in self.choices}
        cached: dict[int, int] = {}
        for choice in self.choices:
            key = id(choice.request.prompt_token_ids)
            cached[key] = max(cached.get(key, 0), choice.num_cached_tokens)
        num_prompt, num_output = sum(prompts.values()), sum(c.num_output for c in self.choices)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_output,
            "total_tokens": num_prompt + num_output,
            "prompt_tokens_details": {"cached_tokens": sum(cached.values())},
        }

    def report(self) -> dict[str, Any]:
        """Returns: our extension: who served the first choice, how fast, and the KV bytes that moved."""
        choice, timing = self.choices[0], self.timings[0]
        tpot_s = (timing.last_s - (timing.first_s or 0.0)) / (choice.num_output - 1) if choice.num_output > 1 else None
        return {
            "prefill": choice.served_by[0] if choice.served_by else None,
            "decode": choice.served_by[-1] if choice.served_by else None,
            "ttft_s": timing.first_s,
            "tpot_s": tpot_s,
            "kv_bytes": choice.num_kv_bytes,
        }


def reason_word(reason: FinishReason | None) -> str | None:
    """Returns: OpenAI's word for a finish reason."""
    return reason.value if reason is not None else None
