"""--elastic auto in a real cluster: the idle side gives an instance to the one under pressure, and no stream notices."""

from __future__ import annotations

import asyncio
import time

import httpx

from fastdeploy_pd.launch.embedded_redis import EmbeddedRedis
from fastdeploy_pd.launch.local import LocalCluster
from tests.acceptance.conftest import complete

FLAGS = ["--ops", "torch", "--max-num-seqs", "4", "--elastic", "auto", "--elastic-cooldown", "5"]
PROMPTS = [list(range(40 + n, 80 + n)) for n in range(4)]
NUM_CLIENTS = 10


async def roles(client: httpx.AsyncClient, urls: list[str]) -> list[str]:
    return sorted([(await client.get(u + "/v1/admin/role")).json()["role"] for u in urls])


def test_the_idle_side_gives_an_instance(redis_server: EmbeddedRedis) -> None:
    with LocalCluster(redis_server.url, "elastic", FLAGS, {"OMP_NUM_THREADS": "1"}) as cluster:
        urls = [i.http_url for i in cluster.start(["prefill", "prefill", "decode"])]

        async def go() -> None:
            async with httpx.AsyncClient(timeout=120) as client:
                expected = [await complete(client, urls[0], p, max_tokens=100) for p in PROMPTS]
                is_over = asyncio.Event()

                async def load(number: int) -> None:
                    while not is_over.is_set():
                        prompt = number % len(PROMPTS)
                        url = urls[number % len(urls)]
                        assert await complete(client, url, PROMPTS[prompt], max_tokens=100) == expected[prompt]

                clients = [asyncio.create_task(load(n)) for n in range(NUM_CLIENTS)]
                deadline_s = time.monotonic() + 40
                while await roles(client, urls) != ["decode", "decode", "prefill"]:
                    assert time.monotonic() < deadline_s, "no flip came"
                    assert not any(c.done() for c in clients)
                    await asyncio.sleep(0.2)
                for _ in range(7):  # longer than the cool-down: nothing goes back, the last one stays
                    await asyncio.sleep(1.0)
                    assert await roles(client, urls) == ["decode", "decode", "prefill"]
                is_over.set()
                await asyncio.gather(*clients)

        asyncio.run(go())
