"""`fastdeploy-pd up`: what dies is started again while streams go on; Ctrl-C leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx

from tests.acceptance.conftest import stream_tokens

START_TIMEOUT_S = 90.0


def wait_for(log: Path, pattern: str) -> re.Match[str]:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        found = re.search(pattern, log.read_text())
        if found:
            return found
        time.sleep(0.1)
    raise AssertionError(f"no {pattern!r} in\n{log.read_text()}")


def pid_of_decode(parent: int) -> int:
    """The API server's pid of one decode instance of ours."""
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            is_ours = f"PPid:\t{parent}\n" in status.read_text()
            if is_ours and b"decode\0" in (status.parent / "cmdline").read_bytes():
                return int(status.parent.name)
        except OSError:
            continue  # it has ended
    raise AssertionError("no decode instance")


def test_what_dies_is_started_again(tmp_path: Path) -> None:
    log = tmp_path / "up.log"
    command = [sys.executable, "-m", "fastdeploy_pd.entrypoints.cli", "up", "--decode", "2", "--ops", "torch"]
    with log.open("wb") as output:
        up = subprocess.Popen(
            [*command, "--", "--max-model-len", "600"],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
        )
    try:
        url = wait_for(log, r"curl -N (http://[^/]*)")[1]

        async def run() -> None:
            async with httpx.AsyncClient(timeout=60) as client:
                body = {"max_tokens": 500, "temperature": 0.8, "seed": 3}
                expected, _ = await stream_tokens(client, url, [5, 6, 7], **body)
                stream = asyncio.create_task(stream_tokens(client, url, [5, 6, 7], **body))
                await asyncio.sleep(0.3)
                os.kill(pid_of_decode(up.pid), signal.SIGKILL)
                assert (await stream) == (expected, "length")

        asyncio.run(run())
        wait_for(log, r"decode-3 is ready at http://")
    finally:
        os.killpg(up.pid, signal.SIGINT)
    assert up.wait(20) == 0
    logs, *others = sorted(tmp_path.iterdir())
    assert [p.name for p in others] == ["up.log"], "temporary directories of ended processes must go with them"
    assert f"the logs are kept in {logs}\n" in log.read_text(), "an instance has died"
    assert {p.name for p in logs.iterdir()} == {"prefill-0", "decode-1", "decode-2", "decode-3"}


def command(*words: str) -> subprocess.CompletedProcess[str]:
    """`fastdeploy-pd` with these words."""
    command = [sys.executable, "-m", "fastdeploy_pd.entrypoints.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_what_it_prints_leads_on(tmp_path: Path) -> None:
    log, key = tmp_path / "up.log", ["--api-key", "a key of this test"]
    up = [sys.executable, "-m", "fastdeploy_pd.entrypoints.cli", "up", "--ops", "torch", "--", *key]
    env = {**os.environ, "TMPDIR": str(tmp_path), "FD_LOG_DIR": str(tmp_path / "logs"), "OMP_NUM_THREADS": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(up, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=env)
    try:
        words = wait_for(log, r"fastdeploy-pd (role \S+ --redis-url redis://127.0.0.1:\d+ --scheduler-topic local)")[
            1
        ].split()
        shown = command(*words, *key)
        assert shown.stdout.startswith(f"{words[1]} at http://127.0.0.1:"), shown.stderr
        refused = command(*words, *key, "decode")
        assert refused.returncode == 1 and "Start or flip another one first, or give --force" in refused.stderr
        assert "--api-key KEY, or FD_API_KEY" in command(*words).stderr
        assert " is decode; " in command(*words, *key, "decode", "--force").stdout
        assert "-H 'authorization: Bearer KEY' -d" in log.read_text()
    finally:
        os.killpg(process.pid, signal.SIGINT)
    assert process.wait(20) == 0
    assert f"logs: {tmp_path}/logs/INSTANCE/" in log.read_text()
    for name in ("prefill-0", "decode-1"):
        files = {p.name: p.read_text() for p in (tmp_path / "logs" / name).iterdir()}
        assert "ready: " in files["api_server.log"] and " serves " in files["engine.log"] and not files["output.log"]
