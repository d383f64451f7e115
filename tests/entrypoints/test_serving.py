"""Bodies to requests, and answers that go on after a crash exactly where they stopped."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdeploy_pd.entrypoints.openai.protocol import ChatBody, CompletionBody, parse_body
from fastdeploy_pd.entrypoints.serving import Choice, Serving, choice_seed
from fastdeploy_pd.errors import InvalidRequest
from fastdeploy_pd.request import FinishReason, TokenChunk
from tests.entrypoints.stub_engine import MODEL, STORY, default_options, demo_tokenizer

TOKENIZER = demo_tokenizer()
SERVING = Serving(TOKENIZER, default_options())
STORY_IDS = TOKENIZER.encode(STORY)


def choice_of(delivered: list[int] | None = None, **fields: Any) -> Choice:
    """The one choice of a completion body."""
    body = parse_body(CompletionBody, json.dumps({"model": MODEL, "prompt": "x", "max_tokens": 400, **fields}).encode())
    return SERVING.choices(body, "id", 11, delivered or [])[0]


def chunks(choice: Choice, ids: list[int], start: int, is_end: bool) -> list[TokenChunk]:
    """One chunk a token; the last one may end the request."""
    ends = [FinishReason.LENGTH if is_end and i == len(ids) - 1 else None for i in range(len(ids))]
    return [TokenChunk(choice.request.request_id, 1, start + i, (t,), ends[i]) for i, t in enumerate(ids)]


@given(st.integers(0, len(STORY_IDS) - 1), st.sampled_from([[], ["owl", "🦊x"], ["zzz", "naïve café. x"], ["café"]]))
@settings(max_examples=150, deadline=None)
def test_a_resumed_answer_continues_its_text(cut: int, stop: list[str]) -> None:
    whole = choice_of(stop=stop)
    expected = SERVING.push(whole, chunks(whole, STORY_IDS, 0, True))
    before = choice_of(stop=stop)
    first = SERVING.push(before, chunks(before, STORY_IDS[:cut], 0, False))
    if first.finish_reason is not None:
        assert first.text == expected.text
        return
    after = choice_of(STORY_IDS[:cut], stop=stop)
    assert after.request.output_token_ids == STORY_IDS[:cut]
    assert (after.request.sampling, after.request.prompt_token_ids) == (
        before.request.sampling,
        [*before.request.prompt_token_ids],
    )
    SERVING.replay(after, STORY_IDS[:cut])
    rest = SERVING.push(after, chunks(after, STORY_IDS[cut:], cut, True))
    assert (first.text + rest.text, rest.finish_reason) == (expected.text, expected.finish_reason)
    assert after.num_output == whole.num_output


def test_what_a_stop_held_back_is_given_out_at_the_end() -> None:
    choice = choice_of(stop=["café. !"])
    delta = SERVING.push(choice, chunks(choice, STORY_IDS, 0, True))
    assert (delta.text, delta.finish_reason) == (STORY, FinishReason.LENGTH)


def test_seeds_differ_by_choice_and_are_reproducible() -> None:
    assert choice_seed(5, 0) == 5
    seeds = {choice_seed(5, k) for k in range(8)} | {choice_seed(6, k) for k in range(8)}
    assert len(seeds) == 16
    assert all(0 <= s < 2**63 for s in seeds)
    assert choice_of(seed=9).request.sampling.seed == 9
    assert choice_of().request.sampling.seed == 11  # the submission's


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"best_of": 2}, "best_of", "not supported"),
        ({"suffix": "x"}, "suffix", "not supported yet"),
        ({"prompt": [10**6]}, "prompt", "outside the vocabulary"),
        ({"prompt": ["a"] * 33, "n": 2}, "n", "33 prompts times n = 2 is more than 64"),
        ({"prompt": ""}, "prompt", "no tokens"),
        ({"min_tokens": 401}, "min_tokens", "between 0 and max_tokens"),
        ({"logit_bias": {"-1": 1}}, "logit_bias", "must be a token id"),
        ({"prompt_logprobs": 1}, "prompt_logprobs", "Unknown parameter"),
        ({"n": True}, "n", "valid integer"),
        ({"temperature": "1"}, "temperature", "valid number"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"one": 1}, "one", "Unknown parameter: 'one'"),
    ],
)
def test_wrong_bodies_are_named(fields: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        choice_of(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"top_logprobs": 2}, "top_logprobs"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0]",
        ),
    ],
)
def test_wrong_chats_are_named(fields: dict[str, Any], param: str) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], **fields}
    with pytest.raises(InvalidRequest) as caught:
        SERVING.choices(parse_body(ChatBody, json.dumps(body).encode()), "id")
    assert caught.value.param == param


def test_nullable_fields_may_be_null() -> None:
    optional = [n for n, f in ChatBody.model_fields.items() if n not in ("model", "messages")]
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], **dict.fromkeys(optional)}
    assert len(SERVING.choices(parse_body(ChatBody, json.dumps(body).encode()), "id")) == 1


@pytest.mark.parametrize("stop", [["owl"], ["split prefill", "ill"], []])
def test_the_end_does_not_depend_on_bundles(stop: list[str]) -> None:
    alone, bundled = choice_of(stop=stop), choice_of(stop=stop)
    first = SERVING.push(alone, chunks(alone, STORY_IDS, 0, True))
    whole = [TokenChunk(bundled.request.request_id, 1, 0, tuple(STORY_IDS), FinishReason.LENGTH)]
    assert SERVING.push(bundled, whole) == first
    assert alone.num_output == bundled.num_output
    assert TOKENIZER.decode(first.token_ids).startswith(first.text)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{"model": "m", "model": "m"}', "a key appears twice"),
        (b'{"temperature": NaN}', "NaN is not a JSON number"),
        (b'{"temperature": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"temperature": 1e999}', "1e999 is out of range"),
        (b'{"user": "\\ud800"}', "surrogates not allowed"),
        (b'{"\\udfff": 1}', "surrogates not allowed"),
        ('{"user": "x"}'.encode("utf-16"), "could not parse"),
        (b'\xef\xbb\xbf{"user": "x"}', "could not parse"),
        (b'{"user": "\xff"}', "could not parse"),
        (b'{"user": "x"} {}', "Extra data"),
        (b"{'user': 'x'}", "could not parse"),
        (b'{"n": ' + b"1" * 5000 + b"}", "could not parse"),
        (b"[]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b"", "could not parse"),
    ],
)
def test_only_json_is_json(raw: bytes, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        parse_body(CompletionBody, raw)
