"""From a validated body to requests, and from token chunks to text: what HTTP and Redis submissions share."""

from __future__ import annotations

import hashlib
import secrets
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastdeploy_pd.entrypoints.detokenizer import Detokenizer, StopMatcher, make_detokenizer
from fastdeploy_pd.entrypoints.openai.limits import MAX_SEQUENCES
from fastdeploy_pd.entrypoints.openai.protocol import ChatBody, CompletionBody, GenerationBody
from fastdeploy_pd.entrypoints.tokenizer import WITHOUT, AnyTokenizer, NoTokenizer
from fastdeploy_pd.errors import ContextLengthExceeded, InvalidRequest, ModelNotFound
from fastdeploy_pd.model.checkpoint import ModelConfig, read_json
from fastdeploy_pd.model.weights import model_directory
from fastdeploy_pd.request import FinishReason, Request, SamplingParams, Slo, TokenChunk, TokenLogprobs

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
    directory = model_directory(directory)
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
    detokenizer: Detokenizer
    matcher: StopMatcher
    is_scoring: bool = False  #: max_tokens 0: the one token that the engine makes is not shown
    is_stop_shown: bool = False  #: include_stop_str_in_output
    num_output: int = 0
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0
    served_by: list[str] = field(default_factory=list)
    num_kv_bytes: int = 0


