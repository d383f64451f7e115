"""From a validated body to requests, and from token chunks to text: what HTTP and Redis submissions share."""

from __future__ import annotations

import hashlib
import secrets
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastdeploy_pd.entrypoints.openai.protocol import ChatBody, CompletionBody, GenerationBody
from fastdeploy_pd.entrypoints.tokenizer import IncrementalDetokenizer, StopMatcher, Tokenizer
from fastdeploy_pd.errors import ContextLengthExceeded, InvalidRequest, ModelNotFound
from fastdeploy_pd.model.checkpoint import ModelConfig, read_json
from fastdeploy_pd.request import FinishReason, Request, SamplingParams, TokenChunk, TokenLogprobs

DEFAULT_COMPLETION_TOKENS = 16


@dataclass(frozen=True, slots=True)
class ServingOptions:
    """What the API serves."""

    model_names: tuple[str, ...]
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...] = ()
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    #: generation_config.json's temperature, top_p, top_k, where a body says nothing
    sampling_defaults: dict[str, Any] = field(default_factory=dict)
    created_unix_s: int = 0


def serving_options_from_directory(
    directory: Path, model_names: tuple[str, ...], max_model_len: int, api_keys: tuple[str, ...], created_unix_s: int
) -> ServingOptions:
    """Returns: options for a checkpoint. Raises: ModelLoadError."""
    model = ModelConfig.from_directory(directory)
    defaults: dict[str, Any] = {}
    if (directory / "generation_config.json").exists():
        generation = read_json(directory / "generation_config.json")
        if generation.get("do_sample", True):
            defaults = {n: generation[n] for n in ("temperature", "top_p", "top_k") if generation.get(n) is not None}
    return ServingOptions(
        model_names, max_model_len, model.vocab_size, model.eos_token_ids, api_keys, defaults, created_unix_s
    )


@dataclass(slots=True)
class Choice:
    """One answer of several: its request and the text made of it so far."""

    index: int
    request: Request
    prompt_text: str | None  #: of a text prompt, for echo
    detokenizer: IncrementalDetokenizer
    matcher: StopMatcher
    num_output: int = 0
    text_length: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    num_cached_tokens: int = 0
    served_by: list[str] = field(default_factory=list)
    num_kv_bytes: int = 0
    is_scoring: bool = False  #: max_tokens 0: one token is computed, for the prompt's log-probabilities, and not shown


