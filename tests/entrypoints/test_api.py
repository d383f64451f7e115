"""The OpenAI client against a real server: shapes of answers, streamed and whole, and what our extensions add."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from fastdeploy_pd.errors import DeadlineExceeded, DeadlineUnreachable, NoCapacity, Overloaded
from tests.entrypoints.stub_engine import (
    EOS,
    MODEL,
    StubEngine,
    default_options,
    demo_tokenizer,
    scripted,
    serving,
    story_tokens,
)

TOKENIZER = demo_tokenizer()
MESSAGES: Any = [{"role": "user", "content": "Tell me a story."}]
ANSWER = "A small fox 🦊 said: naïve, isn't it?"


@pytest.fixture(scope="module")
def engine() -> StubEngine:
    """Tells ANSWER and stops, whatever is asked."""
    return StubEngine(scripted(TOKENIZER.encode(ANSWER)))


@pytest.fixture(scope="module")
def url(engine: StubEngine) -> Iterator[str]:
    """A server over it."""
    with serving(engine) as url:
        yield url


@pytest.fixture(scope="module")
def story_url() -> Iterator[str]:
    """A server whose answers depend on the seed."""
    with serving(StubEngine(story_tokens(TOKENIZER), tokens_a_yield=3)) as url:
        yield url


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    """OpenAI's client, which must not try again."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def story_client(story_url: str) -> openai.OpenAI:
    """OpenAI's client for the other server."""
    return openai.OpenAI(base_url=f"{story_url}/v1", api_key="none", max_retries=0)


def events(url: str, path: str, body: dict[str, Any]) -> list[Any]:
    """Returns: the data of a stream's events; DONE and ERROR events as they are."""
    response = httpx.post(f"{url}{path}", json={"model": MODEL, "stream": True, **body})
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [e.removeprefix("data: ") for e in response.text.split("\n\n") if e]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def test_chat(client: openai.OpenAI, engine: StubEngine) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES)
    choice = answer.choices[0]
    assert (choice.message.content, choice.message.role, choice.finish_reason) == (ANSWER, "assistant", "stop")
    usage, num_output = answer.usage, len(TOKENIZER.encode(ANSWER)) + 1
    assert usage is not None and usage.prompt_tokens_details is not None
    assert (usage.completion_tokens, usage.prompt_tokens_details.cached_tokens) == (num_output, 3)
    assert usage.prompt_tokens == len(TOKENIZER.encode_chat(MESSAGES)) == usage.total_tokens - num_output
    assert engine.requests[-1].sampling.max_tokens == 512 - usage.prompt_tokens  # all that fits


def test_chat_stream(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == ANSWER
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len({c.id for c in chunks}) == 1
    assert all(c.usage is None for c in chunks)


def test_chat_stream_as_openai_shapes_it(url: str) -> None:
    body = {"messages": MESSAGES, "max_tokens": 2, "stream_options": {"include_usage": True}}
    first, *middle, last_choice, usage, done = events(url, "/v1/chat/completions", body)
    assert done == "[DONE]"
    assert set(first) == {"id", "object", "created", "model", "choices", "usage"}
    assert first["object"] == "chat.completion.chunk"
    role = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    assert first["choices"] == [role]
    assert all(m["choices"][0]["delta"].keys() == {"content"} for m in middle)
    assert last_choice["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}]
    assert last_choice["usage"] is None
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 2)


@pytest.mark.parametrize("prompt", ["Once", ["Once"], TOKENIZER.encode("Once"), [TOKENIZER.encode("Once")]])
def test_completion_prompts(client: openai.OpenAI, prompt: Any, engine: StubEngine) -> None:
    answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=50)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (ANSWER, "stop")
    assert engine.requests[-1].prompt_token_ids == TOKENIZER.encode("Once")


def test_completions_default_to_16_tokens(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="x", extra_body={"ignore_eos": True})
    assert answer.usage is not None and answer.usage.completion_tokens == 16
    assert answer.choices[0].finish_reason == "length"


