"""Roles change and instances drain under load: no request fails, no token differs."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator

import httpx
import pytest

from fastdeploy_pd.launch.embedded_redis import EmbeddedRedis
from fastdeploy_pd.launch.local import LocalCluster
from tests.acceptance.conftest import complete, stream_tokens

FLAGS = ["--ops", "torch", "--max-num-seqs", "16", "--num-gpu-blocks-override", "600"]
ENV = {"OMP_NUM_THREADS": "1"}
NUM_FLIPS = 50
NUM_CLIENTS = 6
NUM_TOKENS = 24
NUM_LONG = 800
PROMPTS = [list(range(40 + n, 100 + 45 * n)) for n in range(8)]
TOPIC = "roles"


@pytest.fixture(scope="module")
def cluster(redis_server: EmbeddedRedis) -> Iterator[LocalCluster]:
    with LocalCluster(redis_server.url, TOPIC, FLAGS, ENV) as started:
        started.start(["prefill", "decode", "mixed"])
        yield started


async def ask(client: httpx.AsyncClient, url: str, number: int) -> list[int]:
    """An answer to one of PROMPTS, streamed or whole."""
    if number % 2:
        return await complete(client, url, PROMPTS[number % len(PROMPTS)], max_tokens=NUM_TOKENS)
    tokens, reason = await stream_tokens(client, url, PROMPTS[number % len(PROMPTS)], max_tokens=NUM_TOKENS)
    assert reason == "length"
    return tokens


Answered = Callable[[], Awaitable[None]]  # waits until clients have had another answer


async def under_load(urls: list[str], action: Callable[[httpx.AsyncClient, Answered], Awaitable[None]]) -> None:
    """Act while clients ask one request after the other; compare every token with those of the quiet cluster."""
    async with httpx.AsyncClient(timeout=60) as client:
        expected = [await ask(client, urls[0], n) for n in range(len(PROMPTS))]
        is_over, has_answered = asyncio.Event(), asyncio.Event()

        async def load(first: int) -> None:
            number = first
            while not is_over.is_set():
                assert await ask(client, urls[number % len(urls)], number) == expected[number % len(PROMPTS)]
                number += NUM_CLIENTS
                has_answered.set()

        async def answered() -> None:
            has_answered.clear()
            waiting = asyncio.create_task(has_answered.wait())
            await asyncio.wait([waiting, *clients], return_when=asyncio.FIRST_COMPLETED)
            assert not any(c.done() for c in clients), [c for c in clients if c.done()]

        clients = [asyncio.create_task(load(n)) for n in range(NUM_CLIENTS)]
        try:
            await action(client, answered)
        finally:
            is_over.set()
            await asyncio.gather(*clients)


def test_roles_flip_fifty_times_under_load(cluster: LocalCluster) -> None:
    urls = [i.http_url for i in cluster.instances]
    roles = {i.http_url: i.role for i in cluster.instances}
    rng, waits_s, refusals = random.Random(3), [], 0

    async def flip(client: httpx.AsyncClient, answered: Answered) -> None:
        nonlocal refusals
        while len(waits_s) < NUM_FLIPS:
            url = rng.choice(urls)
            role = rng.choice([r for r in ("prefill", "decode", "mixed") if r != roles[url]])
            asked_s = time.monotonic()
            answer = await client.post(url + "/v1/admin/role", json={"role": role})
            others = [r for u, r in roles.items() if u != url]
            if any(
                roles[url] != other and role == other and not {"mixed", lost} & set(others)
                for lost, other in (("prefill", "decode"), ("decode", "prefill"))
            ):
                refusals += 1
                assert answer.status_code == 409, answer.text
                assert "only instance" in answer.json()["error"]["message"]
                continue
            assert answer.status_code == 200, answer.text
            assert answer.json()["role"] == role
            waits_s.append(time.monotonic() - asked_s)
            roles[url] = role
            await answered()

    asyncio.run(under_load(urls, flip))
    assert max(waits_s) < 2, sorted(waits_s)[-5:]
    assert refusals, "the rule of the last one was never met"


def fastdeploy_pd(redis_server: EmbeddedRedis, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fastdeploy_pd.entrypoints.cli", words[0], "--redis-url", redis_server.url]
    return subprocess.run(
        [*command, "--scheduler-topic", TOPIC, *words[1:]], capture_output=True, text=True, timeout=60, check=False
    )


def test_the_command_flips_by_id_and_by_address(cluster: LocalCluster, redis_server: EmbeddedRedis) -> None:
    for instance in cluster.instances:
        assert fastdeploy_pd(redis_server, "role", instance.instance_id, "mixed", "--force").returncode == 0
    first = cluster.instances[0]
    flipped = fastdeploy_pd(redis_server, "role", first.http_url.removeprefix("http://"), "decode")
    assert flipped.returncode == 0 and f"{first.instance_id} at {first.http_url} is decode" in flipped.stdout
    shown = httpx.get(first.http_url + "/v1/admin/role").json()
    assert shown["role"] == "decode" and abs(time.time() - shown["since_unix_s"]) < 30
    assert shown["left_of_old_role"] == {"requests": 0, "prefill_orders": 0}
    unknown = fastdeploy_pd(redis_server, "role", "nobody", "decode")
    assert unknown.returncode == 2 and first.instance_id in unknown.stderr


def test_a_drain_under_load_ends_when_all_is_served(cluster: LocalCluster, redis_server: EmbeddedRedis) -> None:
    prefill, decode, leaver = cluster.instances
    for instance, role in ((prefill, "prefill"), (decode, "decode"), (leaver, "mixed")):
        assert httpx.post(instance.http_url + "/v1/admin/role", json={"role": role, "force": True}).status_code == 200
    seen: list[dict[str, object]] = []

    async def leave(client: httpx.AsyncClient, answered: Answered) -> None:
        # Long enough that it still drains when it is asked again, by a command that takes a second to start.
        own = [
            asyncio.create_task(stream_tokens(client, leaver.http_url, PROMPTS[1], max_tokens=NUM_LONG))
            for _ in range(3)
        ]
        await answered()
        seen.append((await client.post(leaver.http_url + "/v1/admin/drain", json={"timeout_s": 40})).json())
        answer = await client.post(leaver.http_url + "/v1/admin/role", json={"role": "decode"})
        assert answer.status_code in (409, 503), answer.text
        command = await asyncio.to_thread(fastdeploy_pd, redis_server, "drain", leaver.http_url, "--timeout-s", "40")
        assert command.returncode == 0, command.stderr
        answers = await asyncio.gather(*own)
        assert all((len(tokens), reason) == (NUM_LONG, "length") for tokens, reason in answers)
        assert len({tuple(tokens) for tokens, _ in answers}) == 1

    asyncio.run(under_load([prefill.http_url, decode.http_url], leave))
    assert seen[0]["is_draining"] and 30 < float(str(seen[0]["timeout_s"])) <= 40.1
    assert leaver.process.wait(20) == 0
    assert "Traceback" not in leaver.last_lines()
