"""--skip-tokenizer-init: token ids in, token ids out, and a clear word where text is asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from fastdeploy_pd.entrypoints.tokenizer import NoTokenizer
from tests.entrypoints.stub_engine import EOS, MODEL, StubEngine, serving

IDS = [7, 8, 9, EOS, 11]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server without a tokenizer whose engine answers IDS."""
    with serving(StubEngine(lambda _, index: IDS[index % len(IDS)]), tokenizer=NoTokenizer()) as url:
        yield url


def post(url: str, path: str = "/v1/completions", **body: Any) -> httpx.Response:
    return httpx.post(url + path, json={"model": MODEL, **body})


def test_a_list_of_prompts(url: str) -> None:
    answer = post(url, prompt=[[1, 2, 3], [4, 5]], max_tokens=5, ignore_eos=True, temperature=0).json()
    assert [c["token_ids"] for c in answer["choices"]] == [IDS, IDS]
    assert [(c["text"], c["finish_reason"]) for c in answer["choices"]] == [("", "length")] * 2
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (5, 10)
    stopped = post(url, prompt=[1, 2, 3], max_tokens=5).json()["choices"][0]
    assert (stopped["token_ids"], stopped["finish_reason"]) == (IDS[:4], "stop")


@pytest.mark.parametrize("wants_ids", [None, False])
def test_a_stream_has_a_chunk_a_token(url: str, wants_ids: bool | None) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}, "return_token_ids": wants_ids}
    answer = post(url, prompt=[1, 2, 3], max_tokens=5, ignore_eos=True, **options)
    events = [json.loads(e.removeprefix("data: ")) for e in answer.text.split("\n\n")[:-2]]
    assert [e["choices"][0].get("token_ids") for e in events[:-1]] == [None if wants_ids is False else [i] for i in IDS]
    assert [e["choices"][0]["text"] for e in events[:-1]] == [""] * 5
    assert events[-2]["choices"][0]["finish_reason"] == "length"
    assert events[-1]["usage"]["completion_tokens"] == 5


def test_logprobs_show_ids(url: str) -> None:
    logprobs = post(url, prompt=[1, 2], max_tokens=1, logprobs=2, echo=True).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["token_id:1", "token_id:2", "token_id:7"]
    assert set(logprobs["top_logprobs"][2]) == {"token_id:7", "token_id:8"}


@pytest.mark.parametrize(
    ("path", "body", "param", "instead"),
    [
        ("/v1/completions", {"prompt": "Hello"}, "prompt", "token ids"),
        ("/v1/completions", {"prompt": ["Hello"]}, "prompt", "token ids"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}, "messages", "/v1/completions"),
        ("/v1/completions", {"prompt": [1], "stop": ["end"]}, "stop", "stop_token_ids"),
    ],
)
def test_text_is_refused(url: str, path: str, body: dict[str, Any], param: str, instead: str) -> None:
    answer = post(url, path, **body)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param
    assert "--skip-tokenizer-init" in error["message"] and instead in error["message"]