def test_several_prompts_and_n(story_url: str) -> None:
    client = story_client(story_url)
    answer = client.completions.create(model=MODEL, prompt=["a", "b"], n=3, seed=7, max_tokens=12)
    assert [c.index for c in answer.choices] == list(range(6))
    assert len({c.text for c in answer.choices}) > 3
    alone = client.completions.create(model=MODEL, prompt="b", n=3, seed=7, max_tokens=12)
    assert [c.text for c in alone.choices] == [c.text for c in answer.choices[3:]]
    prompt_tokens = len(TOKENIZER.encode("a")) + len(TOKENIZER.encode("b"))
    assert answer.usage is not None and answer.usage.prompt_tokens == prompt_tokens  # each prompt counts once


def test_streamed_and_whole_answers_are_the_same(story_url: str) -> None:
    client = story_client(story_url)
    options: Any = {"model": MODEL, "messages": MESSAGES, "seed": 3, "n": 2, "max_tokens": 40}
    whole = [c.message.content for c in client.chat.completions.create(**options).choices]
    texts = ["", ""]
    for chunk in client.chat.completions.create(**options, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == whole


def test_seeds(story_url: str) -> None:
    client = story_client(story_url)

    def text(**options: Any) -> str:
        return client.completions.create(model=MODEL, prompt="x", max_tokens=8, **options).choices[0].text

    assert text(seed=5) == text(seed=5)
    assert len({text() for _ in range(8)}) > 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stop", ["said", ["zzz", "naïve"], "🦊 s"])
def test_stop_strings_across_tokens(url: str, stop: Any, stream: bool) -> None:
    body = {"prompt": "x", "max_tokens": 50, "stop": stop}
    for is_included in (False, True):
        options = {**body, "include_stop_str_in_output": is_included}
        if stream:
            chunks = [e["choices"][0] for e in events(url, "/v1/completions", options) if e != "[DONE]"]
            text, reason = "".join(c["text"] for c in chunks), chunks[-1]["finish_reason"]
        else:
            choice = httpx.post(f"{url}/v1/completions", json={"model": MODEL, **options}).json()["choices"][0]
            text, reason = choice["text"], choice["finish_reason"]
        found = stop if isinstance(stop, str) else stop[1]
        assert text == ANSWER[: ANSWER.index(found) + (len(found) if is_included else 0)]
        assert reason == "stop"


def test_a_stop_string_aborts_and_counts_the_same_however_tokens_are_bundled() -> None:
    counts = set()
    for bundle in (1, 4, 100):
        engine = StubEngine(scripted(TOKENIZER.encode(ANSWER)), tokens_a_yield=bundle)
        with serving(engine) as url:
            body = {"model": MODEL, "prompt": "x", "max_tokens": 50, "stop": "fox", "logprobs": 1}
            answer = httpx.post(f"{url}/v1/completions", json=body).json()
        counts.add((answer["usage"]["completion_tokens"], len(answer["choices"][0]["logprobs"]["tokens"])))
        assert engine.num_running == 0
    assert len(counts) == 1


def test_min_tokens_hold_stop_strings_off(url: str) -> None:
    body = {"model": MODEL, "prompt": "x", "max_tokens": 50, "stop": ["A", "a"], "min_tokens": 3, "logprobs": 0}
    choice = httpx.post(f"{url}/v1/completions", json=body).json()["choices"][0]
    assert choice["text"].startswith("A ")
    assert len(choice["logprobs"]["tokens"]) >= 3


def test_stop_token_ids_are_not_shown(url: str) -> None:
    ids = TOKENIZER.encode(ANSWER)
    body = {"model": MODEL, "prompt": "x", "max_tokens": 50, "stop_token_ids": [ids[5]], "return_token_ids": True}
    choice = httpx.post(f"{url}/v1/completions", json=body).json()["choices"][0]
    assert (choice["text"], choice["token_ids"]) == (
        TOKENIZER.decode(ids[: ids.index(ids[5])]),
        ids[: ids.index(ids[5]) + 1],
    )


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, logprobs=True, top_logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    data = b"".join(bytes(t.bytes or ()) for t in logprobs.content[:-1])
    assert data.decode() == ANSWER  # bytes, where a token is a part of a character
    assert [len(t.top_logprobs) for t in logprobs.content] == [2] * len(logprobs.content)
    assert logprobs.content[0].logprob == -0.5


def test_completion_logprobs_with_echo(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="Once upon", max_tokens=4, echo=True, logprobs=2)
    choice = answer.choices[0]
    num_prompt = len(TOKENIZER.encode("Once upon"))
    logprobs = choice.logprobs
    assert logprobs is not None and logprobs.tokens is not None and logprobs.text_offset is not None
    assert choice.text.startswith("Once upon") and "".join(logprobs.tokens) == choice.text
    assert logprobs.token_logprobs == [None] + [-0.5] * (num_prompt + 3)
    assert all(choice.text[o:].startswith(t) for o, t in zip(logprobs.text_offset, logprobs.tokens, strict=True))


def test_max_tokens_0_scores_the_prompt(url: str) -> None:
    body = {"model": MODEL, "prompt": "Once upon", "max_tokens": 0, "echo": True, "logprobs": 1}
    answer = httpx.post(f"{url}/v1/completions", json=body).json()
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"], answer["usage"]["completion_tokens"]) == ("Once upon", "length", 0)
    assert len(choice["logprobs"]["tokens"]) == len(TOKENIZER.encode("Once upon"))


def test_special_tokens_on_request(url: str) -> None:
    body = {"model": MODEL, "prompt": "x", "max_tokens": 50, "skip_special_tokens": False, "ignore_eos": True}
    text = httpx.post(f"{url}/v1/completions", json=body).json()["choices"][0]["text"]
    assert text.startswith(f"{ANSWER}<|im_end|><|im_end|>")


def test_timings_and_ids(url: str) -> None:
    headers = {"x-request-id": "mine-1"}
    body = {"model": MODEL, "messages": MESSAGES, "return_timings": True, "max_tokens": 4}
    response = httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers)
    report = response.json()["fastdeploy_pd"]
    assert (report["prefill"], report["decode"], report["kv_bytes"]) == ("P0", "D0", 4096)
    assert 0 <= report["ttft_s"] < 5 and report["tpot_s"] >= 0
    assert response.headers["x-request-id"] == "mine-1"
    assert response.headers["x-fastdeploy-pd-request-id"] == response.json()["id"]
    streamed = events(url, "/v1/chat/completions", {k: v for k, v in body.items() if k != "model"})
    assert streamed[-2]["fastdeploy_pd"]["decode"] == "D0" and streamed[-1] == "[DONE]"
    forged = httpx.post(f"{url}/v1/chat/completions", json=body, headers={"x-request-id": "a b"})
    assert "x-request-id" not in forged.headers


