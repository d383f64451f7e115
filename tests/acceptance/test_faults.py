"""Processes die, Redis stops, clients leave: no token is lost, repeated or changed, and every block comes back."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator

import httpx
import pytest

from fastdeploy_pd.client import RedisClient
from fastdeploy_pd.launch.embedded_redis import EmbeddedRedis
from fastdeploy_pd.launch.local import LocalCluster, LocalInstance
from tests.acceptance.conftest import complete, stream_tokens
from tests.acceptance.standing import Standing

PROMPT = list(range(40, 300))
NUM_TOKENS = 400
FLAGS = ["--ops", "torch", "--max-num-seqs", "16"]
ENV = {"OMP_NUM_THREADS": "1"}


STOPPED_S = 10.0  # longer than any of our time limits for silence


@pytest.fixture
def own_redis() -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis() as server:
        yield server


@pytest.fixture(scope="module")
def standing(redis_server: EmbeddedRedis) -> Iterator[Standing]:
    with LocalCluster(redis_server.url, "faults", FLAGS, ENV) as cluster:
        yield Standing(cluster, "faults")


async def during_streams(url: str, action: Callable[[], Awaitable[None]], num_streams: int = 6) -> None:
    """Run sampled streams, do something in the middle, check every token."""
    # A salt of its own: no prefix of an earlier test's is in a cache.
    wishes = {"max_tokens": NUM_TOKENS, "temperature": 0.9, "cache_salt": uuid.uuid4().hex}
    async with httpx.AsyncClient(timeout=120) as client:
        expected = [await complete(client, url, PROMPT, seed=s, **wishes) for s in range(num_streams)]
        received: list[list[int]] = [[] for _ in range(num_streams)]
        streams = [
            asyncio.create_task(stream_tokens(client, url, PROMPT, into, seed=s, **wishes))
            for s, into in enumerate(received)
        ]
        while min(map(len, received)) < NUM_TOKENS // 20 and not any(s.done() for s in streams):
            await asyncio.sleep(0.001)
        assert not any(s.done() for s in streams), "the streams must still run when it happens"
        await action()
        for stream, tokens in zip(streams, expected, strict=True):
            found, reason = await stream
            assert reason == "length"
            assert found == tokens


def of_role(instances: list[LocalInstance], role: str) -> list[LocalInstance]:
    return [i for i in instances if i.role == role]


@pytest.mark.parametrize("victim_role", ["prefill", "decode"])
def test_killed_instance(standing: Standing, victim_role: str) -> None:
    instances = standing.of(["mixed", "prefill", "prefill", "decode", "decode"])
    victim = of_role(instances, victim_role)[0]

    async def kill() -> None:
        victim.kill()

    # The client talks to the mixed instance: the front end it is connected to must live.
    asyncio.run(during_streams(of_role(instances, "mixed")[0].http_url, kill))


def test_killed_engine_of_every_instance_in_turn(redis_server: EmbeddedRedis) -> None:
    with LocalCluster(redis_server.url, "kill-all", FLAGS, ENV) as cluster:
        instances = cluster.start(["prefill", "decode", "decode"])

        async def kill() -> None:
            for instance in instances[1:]:
                os.kill(instance.engine_pid, signal.SIGKILL)
                await asyncio.sleep(1.0)

        asyncio.run(during_streams(instances[0].http_url, kill))


@pytest.mark.parametrize("stopped", ["prefill engine", "decode engine", "front end"])
def test_a_process_that_is_stopped_for_a_while_and_goes_on(standing: Standing, stopped: str) -> None:
    instances = standing.of(["prefill", "decode", "mixed"])
    front = of_role(instances, "mixed")[0]
    pid = front.pid if stopped == "front end" else of_role(instances, stopped.split()[0])[0].engine_pid
    continued_s = 0.0

    async def stop() -> None:
        nonlocal continued_s
        os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(STOPPED_S)
        os.kill(pid, signal.SIGCONT)
        continued_s = time.monotonic()

    asyncio.run(during_streams(front.http_url, stop))
    assert time.monotonic() - continued_s < 30


def test_redis_away_for_thirty_seconds(own_redis: EmbeddedRedis) -> None:
    with LocalCluster(own_redis.url, "redis-away", FLAGS, ENV) as cluster:
        instances = cluster.start(["prefill", "decode"])
        urls = [i.http_url for i in instances]

        async def away() -> None:
            own_redis.kill()
            async with httpx.AsyncClient(timeout=30) as client:
                deadline_s = time.monotonic() + 30
                number = 0
                while time.monotonic() < deadline_s:
                    assert len(await complete(client, urls[number % 2], PROMPT[: 5 + number % 100], max_tokens=8)) == 8
                    number += 1
                    await asyncio.sleep(0.2)
            own_redis.restart()

        asyncio.run(during_streams(urls[0], away, num_streams=3))
        client = RedisClient(own_redis.url, "redis-away")
        deadline_s = time.monotonic() + 20
        while True:
            try:
                text = client.result(
                    client.submit({"model": "demo", "messages": [{"role": "user", "content": "hello"}]}), 20
                )
                break
            except OSError:
                assert time.monotonic() < deadline_s
        assert text


def test_a_dead_front_end_loses_no_submission(redis_server: EmbeddedRedis, standing: Standing) -> None:
    instances = standing.of(["prefill", "decode", "mixed"])
    client = RedisClient(redis_server.url, standing.topic)
    body = {
        "model": "demo",
        "prompt": PROMPT,
        "max_tokens": NUM_TOKENS,
        "ignore_eos": True,
        "temperature": 0.8,
        "seed": 3,
    }
    whole = client.result(client.submit(body, "completions"))
    ids = [client.submit(body, "completions") for _ in range(6)]
    time.sleep(0.8)
    instances[2].kill()
    for request_id in ids:
        tokens, text, index = [], "", 0
        for chunk in client.stream(request_id, 60):
            assert chunk["index"] == index
            index += len(chunk["token_ids"])
            tokens += chunk["token_ids"]
            text += chunk["text"]
        assert len(tokens) == NUM_TOKENS
        assert text == whole


async def free_blocks(client: httpx.AsyncClient, url: str) -> tuple[int, int]:
    """(free, all) KV blocks by an instance's metrics."""
    lines = (await client.get(url + "/metrics")).text.splitlines()
    values = {
        line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("fastdeploy_pd:kv_")
    }
    return int(values["fastdeploy_pd:kv_blocks_free"]), int(values["fastdeploy_pd:kv_cache_usage_perc"] * 1e6)


