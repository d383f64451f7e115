"""What strangers, mad peers and odd shells do to `fastdeploy-pd doctor`."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from fastdeploy_pd.doctor import exchange
from fastdeploy_pd.doctor.finding import run_checks
from fastdeploy_pd.doctor.listener import MAX_SESSIONS, Listener
from fastdeploy_pd.doctor.pair import Pair
from rdma_comm.bootstrap import Handshake, receive_frame, send_frame
from rdma_comm.errors import HandshakeFailed
from tests.doctor.test_command import COMMAND, ROOT, SECRET, environment

KEY = SECRET.encode()


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Iterator[Listener]:
    monkeypatch.setattr(exchange, "HANDSHAKE_TIMEOUT_S", 0.5)
    made = Listener("127.0.0.1", 0, KEY, {"host": "here", "findings": []}, {})
    threading.Thread(target=made.run, daemon=True).start()
    return made


def connect(listener: Listener) -> socket.socket:
    return socket.create_connection(("127.0.0.1", listener.port), timeout=5)


def session(listener: Listener) -> socket.socket:
    connection = connect(listener)
    exchange.handshake(KEY).connect(connection, None)
    return connection


def ask(connection: socket.socket, **request: object) -> dict[str, object]:
    connection.settimeout(10)
    send_frame(connection, request)
    return receive_frame(connection)


def test_strangers_that_drip_keep_nobody_out(listener: Listener) -> None:
    strangers = [connect(listener) for _ in range(MAX_SESSIONS)]
    end_s = time.monotonic() + 1.5
    for byte in (1 << 19).to_bytes(4, "little") + bytes(100):
        for stranger in strangers:
            try:
                stranger.sendall(bytes([byte]))
            except OSError:
                end_s = 0.0  # sent away
        time.sleep(0.1)
        if time.monotonic() > end_s:
            break
    with closing(session(listener)) as peer:
        assert ask(peer, do="report")["host"] == "here"
    for stranger in strangers:
        stranger.close()


@pytest.mark.parametrize("data", [b"[" * 20_000, b'{"a":' * 20_000, b'"\\ud800"', b"9" * 9000, os.urandom(999)])
def test_a_frame_of_nonsense_is_a_failed_handshake(data: bytes) -> None:
    here, there = socket.socketpair()
    with here, there:
        there.sendall(len(data).to_bytes(4, "little") + data)
        with pytest.raises(HandshakeFailed):
            receive_frame(here)


@pytest.mark.parametrize("side", ["client", "server"])
@pytest.mark.parametrize("facts", ['{"must_match": [[1, 2]]}', '{"must_match": 5}', "[]", "{}"])
def test_facts_that_are_none_are_a_failed_handshake(facts: str, side: str) -> None:
    here, there = socket.socketpair()
    own, nonce = Handshake({"doctor_version": 1}), "0" * 64
    with here, there, ThreadPoolExecutor(1) as pool:
        here.settimeout(3), there.settimeout(3)
        hello = {"magic": "rdma_comm", "version": 1, "nonce": nonce}
        end = pool.submit(own.accept if side == "client" else own.connect, here, None)
        if side == "client":
            send_frame(there, hello)
        nonces = (nonce, receive_frame(there)["nonce"])
        proof = own._proof(side, "".join(nonces if side == "client" else reversed(nonces)), facts)
        send_frame(there, {**hello, "facts": facts, "proof": proof})
        with pytest.raises(HandshakeFailed, match="the peer's facts"):
            end.result()


def test_a_nonce_that_is_no_text_is_a_failed_handshake() -> None:
    here, there = socket.socketpair()
    with here, there:
        send_frame(there, {"magic": "rdma_comm", "version": 1, "nonce": "\ud800" * 64})
        with pytest.raises(HandshakeFailed, match="does not speak"):
            exchange.handshake(KEY).accept(here, None)


def test_a_proof_that_is_no_text_is_a_failed_handshake() -> None:
    here, there = socket.socketpair()
    with here, there:
        send_frame(there, {"magic": "rdma_comm", "version": 1, "nonce": "0" * 64})
        send_frame(there, {"facts": "{}", "proof": "\ud800"})
        with pytest.raises(HandshakeFailed):
            exchange.handshake(KEY).accept(here, None)


def test_a_peer_that_asks_again_and_again_takes_no_more(listener: Listener) -> None:
    with closing(session(listener)) as peer:
        ask(peer, do="backends")
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(5):
            assert ask(peer, do="backends")["descriptors"]
        assert len(os.listdir("/proc/self/fd")) <= before
        for wrong in (
            {"do": []},
            {"do": "open", "name": []},
            {"do": "open"},
            {"do": "rdma"},
            {"do": "arrived", "name": 5},
        ):
            assert ask(peer, **wrong)["reason"]


def test_a_listener_without_files_goes_on(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    class Poor:
        def accept(self) -> None:
            monkeypatch.setattr(listener, "_listener", real)
            raise OSError(24, "Too many open files")

    real = listener._listener
    monkeypatch.setattr(listener, "_listener", Poor())
    connect(listener).close()  # ends the accept that waits
    time.sleep(0.3)
    with closing(session(listener)) as peer:
        assert ask(peer, do="report")["host"] == "here"


def test_a_listener_without_threads_goes_on(listener: Listener) -> None:
    for _ in range(MAX_SESSIONS + 1):
        before = threading.stack_size(1 << 46)  # no address space has room for it
        try:
            with socket.create_connection((listener.host, listener.port)) as refused:
                refused.settimeout(5)
                assert refused.recv(1) == b""
        finally:
            threading.stack_size(before)
    with closing(session(listener)) as peer:
        assert ask(peer, do="report")["host"] == "here"


def test_a_peer_that_answers_nonsense_is_a_finding() -> None:
    answers: list[dict[str, object]] = [{}, {"host": 5, "findings": 7}, {"unix_s": "soon"}, {"unix_s": None}]

    def serve(server: socket.socket) -> None:
        connection, _ = server.accept()
        handshake = exchange.handshake(KEY)
        handshake.accept(connection, None)
        handshake.welcome(connection)
        with contextlib.suppress(HandshakeFailed), connection:  # it measures with bytes that are no frame
            for answer in answers:
                receive_frame(connection)
                send_frame(connection, answer)

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, args=(server,), daemon=True).start()
        pair = Pair("127.0.0.1", server.getsockname()[1], KEY, {"protocol": "2"}, {})
        found = run_checks(pair.checks())
        pair.close()
    assert {f.name for f in found} == {check.name for check in pair.checks()}
    assert all(f.state in ("fail", "absent") for f in found), found


@pytest.mark.parametrize(
    ("shell", "status", "text"),
    [
        ("{} >&- 2>&-", 0, ""),
        ("{} >&-", 0, ""),
        ("{} | head -c 1 >&2", 0, "t"),
        ("{} --json > /dev/full", 1, "error: the report cannot be written: No space left on device\n"),
    ],
)
def test_a_report_that_nobody_takes(shell: str, status: int, text: str) -> None:
    command = "set -o pipefail; " + shell.format(" ".join(COMMAND))
    done = subprocess.run(
        ["bash", "-c", command], env=environment(None), cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (status, text)
