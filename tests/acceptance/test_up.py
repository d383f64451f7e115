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
    assert [p.name for p in tmp_path.iterdir()] == ["up.log"], (
        "temporary directories of ended processes must go with them"
    )