@dataclass(slots=True)  # not frozen, like TokenChunk
class Delta:
    """What new tokens add to an answer."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    prompt_logprobs: tuple[TokenLogprobs | None, ...]
    finish_reason: FinishReason | None


class Serving:
    """Makes requests out of bodies, and text out of chunks."""

    def __init__(self, tokenizer: AnyTokenizer, options: ServingOptions) -> None:
        self.tokenizer = tokenizer
        self.options = options
        self.has_text = not isinstance(tokenizer, NoTokenizer)

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
        if body.stop and not self.has_text:
            raise InvalidRequest(
                f"this server {WITHOUT} and sees no stop strings; use 'stop_token_ids'",
                param="stop",
            )
        prompts = self._prompts(body)
        base_seed = body.seed if body.seed is not None else seed if seed is not None else secrets.randbits(63)
        count = body.n or 1
        if len(prompts) * count > MAX_SEQUENCES:
            raise InvalidRequest(f"{len(prompts)} prompts times n = {count} is more than {MAX_SEQUENCES}", param="n")
        return [
            self._choice(body, request_id, index, ids, text, choice_seed(base_seed, index % count), delivered)
            for index, (ids, text) in enumerate(p for p in prompts for _ in range(count))
        ]

    def push(self, choice: Choice, chunks: Sequence[TokenChunk]) -> Delta:
        """Add chunks to an answer. When a stop string is found, the rest is dropped and the delta says that it has ended."""
        if chunks and choice.matcher.is_empty and not choice.is_scoring:
            return self._push_plain(choice, chunks)
        texts: list[str] = []
        ids: list[int] = []
        logprobs: list[TokenLogprobs] = []
        prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
        for chunk in chunks:
            self._note(choice, chunk)
            prompt_logprobs = prompt_logprobs or chunk.prompt_logprobs
            if choice.is_scoring:
                choice.finish_reason = FinishReason.LENGTH
                break
            text, num_taken = self._take(choice, chunk)
            texts.append(text)
            ids += chunk.token_ids[:num_taken]
            logprobs += chunk.logprobs[:num_taken]
            if choice.finish_reason is not None:
                break
        return Delta("".join(texts), tuple(ids), tuple(logprobs), prompt_logprobs, choice.finish_reason)

    def _push_plain(self, choice: Choice, chunks: Sequence[TokenChunk]) -> Delta:
        """`push` without stop strings, the common case: all chunks at once, and little work for each."""
        first, last = chunks[0], chunks[-1]
        ids, logprobs = first.token_ids, first.logprobs
        if len(chunks) > 1:
            ids = tuple(t for c in chunks for t in c.token_ids)
            logprobs = tuple(p for c in chunks for p in c.logprobs)
        for chunk in chunks:
            self._note(choice, chunk)
        text = choice.detokenizer.push(ids[:-1] if self._ends_unseen(choice, last) else ids)
        choice.num_output += len(ids)
        if last.finish_reason is not None:
            text += choice.detokenizer.flush()
            choice.finish_reason = last.finish_reason
        return Delta(text, ids, logprobs, first.prompt_logprobs, last.finish_reason)

    def replay(self, choice: Choice, delivered: Sequence[int]) -> None:
        """Take tokens whose text the client has already, so that the text goes on exactly after it."""
        for place, token_id in enumerate(delivered, 1):
            self._match(choice, choice.detokenizer.push((token_id,)), place)

    def _take(self, choice: Choice, chunk: TokenChunk) -> tuple[str, int]:
        """Token by token: where an answer ends must not depend on how its tokens were bundled.

        Returns: (the text that a chunk adds, how many of its tokens belong to the answer).
        """
        token_ids = chunk.token_ids
        visible = token_ids[:-1] if self._ends_unseen(choice, chunk) else token_ids
        text, is_stopped, num_taken = "", False, len(token_ids)
        for place, token_id in enumerate(visible, 1):
            piece, is_stopped = self._match(choice, choice.detokenizer.push((token_id,)), choice.num_output + place)
            text += piece
            if is_stopped:
                num_taken = place
                break
        choice.num_output += num_taken
        if is_stopped:
            choice.finish_reason = FinishReason.STOP
        elif chunk.finish_reason is not None:
            tail, is_stopped = self._match(choice, choice.detokenizer.flush(), choice.num_output)
            text += tail if is_stopped else tail + choice.matcher.flush()
            choice.finish_reason = FinishReason.STOP if is_stopped else chunk.finish_reason
        return text, num_taken

    def _ends_unseen(self, choice: Choice, chunk: TokenChunk) -> bool:
        """Whether a chunk's last token is what ended the answer, and is not part of its text."""
        if chunk.finish_reason is not FinishReason.STOP or not chunk.token_ids or choice.is_stop_shown:
            return False
        request = choice.request
        return chunk.token_ids[-1] in (*request.sampling.stop_token_ids, *request.eos_token_ids)

    def _match(self, choice: Choice, text: str, num_output: int) -> tuple[str, bool]:
        """Text of the num_output-th token through the stop matcher; before min_tokens nothing stops an answer."""
        if num_output < choice.request.sampling.min_tokens:
            return text, False
        return choice.matcher.push(text)

    def _note(self, choice: Choice, chunk: TokenChunk) -> None:
        if chunk.num_cached_tokens > choice.num_cached_tokens:
            choice.num_cached_tokens = chunk.num_cached_tokens
        choice.num_kv_bytes += chunk.num_kv_bytes
        if chunk.served_by and chunk.served_by not in choice.served_by:
            choice.served_by.append(chunk.served_by)

    def _prompts(self, body: GenerationBody) -> list[tuple[list[int], str | None]]:
        if isinstance(body, ChatBody):
            messages = [m.to_template() for m in body.messages]
            return [(self._chat_prompt(body, messages), None)]
        if not isinstance(body, CompletionBody):
            raise InvalidRequest("unknown kind of body")
        if body.best_of is not None and body.best_of != (body.n or 1):
            raise InvalidRequest(
                "'best_of' other than 'n' is not supported", param="best_of", code="unsupported_parameter"
            )
        prompt = body.prompt
        if isinstance(prompt, str):
            return [(self._encoded(prompt), prompt)]
        if isinstance(prompt[0], int):
            return [(self._checked(prompt), None)]
        return [(self._encoded(p), p) if isinstance(p, str) else (self._checked(p), None) for p in prompt]

    def _chat_prompt(self, body: ChatBody, messages: list[dict[str, Any]]) -> list[int]:
        if body.continue_final_message and body.add_generation_prompt:
            raise InvalidRequest(
                "'continue_final_message' and 'add_generation_prompt' exclude each other",
                param="continue_final_message",
            )
        if body.continue_final_message and messages[-1]["role"] != "assistant":
            raise InvalidRequest(
                f"'continue_final_message' needs a last message of role 'assistant', not {messages[-1]['role']!r}",
                param="continue_final_message",
            )
        self._check_length("".join(m["content"] for m in messages), "messages")
        generation_prompt = body.add_generation_prompt is not False and not body.continue_final_message
        return self.tokenizer.encode_chat(messages, generation_prompt, bool(body.continue_final_message))

    def _encoded(self, prompt: str) -> list[int]:
        self._check_length(prompt, "prompt")
        return self.tokenizer.encode(prompt)

    def _check_length(self, text: str, param: str) -> None:
        """Refuse what cannot fit before time is spent on its tokens."""
        fewest = self.tokenizer.fewest_tokens(text)
        if fewest >= self.options.max_model_len:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {self.options.max_model_len} tokens. However, your {param} "
                f"have at least {fewest} tokens.",
                param=param,
            )

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
            tenant=body.user or "",
            output_token_ids=list(delivered),
            slo=Slo(_seconds(body.ttft_ms), _seconds(body.tpot_ms), body.deadline),
        )
        is_stop_shown = bool(body.include_stop_str_in_output)
        return Choice(
            index,
            request,
            text,
            make_detokenizer(self.tokenizer, ids, body.skip_special_tokens is not False),
            StopMatcher(sampling.stop, is_stop_shown),
            is_scoring=body.max_tokens == 0,
            is_stop_shown=is_stop_shown,
            num_output=len(delivered),
        )

    def _sampling(self, body: GenerationBody, ids: list[int], seed: int) -> SamplingParams:
        max_tokens = self._max_tokens(body, len(ids))
        defaults = self.options.sampling_defaults

        def given(name: str, default: Any) -> Any:
            value = getattr(body, name)
            return value if value is not None else defaults.get(name, default)

        logprobs, prompt_logprobs = self._logprobs(body)
        stop = body.stop
        return SamplingParams(
            max_tokens=max_tokens,
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

    def _max_tokens(self, body: GenerationBody, num_prompt: int) -> int:
        room = self.options.max_model_len - num_prompt
        wanted, default = body.max_tokens, min(room, DEFAULT_COMPLETION_TOKENS)
        if isinstance(body, ChatBody):
            wanted = body.max_completion_tokens if body.max_completion_tokens is not None else wanted
            default = room
        max_tokens = max(1, wanted if wanted is not None else default)  # the engine makes at least one
        if max_tokens > room:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {self.options.max_model_len} tokens. However, you requested "
                f"{num_prompt + max_tokens} tokens ({num_prompt} in the prompt, {max_tokens} for the answer).",
                param="messages" if isinstance(body, ChatBody) else "prompt",
            )
        return max_tokens

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


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3


def choice_seed(seed: int, index: int) -> int:
    """Returns: the seed of the index-th of n answers: the seed itself for the first, unrelated ones for the others."""
    if index == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def new_id(prefix: str) -> str:
    """Returns: an id that nobody else has."""
    return f"{prefix}-{uuid.uuid4().hex}"