def test_sampling_defaults_fill_what_a_body_leaves_out() -> None:
    engine = StubEngine(scripted([]))
    with serving(engine, default_options(sampling_defaults={"temperature": 0.3, "top_k": 7})) as url:
        for extra in ({}, {"temperature": 0, "top_k": -1}, {"temperature": None}):
            httpx.post(f"{url}/v1/completions", json={"model": MODEL, "prompt": "x", **extra}).raise_for_status()
    asked = [(r.sampling.temperature, r.sampling.top_k) for r in engine.requests]
    assert asked == [(0.3, 7), (0.0, 0), (0.3, 7)]


def test_continue_final_message(client: openai.OpenAI, engine: StubEngine) -> None:
    messages: Any = [*MESSAGES, {"role": "assistant", "content": "Once"}]
    client.chat.completions.create(model=MODEL, messages=messages, extra_body={"continue_final_message": True})
    assert TOKENIZER.decode(engine.requests[-1].prompt_token_ids, False).endswith("assistant\nOnce")
    with pytest.raises(openai.BadRequestError, match="needs a last message of role 'assistant'"):
        client.chat.completions.create(model=MODEL, messages=MESSAGES, extra_body={"continue_final_message": True})


def test_context_length(client: openai.OpenAI) -> None:
    with pytest.raises(
        openai.BadRequestError, match=r"maximum context length is 512 tokens.* 513 tokens \(1 in the prompt"
    ) as caught:
        client.completions.create(model=MODEL, prompt=[5], max_tokens=512)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(openai.BadRequestError, match="at least") as caught:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "ab" * 2_000_000}])
    assert caught.value.code == "context_length_exceeded"


def test_unknown_models_and_paths(client: openai.OpenAI, url: str) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="other", prompt="x")
    assert caught.value.code == "model_not_found"
    for method, path, status in (("GET", "/v2", 404), ("GET", "/v1/completions", 405)):
        error = httpx.request(method, url + path)
        assert error.status_code == status
        assert error.json()["error"]["type"] == "invalid_request_error"
    form = httpx.post(f"{url}/v1/completions", data={"model": "x"})
    assert (form.status_code, form.json()["error"]["type"]) == (415, "invalid_request_error")


