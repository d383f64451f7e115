"""A deterministic engine inside the test's process, and a real HTTP server around it."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import uvicorn

from fastdeploy_pd.engine.client_api import HealthReport
from fastdeploy_pd.entrypoints.openai.app import create_app
from fastdeploy_pd.entrypoints.openai.http_protocol import BoundedHttpProtocol
from fastdeploy_pd.entrypoints.serving import ServingOptions
from fastdeploy_pd.entrypoints.tokenizer import AnyTokenizer, Tokenizer
from fastdeploy_pd.errors import FastDeployPDError
from fastdeploy_pd.flags import DEMO_MODEL
from fastdeploy_pd.request import Request, TokenChunk, TokenLogprobs

MODEL = "demo"
EOS = Tokenizer.from_directory(DEMO_MODEL).encode("<|im_end|>")[0]
STORY = (
    "Once upon a time there was a small fox, and the fox asked: why do we split prefill and decode? "
    "Because they want different things, said the owl. 你好 🦊 naïve café. "
)


def default_options(**changes: object) -> ServingOptions:
    """Options for the demo model's tokenizer with a short context."""
    options = ServingOptions(
        (MODEL,), max_model_len=512, vocab_size=demo_tokenizer().vocab_size, eos_token_ids=(EOS,), created_unix_s=1
    )
    return replace(options, **changes)  # type: ignore[arg-type]


@dataclass
class StubEngine:
    """Implements EngineClient. The token at a position depends on the prompt, the seed and the position alone."""

    token_at: Callable[[Request, int], int]
    delay_s: float = 0.0
    tokens_a_yield: int = 1
    error: FastDeployPDError | None = None
    error_after: int = 0  #: tokens before the error
    is_ready: bool = True
    max_model_len: int = 512
    num_steps: int = 0
    requests: list[Request] = field(default_factory=list)
    num_running: int = 0
    num_aborted: int = 0

    async def generate(self, request: Request) -> AsyncIterator[list[TokenChunk]]:
        """Yield tokens until the request's own rules end it."""
        self.requests.append(request)
        work = Request.from_wire(request.to_wire())  # as another process would have it
        self.num_running += 1
        is_done = False
        try:
            while not is_done:
                await asyncio.sleep(self.delay_s)
                chunks = []
                for _ in range(self.tokens_a_yield):
                    if self.error is not None and len(work.output_token_ids) >= self.error_after:
                        is_done = True
                        raise self.error
                    chunks.append(self._step(work))
                    if chunks[-1].finish_reason is not None:
                        is_done = True
                        break
                yield chunks
        finally:
            self.num_running -= 1
            self.num_aborted += not is_done

    def _step(self, work: Request) -> TokenChunk:
        self.num_steps += 1
        index = len(work.output_token_ids)
        token_id = self.token_at(work, index)
        work.output_token_ids.append(token_id)
        count, prompt_count = work.sampling.logprobs, work.sampling.prompt_logprobs
        return TokenChunk(
            work.request_id,
            1,
            index,
            (token_id,),
            work.finish_reason_after(token_id, self.max_model_len),
            logprobs=(_logprobs(token_id, count),) if count is not None else (),
            prompt_logprobs=(None, *(_logprobs(t, prompt_count) for t in work.prompt_token_ids[1:]))
            if prompt_count is not None and index == 0
            else (),
            num_cached_tokens=3,
            served_by="P0" if index == 0 else "D0",
            num_kv_bytes=4096 if index == 1 else 0,
        )

    async def health(self) -> HealthReport:
        """Returns: what the test set."""
        return HealthReport(self.is_ready, {"instances": ["P0", "D0"]})


def _logprobs(token_id: int, count: int) -> TokenLogprobs:
    top = tuple(((token_id + i) % 1000, -0.5 - i) for i in range(count))
    return TokenLogprobs(token_id, -0.5, top)


def story_tokens(tokenizer: Tokenizer) -> Callable[[Request, int], int]:
    """Returns: a token function that tells STORY again and again, begun at a place that prompt and seed choose."""
    ids = tokenizer.encode(STORY)

    def token_at(request: Request, index: int) -> int:
        key = repr((request.prompt_token_ids, request.sampling.seed if request.sampling.temperature else 0))
        start = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "little")
        return ids[(start + index) % len(ids)]

    return token_at


def scripted(ids: list[int]) -> Callable[[Request, int], int]:
    """Returns: a token function that gives these ids and then the end of sequence."""
    return lambda _request, index: ids[index] if index < len(ids) else EOS


def demo_tokenizer() -> Tokenizer:
    """Returns: the demo model's."""
    return Tokenizer.from_directory(DEMO_MODEL)


@contextmanager
def serving(
    engine: StubEngine,
    options: ServingOptions | None = None,
    tokenizer: AnyTokenizer | None = None,
    **config: object,
) -> Iterator[str]:
    """Serve in a thread. Yields: the base URL."""
    app = create_app(
        engine, tokenizer or demo_tokenizer(), options or default_options(), metrics=lambda: (b"# none\n", "text/plain")
    )
    server = uvicorn.Server(
        uvicorn.Config(
            app, host="127.0.0.1", port=0, http=BoundedHttpProtocol, log_level="error", lifespan="off", **config
        )
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        waited = threading.Event()
        while not server.started and thread.is_alive():
            waited.wait(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        server.force_exit = True
        thread.join(10)
