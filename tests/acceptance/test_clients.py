"""The openai client, plain HTTP and Redis against a disaggregated pair; start-up errors; a stop that leaves nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from fastdeploy_pd.client import RedisClient
from fastdeploy_pd.errors import FastDeployPDError, InvalidRequest
from fastdeploy_pd.launch.embedded_redis import EmbeddedRedis, free_port
from fastdeploy_pd.launch.local import LocalCluster

QUESTION = [{"role": "user", "content": "What is prefill?"}]
ANSWER = "Prefill is the reading part"


@pytest.fixture(scope="module")
def pair(redis_server: EmbeddedRedis) -> Iterator[LocalCluster]:
    with LocalCluster(
        redis_server.url, "clients", ["--ops", "torch", "--api-key", "k-1"], {"OMP_NUM_THREADS": "1"}
    ) as cluster:
        cluster.start(["prefill", "decode"])
        yield cluster


@pytest.fixture(params=[0, 1], ids=["at-prefill", "at-decode"])
def client(pair: LocalCluster, request: pytest.FixtureRequest) -> openai.OpenAI:
    return openai.OpenAI(base_url=pair.instances[request.param].http_url + "/v1", api_key="k-1", max_retries=0)


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="demo", messages=QUESTION, temperature=0)
    assert answer.choices[0].message.content.startswith(ANSWER)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_chat_stream_equals_the_whole(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="demo", messages=QUESTION, temperature=0.9, seed=4)
    events = list(
        client.chat.completions.create(
            model="demo",
            messages=QUESTION,
            temperature=0.9,
            seed=4,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(e.choices[0].delta.content or "" for e in events if e.choices)
    assert text == whole.choices[0].message.content
    assert events[-1].usage == whole.usage


def test_several_answers_differ_and_repeat(client: openai.OpenAI) -> None:
    story = [{"role": "user", "content": "Tell me a story"}]
    first = client.chat.completions.create(model="demo", messages=story, n=3, seed=9, temperature=1, max_tokens=60)
    again = client.chat.completions.create(model="demo", messages=story, n=3, seed=9, temperature=1, max_tokens=60)
    texts = [c.message.content for c in first.choices]
    assert len(set(texts)) == 3
    assert texts == [c.message.content for c in again.choices]


def test_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=QUESTION, temperature=0, logprobs=True, top_logprobs=3, max_tokens=6
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == 6
    assert all(c.top_logprobs[0].token == c.token and len(c.top_logprobs) == 3 for c in content)
    assert "".join(c.token for c in content) == answer.choices[0].message.content


def test_completions_echo_and_prompt_logprobs(client: openai.OpenAI) -> None:
    prompt = "Once upon a time"
    answer = client.completions.create(
        model="demo", prompt=[prompt, prompt + ","], echo=True, logprobs=2, max_tokens=4, temperature=0
    )
    for choice, text in zip(answer.choices, (prompt, prompt + ","), strict=True):
        assert choice.text.startswith(text)
        assert "".join(choice.logprobs.tokens) == choice.text
        assert choice.logprobs.token_logprobs[0] is None
        assert all(v <= 0 for v in choice.logprobs.token_logprobs[1:])


def test_stop_strings_and_ids(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="demo", messages=QUESTION, temperature=0).choices[0].message.content
    stopped = client.chat.completions.create(
        model="demo", messages=QUESTION, temperature=0, stop=["keys and values", "never"]
    )
    assert stopped.choices[0].message.content == whole[: whole.index("keys and values")]
    assert stopped.choices[0].finish_reason == "stop"
    streamed = client.chat.completions.create(
        model="demo", messages=QUESTION, temperature=0, stop="keys and values", stream=True
    )
    assert "".join(e.choices[0].delta.content or "" for e in streamed) == whole[: whole.index("keys and values")]


def test_errors_are_openai_s(client: openai.OpenAI, pair: LocalCluster) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="gpt", messages=QUESTION)
    with pytest.raises(openai.BadRequestError, match="maximum context length is 4096"):
        client.completions.create(model="demo", prompt="x", max_tokens=5000)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="demo", prompt="x", temperature=3)
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(
            model="demo", messages=QUESTION, tools=[{"type": "function", "function": {"name": "f"}}]
        )
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=str(client.base_url), api_key="wrong", max_retries=0).models.list()
    assert httpx.get(pair.instances[0].http_url + "/health").status_code == 200
    assert [m.id for m in client.models.list()] == ["demo"]


def test_metrics_and_schema(pair: LocalCluster, client: openai.OpenAI) -> None:
    client.chat.completions.create(model="demo", messages=QUESTION, temperature=0)
    head = {"authorization": "Bearer k-1"}
    text = "".join(httpx.get(i.http_url + "/metrics", headers=head).text for i in pair.instances)
    for name in (
        "time_to_first_token_seconds_count",
        "handover_stage_seconds_bucket",
        "handover_bytes_total",
        "generation_tokens_total",
    ):
        assert f"fastdeploy_pd:{name}" in text
    schema = httpx.get(pair.instances[0].http_url + "/openapi.json", headers=head).json()
    assert "messages" in json.dumps(schema["paths"]["/v1/chat/completions"])


def test_redis_submission(redis_server: EmbeddedRedis, pair: LocalCluster) -> None:
    client = RedisClient(redis_server.url, "clients")
    request_id = client.submit({"model": "demo", "messages": QUESTION, "temperature": 0})
    chunks = list(client.stream(request_id, 30))
    assert "".join(c["text"] for c in chunks).startswith(ANSWER)
    assert chunks[-1]["usage"]["completion_tokens"] == sum(len(c["token_ids"]) for c in chunks)
    with pytest.raises(FastDeployPDError, match="does not exist"):
        client.result(client.submit({"model": "gpt", "messages": QUESTION}), 30)
    with pytest.raises(InvalidRequest, match="submitted before"):
        client.submit({"model": "demo", "messages": QUESTION}, request_id=request_id)
    with pytest.raises(InvalidRequest, match="unknown"):
        client.result("nobody", 5)


def test_a_deadline_ends_a_request_however_it_came(redis_server: EmbeddedRedis, pair: LocalCluster) -> None:
    url, head = pair.instances[0].http_url + "/v1/completions", {"authorization": "Bearer k-1"}
    endless = {"model": "demo", "prompt": "Once", "max_tokens": 3900, "ignore_eos": True}
    body = {**endless, "stop": ["it could stop at once"]}
    began_s = time.monotonic()
    whole = httpx.post(url, json={**body, "deadline": 0.4}, headers=head, timeout=60)
    assert 0.4 <= time.monotonic() - began_s < 3
    error = whole.json()["error"]
    assert (whole.status_code, error["code"]) == (504, "timeout")
    assert error["message"] == "The request did not end within 0.4 s."
    stream = httpx.post(url, json={**body, "stream": True}, headers={**head, "x-deadline-s": "0.4"}, timeout=60)
    events = [line[6:] for line in stream.text.splitlines() if line]
    assert stream.status_code == 200 and len(events) > 1, "the deadline came before the first token"
    assert json.loads(events[-1])["error"]["code"] == "timeout"
    client = RedisClient(redis_server.url, "clients")
    with pytest.raises(FastDeployPDError, match=r"did not end within 0\.4 s") as failed:
        client.result(client.submit({**body, "deadline": 0.4}, "completions"), 30)
    assert failed.value.code == "timeout"
    with pytest.raises(FastDeployPDError, match="Invalid 'deadline'"):
        client.result(client.submit({**body, "deadline": 0}, "completions"), 30)
    # However slow the machine is, after these steps instances have said what one takes: 3,900 of them take longer.
    learnt = httpx.post(url, json={**endless, "max_tokens": 40}, headers=head, timeout=60)
    assert learnt.status_code == 200
    refused = httpx.post(url, json={**endless, "deadline": 0.4}, headers=head, timeout=60)
    error = refused.json()["error"]
    assert (refused.status_code, error["param"], error["code"]) == (400, "deadline", "deadline_too_short")
    with pytest.raises(FastDeployPDError, match=r"it is 0\.4 s, and a prompt of .* an answer of 3900 takes") as failed:
        client.result(client.submit({**endless, "deadline": 0.4}, "completions"), 30)
    assert (failed.value.param, failed.value.code) == ("deadline", "deadline_too_short")


SERVER = [sys.executable, "-m", "fastdeploy_pd.entrypoints.openai.api_server"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--block-size", "48"], "--block-size: '48' is not allowed; it must be a power of two"),
        (["--splitwise-role", "decoder"], "--splitwise-role"),
        (["--splitwise-role", "decode"], "--scheduler-name splitwise"),
        (
            ["--tensor-parallel-size", "5"],
            "--tensor-parallel-size is 5; it must divide this model's num_attention_heads",
        ),
        (["--tensor-parallel-size", "2", "--ops", "paddle"], "with --ops paddle it must be 1"),
        (["--cache-transfer-protocol", "shm,shm"], "each once"),
        (
            ["--rdma-comm-ports", "1234,1235"],
            "--rdma-comm-ports names 2 ports; there must be one a tensor-parallel rank",
        ),
        (["--rdma-comm-ports", "1234", "--cache-queue-port", "1234"], "are both 1234"),
        (["--sheduler-host", "x"], "did you mean --scheduler-host"),
        (["--model", "/nowhere"], "not a directory"),
        (["--max-model-len", "100000"], "max_position_embeddings = 4096"),
        (["--ops", "torch", "--num-gpu-blocks-override", "3"], "--num-gpu-blocks-override gives 3 KV blocks"),
        (["--ops", "torch", "--num-gpu-blocks-override", "1000000000"], "take 244140.62 GiB; only "),
        (["--kv-cache-dtype", "fp8"], "--kv-cache-dtype is 'fp8'; with --ops paddle it must be auto"),
        (["--host", "192.0.2.1"], "--host is '192.0.2.1'; it must be an address of this machine"),
        (["--port", "8000", "--metrics-port", "8000"], "--port and --metrics-port are both 8000"),
        (["--scheduler-name", "splitwise", "--advertise-host", "10.0.0.1"], "needs a cluster secret"),
    ],
    ids=lambda v: "" if isinstance(v, str) else v[0],
)
def test_bad_flags_are_refused_with_name_value_and_what_is_allowed(flags: list[str], message: str) -> None:
    done = subprocess.run([*SERVER, *flags], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_an_address_of_another_machine_is_refused_with_its_flag() -> None:
    flags = ["--scheduler-name", "splitwise", "--advertise-host", "192.0.2.1", "--pd-comm-port", "2334"]
    env = {**os.environ, "FD_CLUSTER_SECRET": "a secret that only this test knows"}
    done = subprocess.run([*SERVER, *flags], env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "--advertise-host is '192.0.2.1'; it must be an address of this machine" in done.stderr


def test_a_taken_port_is_refused_with_its_flag(redis_server: EmbeddedRedis, pair: LocalCluster) -> None:
    port = pair.instances[0].http_url.rsplit(":", 1)[1]
    done = subprocess.run([*SERVER, "--port", port], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, f"--port {port} is in use" in done.stderr) == (2, True)
    shared = free_port()
    flags = ["--pd-comm-port", str(shared), "--ops", "reference"]
    with LocalCluster(redis_server.url, "ports", flags) as cluster:
        first = cluster.launch("prefill")
        deadline_s = time.monotonic() + 60
        while not first.is_ready:
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        second = cluster.launch("decode")
        assert second.process.wait(60) == 2
        assert f"--pd-comm-port {shared} is in use" in second.last_lines()


def test_up_once_leaves_nothing_behind(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastdeploy_pd.entrypoints.cli", "up", "--once", "--ops", "torch"],
        capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "KV moved" in done.stdout
    assert "prefill by prefill-" in done.stdout
    assert "decode by decode-" in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_pair_with_a_secret_over_tcp(redis_server: EmbeddedRedis) -> None:
    env = {"OMP_NUM_THREADS": "1", "FD_CLUSTER_SECRET": "a secret that only this test knows"}
    with LocalCluster(
        redis_server.url, "secret", ["--ops", "torch", "--cache-transfer-protocol", "tcp"], env
    ) as cluster:
        instances = cluster.start(["prefill", "decode"])
        body = {"model": "demo", "messages": QUESTION, "temperature": 0, "return_timings": True}
        answer = httpx.post(instances[0].http_url + "/v1/chat/completions", json=body, timeout=60).json()
        assert answer["choices"][0]["message"]["content"].startswith(ANSWER)
        assert answer["fastdeploy_pd"]["kv_bytes"] > 0
        assert answer["fastdeploy_pd"]["prefill"].startswith("prefill-")


def test_several_api_processes_and_a_metrics_port() -> None:
    port = free_port()
    with LocalCluster(None, flags=["--ops", "torch", "--workers", "2", "--metrics-port", str(port)]) as cluster:
        url = cluster.start(["mixed"])[0].http_url
        for _ in range(4):
            body = {"model": "demo", "messages": QUESTION, "temperature": 0}
            answer = httpx.post(url + "/v1/chat/completions", json=body, timeout=60).json()
            assert answer["choices"][0]["message"]["content"].startswith(ANSWER)
        text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
        assert 'fastdeploy_pd:request_success_total{finished_reason="stop",model_name="demo"} 4.0' in text


def test_a_client_that_leaves_aborts_on_both_instances(pair: LocalCluster) -> None:
    head = {"authorization": "Bearer k-1"}
    body = {"model": "demo", "prompt": "x", "max_tokens": 3000, "ignore_eos": True, "stream": True}
    with httpx.stream(
        "POST", pair.instances[0].http_url + "/v1/completions", json=body, headers=head, timeout=60
    ) as answer:
        next(answer.iter_lines())

    def running() -> float:
        lines = httpx.get(pair.instances[1].http_url + "/metrics", headers=head).text.splitlines()
        return sum(float(x.rsplit(" ", 1)[1]) for x in lines if x.startswith("fastdeploy_pd:num_requests_running{"))

    deadline_s = time.monotonic() + 20
    while running():
        assert time.monotonic() < deadline_s, "the request still runs"
        time.sleep(0.05)
