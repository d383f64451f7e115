"""`fastdeploy-pd doctor` as people run it: alone, in pairs, with strangers, with peers that say nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fastdeploy_pd.doctor.main import _address
from fastdeploy_pd.launch.embedded_redis import EmbeddedRedis, free_port
from rdma_comm.bootstrap import receive_frame, send_frame

ROOT = Path(__file__).parents[2]
SECRET = "a secret that both machines know"
COMMAND = [sys.executable, "-m", "fastdeploy_pd.entrypoints.cli", "doctor"]


def environment(secret: str | None) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("FD_", "KVCACHE_"))}
    return kept | ({"FD_CLUSTER_SECRET": secret} if secret else {})


def doctor(*flags: str, secret: str | None = SECRET) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *flags], env=environment(secret), cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def sections(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, dict[str, str]]]:
    """The JSON report by section and name; the exit status says whether something failed."""
    report: dict[str, Any] = json.loads(done.stdout)
    found = {title: {f["name"]: f for f in findings} for title, findings in report["sections"].items()}
    has_failed = any(f["state"] == "fail" for section in found.values() for f in section.values())
    assert (done.returncode, report["state"]) == ((1, "fail") if has_failed else (0, "ok"))
    return found


@contextmanager
def listening(secret: str = SECRET) -> Iterator[int]:
    """A `doctor --listen`. Yields: its port."""
    with listener_of(secret) as (port, _):
        yield port


@contextmanager
def listener_of(secret: str = SECRET) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """A `doctor --listen`. Yields: its port, and the process."""
    process = subprocess.Popen(
        [*COMMAND, "--listen", "127.0.0.1:0"], env=environment(secret), cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )  # fmt: skip
    try:
        assert process.stdout is not None
        found = (re.fullmatch(r"listening on 127\.0\.0\.1:(\d+)\n", line) for line in process.stdout)
        yield next(int(match[1]) for match in found if match), process
        process.send_signal(signal.SIGINT)
        assert process.wait(10) in (0, 1)
    finally:
        process.kill()
        process.communicate()


def test_alone_with_redis(redis_server: EmbeddedRedis) -> None:
    done = doctor("--json", "--redis-url", redis_server.url)
    found = sections(done)["this machine"]
    assert not re.search(r"^I\d{4} ", done.stderr, re.M), "Mooncake tells what it does"
    assert {found[name]["state"] for name in ("backend shm", "backend tcp", "redis", "versions")} == {"ok"}
    assert "has no cluster secret" not in found["backend mooncake"]["detail"], "it was given one"
    assert all(f["remedy"] for f in found.values() if f["state"] in ("warn", "fail"))
    documented = (ROOT / "docs/doctor.md").read_text()
    assert [name for name in found if f"`{name}`" not in documented] == []


def test_a_redis_that_was_named_must_be_there() -> None:
    done = doctor("--redis-url", f"redis://:hidden@127.0.0.1:{free_port()}/0")
    assert done.returncode == 1 and "fail    redis: " in done.stdout and "hidden" not in done.stdout + done.stderr


def test_a_pair() -> None:
    with listening() as port:
        found = sections(doctor("--json", "--peer", f"127.0.0.1:{port}"))
    names = ["peer", "round trip", "peer clock", "throughput", "peer versions", "pair rdma", "pair backend"]
    assert list(found["the pair"]) == names
    assert {f["state"] for name, f in found["the pair"].items() if name not in ("pair rdma", "round trip")} == {"ok"}
    assert "takes shm; 3 blocks handed over" in found["the pair"]["pair backend"]["detail"]
    assert set(found["this machine"]) <= set(found["the peer"])
    documented = (ROOT / "docs/doctor.md").read_text()
    assert [name for name in names if f"`{name}`" not in documented] == []


def test_another_secret_is_refused_and_told_nothing() -> None:
    with listener_of() as (port, listener):
        found = sections(doctor("--json", "--peer", f"127.0.0.1:{port}", secret="another secret, just as long"))
        assert "the peer" not in found
        assert found["the pair"].pop("peer")["state"] == "fail"
        assert listener.stderr is not None
        told = next(line for line in listener.stderr if line.startswith("127.0.0.1: "))
        assert told.endswith("once it had our proof: its secret is probably another one\n")
        assert {f["state"] for f in found["the pair"].values()} == {"absent"}
        with socket.create_connection(("127.0.0.1", port), timeout=5) as stranger:
            send_frame(stranger, {"magic": "rdma_comm", "version": 1, "nonce": "0" * 64})
            answer = receive_frame(stranger)
            assert json.loads(answer["facts"])["offer"] is None and socket.gethostname() not in json.dumps(answer)
            send_frame(stranger, {"facts": answer["facts"], "proof": answer["proof"]})  # the server's own proof
            assert "secret" in receive_frame(stranger)["refusal"]
        with socket.create_connection(("127.0.0.1", port), timeout=5) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert sections(doctor("--json", "--peer", f"127.0.0.1:{port}"))["the pair"]["peer"]["state"] == "ok"


def test_a_peer_that_accepts_and_says_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began_s = time.monotonic()
        done = doctor("--json", "--peer", f"127.0.0.1:{silent.getsockname()[1]}")
        assert time.monotonic() - began_s < 30
    pair = sections(done)["the pair"]
    assert pair["peer"]["state"] == "fail" and "timed out" in pair["peer"]["detail"]
    assert "doctor --listen" in pair["peer"]["remedy"]


def test_nobody_listens() -> None:
    done = doctor("--peer", f"127.0.0.1:{free_port()}")
    assert done.returncode == 1 and re.search(r"^fail    peer: .*refused; mend: there: ", done.stdout, re.M)


@pytest.mark.parametrize(
    ("flags", "secret", "text"),
    [
        (["--listen", "70000"], SECRET, "--listen is '127.0.0.1:70000'|--listen is '0.0.0.0:70000'"),
        (["--listen", "0.0.0.0:0"], None, "needs a cluster secret"),
        (["--peer", "10.0.0.2"], None, "needs the cluster secret"),
        (["--peer", "host:http"], SECRET, "--peer is 'host:http'"),
        (["--peer", "a", "--listen", "1"], SECRET, "not allowed with"),
        (["--redis-url", "http://x"], SECRET, "must begin with redis://.* as in redis://127.0.0.1:6379"),
        (["--cluster-secret-file", "/nowhere"], None, "cannot be read"),
        (["--frobnicate"], SECRET, "unrecognized"),
        ([], "short", "at least 16"),
    ],
)
def test_bad_flags(flags: list[str], secret: str | None, text: str) -> None:
    done = doctor(*flags, secret=secret)
    assert done.returncode == 2 and re.search(text, done.stderr) and not done.stdout


def test_a_taken_port_to_listen_on_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = doctor("--listen", f"127.0.0.1:{port}")
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        f"--listen {port} is in use on 127.0.0.1: choose another port, or --listen 0 to get a free one" in done.stderr
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", ("a", 2333)), ("a:5", ("a", 5)), ("[::1]", ("::1", 2333)), ("[::1]:5", ("::1", 5)), ("fd00::2", ("fd00::2", 2333)),
    ],
)  # fmt: skip
def test_addresses(text: str, expected: tuple[str, int]) -> None:
    assert _address("--peer", text, 2333) == expected
