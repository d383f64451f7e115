"""POST /v1/chat/completions: shapes of the answer, streamed and whole."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import orjson

from fastdeploy_pd.entrypoints.openai.generation import LEAST_LOGPROB, Generation, reason_word
from fastdeploy_pd.entrypoints.openai.protocol import ChatBody
from fastdeploy_pd.entrypoints.openai.stream import DONE, event, text_json
from fastdeploy_pd.entrypoints.serving import Choice, Delta
from fastdeploy_pd.entrypoints.tokenizer import AnyTokenizer
from fastdeploy_pd.request import TokenLogprobs


def logprob_content(tokenizer: AnyTokenizer, logprobs: tuple[TokenLogprobs, ...]) -> list[dict[str, Any]]:
    """Returns: OpenAI's logprobs.content."""

    def shown(token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": tokenizer.token_text(token_id),
            "logprob": max(logprob, LEAST_LOGPROB),
            "bytes": list(tokenizer.token_bytes(token_id)),
        }

    return [{**shown(p.token_id, p.logprob), "top_logprobs": [shown(i, v) for i, v in p.top]} for p in logprobs]


async def stream_chat(
    body: ChatBody, generation: Generation, answer_id: str, created: int
) -> AsyncGenerator[bytes, None]:
    """Yield events. Everything but the text is made once, before the first token."""
    tokenizer = generation.serving.tokenizer
    head = b'{"id":%s,"object":"chat.completion.chunk","created":%d,"model":%s,"choices":[' % (
        orjson.dumps(answer_id),
        created,
        orjson.dumps(body.model),
    )
    tail = b'],"usage":null}' if body.stream_options and body.stream_options.include_usage else b"]}"
    begun: set[int] = set()
    deltas = generation.deltas()
    try:
        async for choice, delta in deltas:
            data = b""
            if choice.index not in begun:
                begun.add(choice.index)
                role = (
                    b'{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}'
                    % choice.index
                )
                data += event(head + role + tail)
            if delta.text or (delta.token_ids and (body.logprobs or body.return_token_ids)):
                data += event(head + _text_choice(body, tokenizer, choice, delta) + tail)
            if delta.finish_reason is not None:
                end = b'{"index":%d,"delta":{},"logprobs":null,"finish_reason":"%s"}' % (
                    choice.index,
                    delta.finish_reason.value.encode(),
                )
                data += event(head + end + tail)
            if data:
                yield data
    finally:
        await deltas.aclose()
    yield _last_events(body, generation, head) + DONE


def _text_choice(body: ChatBody, tokenizer: AnyTokenizer, choice: Choice, delta: Delta) -> bytes:
    logprobs = (
        orjson.dumps({"content": logprob_content(tokenizer, delta.logprobs), "refusal": None})
        if body.logprobs
        else b"null"
    )
    ids = b',"token_ids":' + orjson.dumps(delta.token_ids) if body.return_token_ids else b""
    return b'{"index":%d,"delta":{"content":%s},"logprobs":%s,"finish_reason":null%s}' % (
        choice.index,
        text_json(delta.text),
        logprobs,
        ids,
    )


def _last_events(body: ChatBody, generation: Generation, head: bytes) -> bytes:
    wants_usage = bool(body.stream_options and body.stream_options.include_usage)
    if not wants_usage and not body.return_timings:
        return b""
    parts = b'],"usage":%s' % (orjson.dumps(generation.usage()) if wants_usage else b"null")
    if body.return_timings:
        parts += b',"fastdeploy_pd":' + orjson.dumps(generation.report())
    return event(head + parts + b"}")


async def whole_chat(body: ChatBody, generation: Generation, answer_id: str, created: int) -> bytes:
    """Returns: the answer as one JSON object."""
    tokenizer = generation.serving.tokenizer
    texts: list[list[str]] = [[] for _ in generation.choices]
    logprobs: list[list[dict[str, Any]]] = [[] for _ in generation.choices]
    ids: list[list[int]] = [[] for _ in generation.choices]
    deltas = generation.deltas()
    try:
        async for choice, delta in deltas:
            texts[choice.index].append(delta.text)
            ids[choice.index] += delta.token_ids
            if body.logprobs:
                logprobs[choice.index] += logprob_content(tokenizer, delta.logprobs)
    finally:
        await deltas.aclose()
    answer = {
        "id": answer_id,
        "object": "chat.completion",
        "created": created,
        "model": body.model,
        "choices": [
            {
                "index": c.index,
                "message": {"role": "assistant", "content": "".join(texts[c.index]), "refusal": None},
                "logprobs": {"content": logprobs[c.index], "refusal": None} if body.logprobs else None,
                "finish_reason": reason_word(c.finish_reason),
                **({"token_ids": ids[c.index]} if body.return_token_ids else {}),
            }
            for c in generation.choices
        ],
        "usage": generation.usage(),
    }
    return orjson.dumps(answer | ({"fastdeploy_pd": generation.report()} if body.return_timings else {}))
