"""Every limit of the HTTP face, and what happens when clients leave, are slow, or have no key."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import socket
import time
from collections.abc import Iterator

import httpx
import pytest

from fastdeploy_pd.entrypoints.openai import app, http_protocol, limits
from tests.entrypoints.bad_inputs import Answer, parse
from tests.entrypoints.stub_engine import MODEL, StubEngine, default_options, demo_tokenizer, serving, story_tokens

BODY = json.dumps({"model": MODEL, "prompt": "x", "max_tokens": 2}).encode()
ENDLESS = {"model": MODEL, "prompt": "x", "max_tokens": 500}


@pytest.fixture
def engine() -> StubEngine:
    """Tells the story, a token a hundredth of a second."""
    return StubEngine(story_tokens(demo_tokenizer()), delay_s=0.01)


@pytest.fixture
def url(engine: StubEngine) -> Iterator[str]:
    """A server over it."""
    with serving(engine) as url:
        yield url


def exchange(url: str, *pieces: bytes, pause_s: float = 0.0, limit_s: float = 5.0) -> Answer:
    """Write pieces to a new connection. Returns: what the server says until it closes or falls silent."""
    with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=limit_s) as connection:
        data = b""
        with contextlib.suppress(TimeoutError, ConnectionError):  # it may have answered, and closed, before it had all
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(pause_s)
        try:
            while b"\r\n\r\n" not in data or b"}" not in data:
                received = connection.recv(65536)
                if not received:
                    break
                data += received
        except (TimeoutError, ConnectionError):
            pass
        return parse(data)


def post(headers: bytes = b"", body: bytes = BODY, target: bytes = b"/v1/completions") -> bytes:
    """Returns: a request."""
    head = b"POST " + target + b" HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n" + headers
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


def wait_until_idle(engine: StubEngine, limit_s: float) -> float:
    """Returns: seconds until no request ran any more."""
    start_s = time.monotonic()
    while engine.num_running and time.monotonic() - start_s < limit_s:
        time.sleep(0.005)
    return time.monotonic() - start_s


def test_a_body_within_the_limits_is_answered(url: str) -> None:
    assert exchange(url, post()).status == 200
    padded = BODY[:-1] + b" " * (limits.MAX_BODY_BYTES - len(BODY)) + b"}"
    assert httpx.post(f"{url}/v1/completions", content=padded).status_code == 200


def test_body_size(url: str) -> None:
    assert exchange(url, post(body=b"")).status == 400
    declared = b"POST /v1/completions HTTP/1.1\r\nHost: test\r\nContent-Length: %d\r\n\r\n"
    answer = exchange(url, declared % (limits.MAX_BODY_BYTES + 1))
    assert (answer.status, json.loads(answer.body)["error"]["code"]) == (413, "request_too_large")


def test_chunked_body_size(url: str) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = b"100000\r\n" + b" " * 2**20 + b"\r\n"
    answer = exchange(url, head, *[chunk] * (limits.MAX_BODY_BYTES // 2**20 + 1))
    assert answer.status == 413


def test_chunk_framing(url: str) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert exchange(url, head, b"1;" + b"a" * limits.MAX_HEAD_BYTES, b"a" * 100 + b"\r\n{\r\n").status == 400
    single_bytes = b"".join(b"1\r\n%c\r\n" % b for b in BODY)
    assert exchange(url, head, single_bytes + b"0\r\n\r\n").status == 200


def test_compressed_bodies_are_refused(url: str) -> None:
    response = httpx.post(f"{url}/v1/completions", content=gzip.compress(BODY), headers={"content-encoding": "gzip"})
    assert response.status_code == 415


def test_header_sizes(url: str) -> None:
    assert exchange(url, post(b"X-A: " + b"a" * (limits.MAX_HEADER_BYTES - 200) + b"\r\n")).status == 200
    assert exchange(url, post(b"X-A: " + b"a" * limits.MAX_HEADER_BYTES + b"\r\n")).status == 431
    assert exchange(url, post(b"X-A: a\r\n" * (limits.MAX_HEADERS - 3))).status == 200
    assert exchange(url, post(b"X-A: a\r\n" * limits.MAX_HEADERS)).status == 431


def test_a_head_without_end_is_cut_off(url: str) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: test\r\nX-A: "
    assert exchange(url, head, b"a" * (limits.MAX_HEAD_BYTES + 1)).status == 431


def test_url_size(url: str) -> None:
    assert exchange(url, post(target=b"/v1/completions?" + b"a" * (limits.MAX_URL_BYTES - 100))).status == 200
    assert exchange(url, post(target=b"/v1/completions?" + b"a" * limits.MAX_URL_BYTES)).status == 414


@pytest.mark.parametrize("hosts", [b"", b"Host: a\r\nHost: b\r\n"])
def test_there_is_one_host(url: str, hosts: bytes) -> None:
    assert exchange(url, b"GET /v1/models HTTP/1.1\r\n" + hosts + b"\r\n").status == 400


def test_slow_heads_and_silent_connections(engine: StubEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "HEADER_TIMEOUT_S", 0.2)
    with serving(engine) as url:
        start_s = time.monotonic()
        assert exchange(url, b"POST /v1/completions HTTP/1.1\r\n", limit_s=3).status == 408
        assert exchange(url, limit_s=3) == Answer(0, b"")
        second = exchange(url, b"GET /live HTTP/1.1\r\nHost: a\r\n\r\n" + b"GET /li", limit_s=3)
        assert second.status == 200  # the first of two is answered before the second is late
        assert time.monotonic() - start_s < 2


@pytest.mark.parametrize("has_answered", [True, False])
def test_an_idle_connection_is_not_closed_over_a_request(
    engine: StubEngine, monkeypatch: pytest.MonkeyPatch, has_answered: bool
) -> None:
    """It came while the server was busy, and the time was over before the server looked."""
    monkeypatch.setattr(http_protocol, "HEADER_TIMEOUT_S", 60.0 if has_answered else 0.4)
    parse_data = http_protocol.BoundedHttpProtocol.data_received

    def data_received(self: http_protocol.BoundedHttpProtocol, data: bytes) -> None:
        time.sleep(0.4 if b"X-Slow" in data else 0.0)
        parse_data(self, data)

    monkeypatch.setattr(http_protocol.BoundedHttpProtocol, "data_received", data_received)
    with serving(engine, loop="uvloop", timeout_keep_alive=0.4) as url:
        address = "127.0.0.1", int(url.rsplit(":", 1)[1])
        with socket.create_connection(address, timeout=5) as idle, socket.create_connection(address) as busy:
            if has_answered:
                idle.sendall(post())
                assert idle.recv(65536).startswith(b"HTTP/1.1 200")
            time.sleep(0.2)
            busy.sendall(post(b"X-Slow: yes\r\n"))
            time.sleep(0.1)
            idle.sendall(post())
            assert idle.recv(65536).startswith(b"HTTP/1.1 200")
            start_s = time.monotonic()
            assert idle.recv(65536) == b""
            assert 0.3 < time.monotonic() - start_s < 2


def test_slow_bodies(engine: StubEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "BODY_TIMEOUT_S", 0.2)
    with serving(engine) as url:
        assert exchange(url, post()[:-5]).status == 408


def test_depth_and_keys(url: str) -> None:
    def status(extra: str) -> tuple[int, str]:
        body = f'{{"model":"{MODEL}","prompt":"x","max_tokens":1,"user":{extra}}}'
        response = httpx.post(f"{url}/v1/completions", content=body)
        return response.status_code, response.text

    depth = limits.MAX_JSON_DEPTH
    assert "nested more than 64 deep" in status("[" * depth + "]" * depth)[1]
    assert "nested" not in status("[" * (depth - 1) + "]" * (depth - 1))[1]
    keys = ",".join(f'"k{i}":1' for i in range(limits.MAX_JSON_KEYS + 1))
    assert "more than 4096 keys" in status(f"{{{keys}}}")[1]
    assert status("[" * 100_000)[0] == 400


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_aborts_its_request(engine: StubEngine, url: str, stream: bool) -> None:
    body = json.dumps({**ENDLESS, "stream": stream, "n": 2}).encode()
    with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as connection:
        connection.sendall(post(body=body))
        while engine.num_running < 2:
            time.sleep(0.005)
        assert engine.num_aborted == 0
    assert wait_until_idle(engine, 3) < 1.0
    assert engine.num_aborted == 2


def test_a_reader_that_stops_reading_stops_its_stream(engine: StubEngine) -> None:
    engine.delay_s, engine.max_model_len = 0, 8192
    messages = [{"role": "user", "content": "x"}]
    body = {"model": MODEL, "messages": messages, "stream": True, "logprobs": True, "top_logprobs": 20}
    with serving(engine, default_options(max_model_len=8192)) as url, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", int(url.rsplit(":", 1)[1])))
        connection.sendall(post(body=json.dumps(body).encode(), target=b"/v1/chat/completions"))
        before = -1
        while engine.num_steps != before:  # until what the kernel and the server buffer is full
            before = engine.num_steps
            time.sleep(0.5)
        assert engine.num_running == 1
        assert engine.num_steps < 4000
        assert httpx.get(f"{url}/live").status_code == 200
        connection.recv(4096)
        connection.close()
        assert wait_until_idle(engine, 3) < 1.0
    assert engine.num_aborted == 1


def test_a_slow_reader_gets_everything(engine: StubEngine, url: str) -> None:
    engine.delay_s = 0
    body = json.dumps({**ENDLESS, "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as connection:
        connection.sendall(post(body=body))
        data = b""
        while b"[DONE]" not in data and (received := connection.recv(1000)):
            data += received
    texts = [json.loads(e)["choices"][0]["text"] for e in re.findall(rb"data: (\{.*?\})\n\n", data)]
    assert len("".join(texts)) > 500


def test_keys_guard_every_path_but_health(engine: StubEngine) -> None:
    with serving(engine, default_options(api_keys=("first-key", "second-key"))) as url:
        for path in ("/v1/models", "/metrics", "/version", "/openapi.json", "/nowhere"):
            refused = httpx.get(url + path)
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, None)
            wrong = httpx.get(url + path, headers={"authorization": "Bearer first-ke"})
            assert (wrong.status_code, wrong.json()["error"]["code"]) == (401, "invalid_api_key")
            for key in ("first-key", "second-key"):
                assert httpx.get(url + path, headers={"authorization": f"Bearer {key}"}).status_code != 401
        for path in ("/health", "/healthcheck", "/live"):
            assert httpx.get(url + path).status_code == 200


def test_many_requests_on_one_connection(url: str) -> None:
    with httpx.Client() as client:
        answers = [client.post(f"{url}/v1/completions", content=BODY) for _ in range(20)]
    assert {a.status_code for a in answers} == {200}
    assert len({a.json()["id"] for a in answers}) == 20
