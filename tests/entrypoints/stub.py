"""An engine without a cluster: a function of the prompt, with an optional pace. It implements `EngineClient` completely."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from fastdeploy_pd.config import DEMO_MODEL
from fastdeploy_pd.engine.client_api import HealthReport
from fastdeploy_pd.entrypoints.serving import ServingOptions, serving_options_from_directory
from fastdeploy_pd.errors import FastDeployPDError
from fastdeploy_pd.request import FinishReason, Request, TokenChunk, TokenLogprobs

MAX_MODEL_LEN = 2048


class StubEngine:
    """Answers with a fixed cycle of tokens."""

    def __init__(self, tokens: list[int], pace_s: float = 0.0, error: FastDeployPDError | None = None) -> None:
        self.tokens, self.pace_s, self.error = tokens, pace_s, error
        self.num_aborted = 0
        self.requests: list[Request] = []

    async def health(self) -> HealthReport:
        """Always ready."""
        return HealthReport(True)

    async def generate(self, request: Request) -> AsyncIterator[list[TokenChunk]]:
        """Yield one token at a time."""
        self.requests.append(request)
        if self.error is not None:
            raise self.error
        start, has_ended = len(request.output_token_ids), False
        try:
            for index in range(start, request.sampling.max_tokens):
                if self.pace_s:
                    await asyncio.sleep(self.pace_s)
                token_id = self.tokens[index % len(self.tokens)]
                has_ended = index == request.sampling.max_tokens - 1
                yield [self._chunk(request, index, token_id, has_ended)]
        finally:
            self.num_aborted += not has_ended

    def _chunk(self, request: Request, index: int, token_id: int, is_last: bool) -> TokenChunk:
        entry = TokenLogprobs(token_id, -0.5, ((token_id, -0.5),))
        sampling = request.sampling
        prompt = (None, *(TokenLogprobs(t, -1.0, ((t, -1.0),)) for t in request.prompt_token_ids[1:]))
        return TokenChunk(
            request.request_id, 1, index, (token_id,), FinishReason.LENGTH if is_last else None,
            (entry,) if sampling.logprobs is not None else (),
            prompt if sampling.prompt_logprobs is not None and index == 0 else (),
        )  # fmt: skip


def stub_options(api_keys: tuple[str, ...] = ()) -> ServingOptions:
    """Options of the demo model."""
    return serving_options_from_directory(DEMO_MODEL, ("demo",), MAX_MODEL_LEN, api_keys, 0)
