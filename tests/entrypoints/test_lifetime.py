"""How an instance ends: what it leaves, and which engine is started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from fastdeploy_pd.entrypoints.openai import api_server
from fastdeploy_pd.entrypoints.openai.api_server import EngineSupervisor
from fastdeploy_pd.entrypoints.openai.signals import Signals
from fastdeploy_pd.launch.local import LocalCluster
from tests.transfer.test_attacks import until

WAIT_S = 20.0
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
        found += [grandchild for child in found for grandchild in children(child)]
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
    (left,) = tmp_path.glob("fastdeploy-pd-*")
    assert end(0.0, signal.SIGTERM, 1, tmp_path)[0] == 0
    assert not left.exists()


def tell(process: subprocess.Popen[bytes], number: int | str) -> None:
    os.killpg(process.pid, TERM) if isinstance(number, str) else process.send_signal(number)


TERM, INT, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1  # the last one is sent by the process itself


def remembered(*received: int) -> Signals:
    """Of a process that hears no more of them."""
    signals = Signals.__new__(Signals)
    signals.received = list(received)
    return signals


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize(
    ("numbers", "last_words"),
    [
        ([INT], "draining"),
        ([INT, USR1], "draining"),
        ([TERM, USR1], "[DONE]"),
        ([USR1, TERM], "[DONE]"),
        (["group"], "[DONE]"),
        ([TERM, TERM], ""),
    ],
)
def test_signals_under_an_answer(numbers: list[int | str], last_words: str, workers: str) -> None:
    """With several API processes, they come to the first one alone; or one SIGTERM to all of the process group, as systemd sends it."""
    with LocalCluster(None, "local", ["--model", "demo", "--workers", workers]) as cluster:
        (instance,) = cluster.start(["mixed"])
        body = {"model": "demo", "prompt": [5] * 9, "max_tokens": 900, "ignore_eos": True, "stream": True}
        said, left = "", list(numbers)
        with suppress(httpx.TransportError):
            with httpx.stream("POST", instance.http_url + "/v1/completions", json=body, timeout=60) as answer:
                for line in filter(None, answer.iter_lines()):
                    said = line
                    if left:
                        tell(instance.process, left.pop(0))
                        begun_s = time.monotonic()
                        time.sleep(0.2)
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
    signals = remembered(*received)
    assert (signals.is_gentle, signals.is_hurried) == (is_gentle, is_hurried)


class Supervisor(EngineSupervisor):
    """Of engines that do nothing but count themselves. What it sends to its own process is remembered in its place."""

    def num_starts(self) -> int:
        return (self._run_dir / "starts").read_text().count("start")

    def kill(self) -> None:
        process: Any = self._process
        process.kill()
        process.wait()


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Signals that this process sends to itself, which does not get them."""
    numbers: list[int] = []
    kill = os.kill
    monkeypatch.setattr(os, "kill", lambda pid, n: numbers.append(n) if pid == os.getpid() else kill(pid, n))
    return numbers


@pytest.fixture
def supervisor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[int]) -> Iterator[Supervisor]:
    engine = tmp_path / "engine"
    engine.write_text("#!/bin/sh\necho start >> $FD_RUN_DIR/starts\necho {} > $FD_RUN_DIR/engine.json\nexec sleep 60\n")
    engine.chmod(0o755)
    monkeypatch.setattr(api_server, "RESTART_PAUSE_S", 1.0)
    supervisor = Supervisor([], tmp_path, "")
    monkeypatch.setattr(sys, "executable", str(engine))
    supervisor.start()
    until(lambda: (tmp_path / "engine.json").exists() and "{}" in (tmp_path / "engine.json").read_text(), WAIT_S)
    supervisor.wait_ready(remembered())
    yield supervisor
    supervisor.stop(False, remembered())


def test_an_engine_that_dies_is_started_again(supervisor: Supervisor) -> None:
    supervisor.kill()
    until(lambda: supervisor.num_starts() == 2, WAIT_S)


@pytest.mark.parametrize("is_stop", [False, True], ids=["drain", "stop"])
def test_no_engine_starts_for_an_instance_that_ends(
    is_stop: bool, supervisor: Supervisor, caplog: pytest.LogCaptureFixture
) -> None:
    supervisor.kill()
    until(lambda: "starting it again" in caplog.text, WAIT_S)
    supervisor.stop(True, remembered()) if is_stop else supervisor.drain()
    time.sleep(1.5)
    assert supervisor.num_starts() == 1


def test_a_drain_is_not_forgotten_with_the_engine_that_dies_of_it(
    supervisor: Supervisor, tmp_path: Path, told: list[int]
) -> None:
    (tmp_path / "engine.draining").touch()  # as an engine does
    supervisor.kill()
    until(lambda: told == [USR1], WAIT_S)
    assert supervisor.num_starts() == 1 and not supervisor.has_given_up


def test_engines_that_end_too_often_are_no_drain(
    supervisor: Supervisor, told: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who started the instance should see that it failed."""
    monkeypatch.setattr(api_server, "MAX_ENGINE_RESTARTS", 0)
    supervisor.kill()
    until(lambda: told == [USR1], WAIT_S)
    assert supervisor.has_given_up
