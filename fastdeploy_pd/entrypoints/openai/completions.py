"""POST /v1/completions: shapes of the answer, streamed and whole, with echo and OpenAI's older form of log-probabilities."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from fastdeploy_pd.entrypoints.openai.generation import LEAST_LOGPROB, Generation, reason_word
from fastdeploy_pd.entrypoints.openai.protocol import CompletionBody
from fastdeploy_pd.entrypoints.openai.stream import DONE, event, text_json
from fastdeploy_pd.entrypoints.serving import Choice, Delta
from fastdeploy_pd.entrypoints.tokenizer import AnyTokenizer
from fastdeploy_pd.request import TokenLogprobs


@dataclass(slots=True)
class LegacyLogprobs:
    """The parallel lists of the completions endpoint."""

    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)

    def add(
        self, tokenizer: AnyTokenizer, logprobs: Sequence[TokenLogprobs | None], first_ids: Sequence[int], offset: int
    ) -> int:
        """Append tokens. A None (the prompt's first token) takes its id from first_ids.

        Returns: the text offset after them.
        """
        for entry, fallback in zip(logprobs, first_ids, strict=False):
            text = tokenizer.token_text(entry.token_id if entry is not None else fallback)
            self.tokens.append(text)
            self.token_logprobs.append(max(entry.logprob, LEAST_LOGPROB) if entry is not None else None)
            top = {tokenizer.token_text(i): max(v, LEAST_LOGPROB) for i, v in entry.top} if entry is not None else None
            self.top_logprobs.append(top)
            self.text_offset.append(offset)
            offset += len(text)
        return offset

    def to_dict(self) -> dict[str, Any]:
        """Returns: OpenAI's logprobs object."""
        return {
            "tokens": self.tokens,
            "token_logprobs": self.token_logprobs,
            "top_logprobs": self.top_logprobs,
            "text_offset": self.text_offset,
        }


@dataclass(slots=True)
class _State:
    offset: int = 0
    is_begun: bool = False


def _render(
    body: CompletionBody, tokenizer: AnyTokenizer, choice: Choice, delta: Delta, state: _State
) -> tuple[str, dict[str, Any] | None]:
    """The text and the log-probabilities that a delta adds; the prompt comes first where echo is asked for."""
    text, legacy = delta.text, LegacyLogprobs()
    if body.echo and not state.is_begun:
        prompt_ids = choice.request.prompt_token_ids
        text = (choice.prompt_text if choice.prompt_text is not None else tokenizer.decode(prompt_ids)) + text
        if body.logprobs is not None:
            state.offset = legacy.add(tokenizer, delta.prompt_logprobs, prompt_ids, state.offset)
    state.is_begun = True
    if body.logprobs is None:
        return text, None
    state.offset = legacy.add(tokenizer, delta.logprobs, delta.token_ids, state.offset)
    return text, legacy.to_dict()


async def stream_completion(
    body: CompletionBody, generation: Generation, answer_id: str, created: int
) -> AsyncGenerator[bytes, None]:
    """Yield events. Everything but the text is made once, before the first token."""
    tokenizer = generation.serving.tokenizer
    head = b'{"id":%s,"object":"text_completion","created":%d,"model":%s,"choices":[' % (
        orjson.dumps(answer_id),
        created,
        orjson.dumps(body.model),
    )
    wants_usage = bool(body.stream_options and body.stream_options.include_usage)
    tail = b'],"usage":null}' if wants_usage else b"]}"
    states = [_State() for _ in generation.choices]
    deltas = generation.deltas()
    try:
        async for choice, delta in deltas:
            text, logprobs = _render(body, tokenizer, choice, delta, states[choice.index])
            has_silent_tokens = bool(delta.token_ids and (body.return_token_ids or not generation.serving.has_text))
            if text or logprobs or has_silent_tokens or delta.finish_reason is not None:
                reason = b'"%s"' % delta.finish_reason.value.encode() if delta.finish_reason is not None else b"null"
                ids = b',"token_ids":' + orjson.dumps(delta.token_ids) if body.return_token_ids else b""
                yield event(
                    head
                    + b'{"index":%d,"text":%s,"logprobs":%s,"finish_reason":%s%s}'
                    % (choice.index, text_json(text), orjson.dumps(logprobs), reason, ids)
                    + tail
                )
    finally:
        await deltas.aclose()
    last = b""
    if wants_usage or body.return_timings:
        last = b'],"usage":%s' % (orjson.dumps(generation.usage()) if wants_usage else b"null")
        last += b',"fastdeploy_pd":' + orjson.dumps(generation.report()) if body.return_timings else b""
        last = event(head + last + b"}")
    yield last + DONE


async def whole_completion(body: CompletionBody, generation: Generation, answer_id: str, created: int) -> bytes:
    """Returns: the answer as one JSON object."""
    tokenizer = generation.serving.tokenizer
    states = [_State() for _ in generation.choices]
    texts: list[list[str]] = [[] for _ in generation.choices]
    ids: list[list[int]] = [[] for _ in generation.choices]
    legacy = [LegacyLogprobs() for _ in generation.choices]
    deltas = generation.deltas()
    try:
        async for choice, delta in deltas:
            text, logprobs = _render(body, tokenizer, choice, delta, states[choice.index])
            texts[choice.index].append(text)
            ids[choice.index] += delta.token_ids
            for name, values in (logprobs or {}).items():
                getattr(legacy[choice.index], name).extend(values)
    finally:
        await deltas.aclose()
    answer = {
        "id": answer_id,
        "object": "text_completion",
        "created": created,
        "model": body.model,
        "choices": [
            {
                "index": c.index,
                "text": "".join(texts[c.index]),
                "logprobs": legacy[c.index].to_dict() if body.logprobs is not None else None,
                "finish_reason": reason_word(c.finish_reason),
                **({"token_ids": ids[c.index]} if body.return_token_ids else {}),
            }
            for c in generation.choices
        ],
        "usage": generation.usage(),
    }
    return orjson.dumps(answer | ({"fastdeploy_pd": generation.report()} if body.return_timings else {}))
