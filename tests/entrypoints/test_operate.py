"""`fastdeploy-pd role` and `drain` against servers that are no instances, or cease to be the one that was asked."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from fastdeploy_pd.entrypoints.cli import main
from fastdeploy_pd.launch.embedded_redis import free_port


def answer(body: object, status: str = "200 OK") -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return b"HTTP/1.1 %s\r\ncontent-length: %d\r\n\r\n" % (status.encode(), len(data)) + data


@contextmanager
def server(answers: list[bytes]) -> Iterator[str]:
    """Gives these answers, one a connection, and closes its port then. Yields: host:port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            for data in answers:
                with listener.accept()[0] as connection:
                    connection.recv(65536)
                    connection.sendall(data)
            listener.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        thread.join(5)
        assert not thread.is_alive(), "not all answers were asked for"


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (answer(b"<html"), "does not answer as an instance does: JSONDecodeError"),
        (answer({}), "does not answer as an instance does: KeyError"),
        (answer([]), "does not answer as an instance does: TypeError"),
        (b"garbage\r\n\r\n", "does not answer as an instance does: BadStatusLine"),
        (answer({}).replace(b": 2", b": 9"), "does not answer as an instance does: IncompleteRead"),
        (answer([], "500 E"), "answers 500: E"),
        (b"", "cannot be reached: Remote end closed connection"),
    ],
)
def test_what_is_no_instance_is_named(data: bytes, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with server([data]) as address:
        assert main(["role", address]) == 1
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and address in told[0] and text in told[0]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["://"], "INSTANCE is '://'; a URL must be http:// or https://"),
        (["http://[::1"], "INSTANCE is 'http://[::1'; a URL must be"),
        (["http://a b"], "INSTANCE is 'http://a b'; a URL must be"),
        (["file:///etc/passwd"], "a URL must be http:// or https://"),
        ([""], "INSTANCE is ''; it must be"),
        (["127.0.0.1:1", "--force"], "--force is given without a role"),
        (["127.0.0.1:1", "--api-key", "a\nb"], "--api-key (or FD_API_KEY) has characters"),
        (["127.0.0.1:1", "--api-key", "é"], "--api-key (or FD_API_KEY) has characters"),
        (["p", "--redis-url", "redis://h:99999"], "its port must be from 1 to 65535"),
    ],
)
def test_wrong_words_are_named(words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["role", *words]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and text in told[0]


@pytest.mark.parametrize("words", [["role", "prefill-af", "decode"], ["drain", "127.0.0.1"]])
def test_an_id_that_cannot_be_looked_up_was_perhaps_no_id(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    assert main([*words, "--redis-url", f"redis://127.0.0.1:{port}"]) == 1
    told = capsys.readouterr().err
    assert f"INSTANCE is '{words[1]}', taken for an id because it is no host:port" in told
    assert f"127.0.0.1:{port}" in told and "Give the instance's host:port, or the cluster's --redis-url" in told


def test_nobody_at_a_port(capsys: pytest.CaptureFixture[str]) -> None:
    address = f"127.0.0.1:{free_port()}"
    assert main(["role", address]) == 1
    assert capsys.readouterr().err == (
        f"error: http://{address}/v1/admin/role cannot be reached: Connection refused; is an instance at this address?\n"
    )


@pytest.mark.parametrize("words", [["decode"], ["--scheduler-topic", "t", "decode"]])
def test_the_role_may_stand_before_the_flags_or_behind_them(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    flipped = {"instance_id": "p-1", "role": "decode", "left_of_old_role": {"requests": 0}}
    with server([answer(flipped)]) as address:
        assert main(["role", address, *words]) == 0
    assert "p-1 at" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["role", address, *words, "mixed"])


def standing(instance_id: str, is_draining: bool) -> bytes:
    return answer({"instance_id": instance_id, "is_draining": is_draining, "left": {"requests": 2}})


def test_a_drain_is_over_when_another_instance_has_the_port(capsys: pytest.CaptureFixture[str]) -> None:
    with server([standing("p-1", True), standing("p-1", True), standing("p-2", False)]) as address:
        assert main(["drain", address]) == 0
    assert capsys.readouterr().out.splitlines() == ["p-1 drains; left: 2 requests", "p-1 has left"]


def test_a_drain_is_not_over_while_the_engine_is_in_a_long_step(capsys: pytest.CaptureFixture[str]) -> None:
    busy = answer({"error": {"message": "The engine p-1 has not answered for 20 s."}}, "503 Service Unavailable")
    with server([standing("p-1", True), busy, busy, standing("p-1", True)]) as address:
        assert main(["drain", address]) == 0
    assert capsys.readouterr().out.splitlines() == ["p-1 drains; left: 2 requests", "p-1 has left"]
