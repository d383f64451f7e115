"""How an instance ends: what it leaves, and which engine is started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import pytest

from fastdeploy_pd.entrypoints.openai import api_server
from fastdeploy_pd.entrypoints.openai.api_server import EngineSupervisor
from fastdeploy_pd.entrypoints.openai.signals import Signals
from fastdeploy_pd.launch.local import LocalCluster

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


@pytest.mark.parametrize("after_s", [1.5, 3.0])
def test_told_to_end_while_ranks_start(after_s: float, tmp_path: Path) -> None:
    status, pids = end(after_s, signal.SIGTERM, 1, tmp_path, "--ops", "torch", "--tensor-parallel-size", "2")
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


TERM, INT, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1  # the last one is sent by the process itself


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize(
    ("numbers", "last_words"),
    [
        ([INT], "draining"),
        ([INT, USR1], "draining"),
        ([TERM, USR1], "[DONE]"),
        ([USR1, TERM], "[DONE]"),
        ([TERM, TERM], ""),
    ],
)
def test_signals_under_an_answer(numbers: list[int], last_words: str, workers: str) -> None:
    """With several API processes, they come to the first one alone."""
    with LocalCluster(None, "local", ["--model", "demo", "--workers", workers]) as cluster:
        (instance,) = cluster.start(["mixed"])
        body = {"model": "demo", "prompt": [5] * 9, "max_tokens": 900, "ignore_eos": True, "stream": True}
        said, left = "", list(numbers)
        with suppress(httpx.TransportError):
            with httpx.stream("POST", instance.http_url + "/v1/completions", json=body, timeout=60) as answer:
                for line in filter(None, answer.iter_lines()):
                    said = line
                    if left:
                        instance.process.send_signal(left.pop(0))
                        begun_s = time.monotonic()
                        time.sleep(0.05)
        assert instance.process.wait(20) == 0
        assert last_words in said and ("[DONE]" in said) == (last_words == "[DONE]")
        assert last_words or time.monotonic() - begun_s < 5


@pytest.mark.parametrize(
    ("received", "is_gentle", "is_hurried"),
    [
        ([], False, False),
        ([TERM], True, False),
        ([USR1], True, False),
        ([INT], False, False),
        ([USR1, TERM], True, False),
        ([TERM, USR1], True, False),
        ([INT, USR1], False, False),
        ([TERM, TERM], True, True),
        ([USR1, TERM, TERM], True, True),
        ([USR1, INT], True, True),
        ([INT, INT], False, True),
    ],
)
def test_which_signals_hurry(received: list[int], is_gentle: bool, is_hurried: bool) -> None:
    signals = Signals.__new__(Signals)
    signals.received = received
    assert (signals.is_gentle, signals.is_hurried) == (is_gentle, is_hurried)


@pytest.fixture
def supervisor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineSupervisor:
    """Of engines that do nothing but count themselves."""
    engine = tmp_path / "engine"
    engine.write_text("#!/bin/sh\necho start >> $FD_RUN_DIR/starts\necho {} > $FD_RUN_DIR/engine.json\nexec sleep 60\n")
    engine.chmod(0o755)
    monkeypatch.setattr(api_server, "RESTART_PAUSE_S", 0.2)
    supervisor = EngineSupervisor([], tmp_path, "")
    monkeypatch.setattr(sys, "executable", str(engine))
    supervisor.start()
    supervisor.wait_ready(Mock(received=[]))
    return supervisor


def num_starts(tmp_path: Path) -> int:
    return (tmp_path / "starts").read_text().count("start")


def kill(supervisor: EngineSupervisor) -> None:
    process: Any = supervisor._process
    process.kill()
    process.wait()


def test_an_engine_that_dies_is_started_again(supervisor: EngineSupervisor, tmp_path: Path) -> None:
    kill(supervisor)
    deadline_s = time.monotonic() + 10
    while num_starts(tmp_path) < 2 and time.monotonic() < deadline_s:
        time.sleep(0.01)
    supervisor.stop(False, Mock(is_hurried=False))
    assert num_starts(tmp_path) == 2


@pytest.mark.parametrize("is_stop", [False, True], ids=["drain", "stop"])
def test_no_engine_starts_for_an_instance_that_ends(
    is_stop: bool, supervisor: EngineSupervisor, tmp_path: Path
) -> None:
    kill(supervisor)
    time.sleep(0.05)
    supervisor.stop(True, Mock(is_hurried=False)) if is_stop else supervisor.drain()
    time.sleep(0.5)
    assert num_starts(tmp_path) == 1


def test_a_drain_is_not_forgotten_with_the_engine_that_dies_of_it(
    supervisor: EngineSupervisor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, int]] = []
    (tmp_path / "engine.draining").touch()  # as an engine does
    process: Any = supervisor._process
    os.kill(process.pid, signal.SIGKILL)
    monkeypatch.setattr(os, "kill", lambda *signalled: told.append(signalled))
    time.sleep(0.5)
    assert told == [(os.getpid(), signal.SIGUSR1)] and num_starts(tmp_path) == 1