@dataclass(frozen=True, slots=True)
class Delta:
    """What new tokens add to an answer."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    prompt_logprobs: tuple[TokenLogprobs | None, ...]
    finish_reason: FinishReason | None


class Serving:
    """Makes requests out of bodies, and text out of chunks."""

    def __init__(self, tokenizer: Tokenizer, options: ServingOptions) -> None:
        self.tokenizer = tokenizer
        self.options = options

    def choices(
        self, body: GenerationBody, request_id: str, seed: int | None = None, delivered: Sequence[int] = ()
    ) -> list[Choice]:
        """One choice a prompt and a count of `n`.

        Args:
            request_id: of the whole; a choice's is derived from it.
            seed: what a body without a seed gets; random when None.
            delivered: output tokens the client has already (of a resumed request with one choice).
        Raises: InvalidRequest, ModelNotFound, ContextLengthExceeded.
        """
        if body.model not in self.options.model_names:
            raise ModelNotFound(
                f"The model '{body.model}' does not exist; this server has {', '.join(self.options.model_names)}."
            )
        if body.stream_options is not None and not body.stream:
            raise InvalidRequest(
                "The 'stream_options' parameter is only allowed when 'stream' is enabled.", param="stream_options"
            )
        prompts = self._prompts(body)
        base_seed = body.seed if body.seed is not None else seed if seed is not None else secrets.randbits(62)
        count = body.n or 1
        if len(prompts) * count > 64:
            raise InvalidRequest(f"{len(prompts)} prompts times n = {count} is more than 64", param="n")
        return [
            self._choice(body, request_id, index, ids, text, choice_seed(base_seed, index % count), delivered)
            for index, (ids, text) in enumerate(p for p in prompts for _ in range(count))
        ]

    def push(self, choice: Choice, chunks: Sequence[TokenChunk]) -> Delta:
        """Add chunks to an answer. When a stop string is found, the rest is dropped and the delta says that it has ended."""
        text, ids, logprobs = "", [], []
        prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
        for chunk in chunks:
            self._note(choice, chunk)
            prompt_logprobs = prompt_logprobs or chunk.prompt_logprobs
            if choice.is_scoring:
                choice.finish_reason = FinishReason.LENGTH
                break
            ends_by_token = chunk.finish_reason is FinishReason.STOP and chunk.token_ids
            visible = (
                chunk.token_ids[:-1]
                if ends_by_token and chunk.token_ids[-1] in choice.request.sampling.stop_token_ids
                else chunk.token_ids
            )
            piece, is_stopped = choice.matcher.push(choice.detokenizer.push(visible))
            ids += chunk.token_ids
            logprobs += chunk.logprobs
            text += piece
            choice.num_output += len(chunk.token_ids)
            if is_stopped:
                choice.finish_reason = FinishReason.STOP
                break
            if chunk.finish_reason is not None:
                tail, is_stopped = choice.matcher.push(choice.detokenizer.flush())
                text += tail if is_stopped else tail + choice.matcher.flush()
                choice.finish_reason = FinishReason.STOP if is_stopped else chunk.finish_reason
                break
        choice.text_length += len(text)
        return Delta(text, tuple(ids), tuple(logprobs), prompt_logprobs, choice.finish_reason)

    def _note(self, choice: Choice, chunk: TokenChunk) -> None:
        choice.num_cached_tokens = max(choice.num_cached_tokens, chunk.num_cached_tokens)
        choice.num_kv_bytes += chunk.num_kv_bytes
        if chunk.served_by and chunk.served_by not in choice.served_by:
            choice.served_by.append(chunk.served_by)

    def _prompts(self, body: GenerationBody) -> list[tuple[list[int], str | None]]:
        if isinstance(body, ChatBody):
            messages = [m.to_template() for m in body.messages]
            generation_prompt = body.add_generation_prompt is not False
            return [(self.tokenizer.encode_chat(messages, generation_prompt), None)]
        if not isinstance(body, CompletionBody):
            raise InvalidRequest("unknown kind of body")
        if body.best_of is not None and body.best_of != (body.n or 1):
            raise InvalidRequest(
                "'best_of' other than 'n' is not supported", param="best_of", code="unsupported_parameter"
            )
        prompt = body.prompt
        if isinstance(prompt, str):
            return [(self.tokenizer.encode(prompt), prompt)]
        if isinstance(prompt[0], int):
            return [(self._checked(prompt), None)]
        return [(self.tokenizer.encode(p), p) if isinstance(p, str) else (self._checked(p), None) for p in prompt]

    def _checked(self, token_ids: Any) -> list[int]:
        for token_id in token_ids:
            if token_id >= self.options.vocab_size:
                raise InvalidRequest(
                    f"token id {token_id} in 'prompt' is outside the vocabulary of {self.options.vocab_size}",
                    param="prompt",
                    code="invalid_value",
                )
        return list(token_ids)

    def _choice(
        self,
        body: GenerationBody,
        request_id: str,
        index: int,
        ids: list[int],
        text: str | None,
        seed: int,
        delivered: Sequence[int],
    ) -> Choice:
        if not ids:
            raise InvalidRequest("the prompt has no tokens", param="prompt", code="empty_string")
        sampling = self._sampling(body, ids, seed)
        request = Request(
            f"{request_id}-{index}",
            ids,
            sampling,
            self.options.eos_token_ids,
            cache_salt=body.cache_salt or "",
            priority=body.priority or 0,
            output_token_ids=list(delivered),
        )
        skip = body.skip_special_tokens is not False
        matcher = StopMatcher(sampling.stop, bool(body.include_stop_str_in_output))
        detokenizer = IncrementalDetokenizer(self.tokenizer, ids, skip)
        return Choice(index, request, text, detokenizer, matcher, is_scoring=body.max_tokens == 0)

    def _sampling(self, body: GenerationBody, ids: list[int], seed: int) -> SamplingParams:
        room = self.options.max_model_len - len(ids)
        wanted = body.max_tokens
        if isinstance(body, ChatBody):
            wanted = body.max_completion_tokens if body.max_completion_tokens is not None else wanted
        max_tokens = (
            wanted
            if wanted is not None
            else room
            if isinstance(body, ChatBody)
            else min(room, DEFAULT_COMPLETION_TOKENS)
        )
        if room < 1 or max_tokens > room:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {self.options.max_model_len} tokens. However, you requested "
                f"{len(ids) + max(max_tokens, 1)} tokens ({len(ids)} in the prompt, {max(max_tokens, 1)} for the answer).",
                param="messages" if isinstance(body, ChatBody) else "prompt",
            )
        if max_tokens == 0 and isinstance(body, ChatBody):
            raise InvalidRequest(
                "Invalid 'max_tokens': it must be at least 1, but got 0.",
                param="max_tokens",
                code="integer_below_min_value",
            )
        defaults = self.options.sampling_defaults

        def given(name: str, default: Any) -> Any:
            value = getattr(body, name)
            return value if value is not None else defaults.get(name, default)

        logprobs, prompt_logprobs = self._logprobs(body)
        stop = body.stop
        return SamplingParams(
            max_tokens=max(max_tokens, 1),
            min_tokens=body.min_tokens or 0,
            temperature=given("temperature", 1.0),
            top_p=given("top_p", 1.0),
            top_k=max(0, given("top_k", 0)),
            min_p=body.min_p or 0.0,
            seed=seed,
            repetition_penalty=body.repetition_penalty or 1.0,
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            logit_bias=self._biases(body.logit_bias or {}),
            stop=(stop,) if isinstance(stop, str) else tuple(stop or ()),
            stop_token_ids=tuple(body.stop_token_ids or ()),
            ignore_eos=bool(body.ignore_eos),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )

    def _logprobs(self, body: GenerationBody) -> tuple[int | None, int | None]:
        if isinstance(body, ChatBody):
            if body.top_logprobs and not body.logprobs:
                raise InvalidRequest("'top_logprobs' needs 'logprobs' to be true", param="top_logprobs")
            return (body.top_logprobs or 0) if body.logprobs else None, None
        count = body.logprobs if isinstance(body, CompletionBody) else None
        wants_prompt = count is not None and isinstance(body, CompletionBody) and body.echo
        return count, count if wants_prompt else None

    def _biases(self, biases: dict[str, float]) -> dict[int, float]:
        checked = {}
        for name, bias in biases.items():
            if not name.isascii() or not name.isdecimal() or int(name) >= self.options.vocab_size:
                raise InvalidRequest(
                    f"Invalid key in 'logit_bias': {name[:40]!r}; it must be a token id below {self.options.vocab_size}",
                    param="logit_bias",
                    code="invalid_value",
                )
            checked[int(name)] = bias
        return checked


def choice_seed(seed: int, index: int) -> int:
    """Returns: the seed of the index-th of n answers: the seed itself for the first, unrelated ones for the others."""
    if index == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def new_id(prefix: str) -> str:
    """Returns: an id that nobody else has."""
    return f"{prefix}-{uuid.uuid4().hex}"
