"""What an instance leaves when it ends before it serves: nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SERVER = [sys.executable, "-m", "fastdeploy_pd.entrypoints.openai.api_server", "--model", "demo"]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def has_ended(pids: list[int], timeout_s: float = 15.0) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while any(map(is_alive, pids)) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    return not any(map(is_alive, pids))


def end(after_s: float, number: int, num_children: int, tmp_path: Path, *flags: str) -> tuple[int, list[int]]:
    """Start an instance and, so long after it has so many children, end it. Returns: its exit status, and these children."""
    with subprocess.Popen([*SERVER, *flags], env={**os.environ, "TMPDIR": str(tmp_path)}) as process:
        deadline_s = time.monotonic() + 60
        while len(found := children(process.pid)) < num_children:
            assert process.poll() is None and time.monotonic() < deadline_s
            time.sleep(0.002)
        time.sleep(after_s)
        process.send_signal(number)
        return process.wait(20), found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("after_s", [0.02, 0.3])
def test_told_to_end_while_the_engine_starts(after_s: float, number: int, tmp_path: Path) -> None:
    status, pids = end(after_s, number, 1, tmp_path)
    assert status == 0 and has_ended(pids, 1.0)
    assert not list(tmp_path.glob("fastdeploy-pd-*"))


@pytest.mark.parametrize("after_s", [0.0, 0.1, 0.4])
def test_killed_while_the_engine_starts(after_s: float, tmp_path: Path) -> None:
    """The kernel tells a child of a parent's end only if the child has asked by then."""
    _, pids = end(after_s, signal.SIGKILL, 1, tmp_path)
    assert has_ended(pids)


def test_killed_while_its_api_processes_start(tmp_path: Path) -> None:
    _, pids = end(0.05, signal.SIGKILL, 3, tmp_path, "--workers", "2")
    assert has_ended(pids)