def test_a_thousand_aborts_leave_every_block_free(standing: Standing) -> None:
    rng = random.Random(7)
    urls = [i.http_url for i in standing.of(["prefill", "decode"])]

    async def one(client: httpx.AsyncClient, limit: asyncio.Semaphore, number: int) -> None:
        async with limit:
            prompt = [rng.randrange(3, 2000) for _ in range(rng.randrange(1, 400))]
            task = asyncio.create_task(stream_tokens(client, urls[number % 2], prompt, max_tokens=300))
            await asyncio.wait({task}, timeout=rng.expovariate(1 / 0.15))
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def run() -> None:
        limits = httpx.Limits(max_connections=64, max_keepalive_connections=0)
        async with httpx.AsyncClient(timeout=120, limits=limits) as client:
            limit = asyncio.Semaphore(32)
            await asyncio.gather(*(one(client, limit, n) for n in range(1000)))
            assert len(await complete(client, urls[0], PROMPT, max_tokens=5)) == 5
            deadline_s = time.monotonic() + 20
            while any([(await free_blocks(client, u))[1] for u in urls]):
                assert time.monotonic() < deadline_s, [await free_blocks(client, u) for u in urls]
                await complete(client, urls[0], [5], max_tokens=2)  # a step refreshes the metrics
                await asyncio.sleep(0.2)

    asyncio.run(run())


@pytest.mark.parametrize("leaver_role", ["prefill", "decode", "mixed"])
def test_terminated_instance_drains(standing: Standing, leaver_role: str) -> None:
    """SIGTERM during streams, its own and others', and while new requests come: all of them end as if nothing had happened."""
    instances = standing.of(["mixed", "mixed"] if leaver_role == "mixed" else ["mixed", "prefill", "decode"])
    leaver = of_role(instances, leaver_role)[-1]
    other = of_role(instances, "mixed")[0]

    async def leave() -> None:
        async with httpx.AsyncClient(timeout=60) as client:
            own = asyncio.create_task(
                stream_tokens(client, leaver.http_url, PROMPT, max_tokens=NUM_TOKENS, temperature=0.9, seed=0)
            )
            await asyncio.sleep(0.3)
            leaver.process.send_signal(signal.SIGTERM)
            for number in range(20):
                answer = await complete(client, other.http_url, PROMPT[: 20 + number], max_tokens=4)
                assert len(answer) == 4
            tokens, reason = await own
            assert (len(tokens), reason) == (NUM_TOKENS, "length")

    asyncio.run(during_streams(other.http_url, leave))
    assert leaver.process.wait(20) == 0
    assert "Traceback" not in leaver.last_lines()
