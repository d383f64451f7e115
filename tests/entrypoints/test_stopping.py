"""How an API process ends while answers are under way."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import time

import httpx
import pytest

from fastdeploy_pd.clock import WallClock
from fastdeploy_pd.cluster.links import AsyncLinks
from fastdeploy_pd.engine.client import ClusterClient
from fastdeploy_pd.engine.frontend import FrontEnd
from fastdeploy_pd.entrypoints.openai import worker
from fastdeploy_pd.entrypoints.openai.app import create_app
from fastdeploy_pd.entrypoints.openai.signals import Signals
from tests.entrypoints.stub_engine import MODEL, default_options, demo_tokenizer

DRAIN_S = 3.0


async def answer_while_stopping(signals: list[int]) -> tuple[httpx.Response | None, float]:
    """Ask for what no instance is there to serve, send these signals. Returns: the answer, None if it is cut off, and its seconds."""
    links = AsyncLinks("front")
    client = ClusterClient(FrontEnd("front", random.Random(0)), links, WallClock())
    app = create_app(client, demo_tokenizer(), default_options())
    await client.start()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ready = asyncio.Event()
        serving = asyncio.create_task(
            worker._serve_http(
                app, (listener, None), client, None, Signals(), ready.set, lambda: None
            )  # what main runs
        )
        await ready.wait()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1/completions"
        async with httpx.AsyncClient(timeout=20) as http:
            asked = asyncio.create_task(http.post(url, json={"model": MODEL, "prompt": "x", "stream": True}))
            while not client.front_end.requests:
                await asyncio.sleep(0.01)
            begun_s = time.monotonic()
            for number in signals:
                os.kill(os.getpid(), number)
                await asyncio.sleep(0.3)
            await asyncio.wait({asked, serving}, return_when=asyncio.FIRST_COMPLETED)
            seconds = time.monotonic() - begun_s
            answer = await asked if asked.done() else None  # the process would end now, and its connections with it
            asked.cancel()
            await serving
    await client.stop()
    links.close()
    return answer, seconds


@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGUSR1], [signal.SIGUSR1, signal.SIGTERM]])
def test_what_a_drain_cannot_wait_for_ends_in_an_error(signals: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when an operator's SIGTERM follows the end of a drained engine."""
    monkeypatch.setattr(worker, "DRAIN_S", DRAIN_S)
    answer, seconds = asyncio.run(answer_while_stopping(signals))
    assert answer is not None and answer.status_code == 503, "it was cut off"
    assert answer.json()["error"]["code"] == "draining"
    assert DRAIN_S - worker.LAST_WORDS_S <= seconds < DRAIN_S + 5


def test_an_end_at_once_leaves_nobody_without_a_word() -> None:
    answer, seconds = asyncio.run(answer_while_stopping([signal.SIGINT]))
    assert answer is not None and answer.status_code == 503, "it was cut off"
    assert answer.json()["error"]["code"] == "draining"
    assert seconds < 2 * worker.LAST_WORDS_S


@pytest.mark.parametrize("signals", [[signal.SIGTERM] * 2, [signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM]])
def test_a_second_signal_hurries(signals: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "DRAIN_S", 20.0)
    answer, seconds = asyncio.run(answer_while_stopping(signals))
    assert answer is None and seconds < 10