@pytest.mark.parametrize("stream", [False, True])
def test_errors_before_the_first_token_have_their_status(stream: bool) -> None:
    engine = StubEngine(scripted([]), error=Overloaded("no room"))
    with serving(engine) as url:
        response = httpx.post(f"{url}/v1/completions", json={"model": MODEL, "prompt": "x", "stream": stream})
    assert response.status_code == 429
    assert response.headers["retry-after"] == "1" and response.headers["retry-after-ms"] == "1000"
    error = {"message": "no room", "type": "rate_limit_exceeded", "param": None, "code": "overloaded"}
    assert response.json() == {"error": error}


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_that_cannot_be_met_says_when_to_come_again(stream: bool) -> None:
    engine = StubEngine(scripted([]), error=DeadlineUnreachable("in 7 s", retry_after_s=7))
    body = {"model": MODEL, "prompt": "x", "deadline": 2, "stream": stream, "n": 2}
    with serving(engine) as url:
        response = httpx.post(f"{url}/v1/completions", json=body)
    assert response.status_code == 429
    assert response.headers["retry-after"] == "7" and response.headers["retry-after-ms"] == "7000"
    error = {"message": "in 7 s", "type": "rate_limit_exceeded", "param": "deadline", "code": "deadline_unreachable"}
    assert response.json() == {"error": error}


def test_a_deadline_that_has_passed_is_not_tried_again() -> None:
    engine = StubEngine(scripted([]), error=DeadlineExceeded("too late"))
    with serving(engine) as url:
        client = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=2)
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(model=MODEL, prompt="x")
    assert (caught.value.status_code, caught.value.code, len(engine.requests)) == (504, "timeout", 1)
    assert "retry-after" not in caught.value.response.headers


@pytest.mark.parametrize("count", [1, 2])
def test_an_error_in_a_stream_ends_it_without_done(count: int) -> None:
    engine = StubEngine(scripted(TOKENIZER.encode(ANSWER)), error=NoCapacity("all gone"), error_after=3)
    with serving(engine) as url:
        found = events(url, "/v1/completions", {"prompt": "x", "max_tokens": 9, "n": count})
    assert found[-1]["error"]["code"] == "no_capacity"
    assert all("choices" in e for e in found[:-1]) and len(found) >= 2
    assert engine.num_running == 0


def test_models_health_and_the_rest(url: str, engine: StubEngine) -> None:
    listed = httpx.get(f"{url}/v1/models").json()["data"]
    assert listed == [httpx.get(f"{url}/v1/models/{MODEL}").json()]
    assert listed[0]["id"] == MODEL and listed[0]["max_model_len"] == 512
    assert httpx.get(f"{url}/v1/models/x%2Fy").status_code == 404
    for path in ("/health", "/healthcheck", "/live", "/version", "/metrics"):
        assert httpx.get(url + path).status_code == 200
    engine.is_ready = False
    assert [httpx.get(url + p).status_code for p in ("/health", "/healthcheck", "/live")] == [503, 503, 200]
    engine.is_ready = True


def test_openapi_is_honest(url: str) -> None:
    schema = httpx.get(f"{url}/openapi.json").json()
    assert "422" not in json.dumps(schema)
    chat = schema["paths"]["/v1/chat/completions"]["post"]
    assert {"400", "401", "404", "413", "429", "500", "503", "504"} <= set(chat["responses"])
    properties = chat["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert {"messages", "max_completion_tokens", "top_k", "cache_salt"} <= set(properties)


def test_characters_that_break_lines_are_escaped() -> None:
    text = "a\u2028b\u2029c\u0085d\ne"
    with serving(StubEngine(scripted(TOKENIZER.encode(text)))) as url:
        body = {"model": MODEL, "prompt": "x", "stream": True, "max_tokens": 40}
        raw = httpx.post(f"{url}/v1/completions", json=body).content.decode()
        lines = [line for line in raw.splitlines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert "".join(json.loads(x[6:])["choices"][0]["text"] for x in lines[:-1]) == text


def test_the_end_of_sequence_is_the_demo_models() -> None:
    assert TOKENIZER.decode([EOS], False) == "<|im_end|>"
