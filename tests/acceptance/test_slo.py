"""SLO policies in a real cluster: instances learn what their steps take, and answers stay what they are."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator

import httpx
import pytest

from fastdeploy_pd.launch.embedded_redis import EmbeddedRedis
from fastdeploy_pd.launch.local import LocalCluster
from tests.acceptance.conftest import complete, stream_tokens

FLAGS = [
    *("--ops", "torch", "--max-num-seqs", "16", "--num-gpu-blocks-override", "600", "--max-num-batched-tokens", "512"),
    *("--placement", "slo", "--prefill-policy", "slack", "--slo-ttft-x", "5", "--slo-tpot-ms", "200"),
    *("--fairness", "vtc"),
]
NUM_TOKENS, NUM_ROUNDS = 24, 5
LENGTHS = (9, 40, 130, 300, 700, 1500)


@pytest.fixture(scope="module")
def cluster(redis_server: EmbeddedRedis) -> Iterator[LocalCluster]:
    with LocalCluster(redis_server.url, "slo", FLAGS, {"OMP_NUM_THREADS": "1"}) as started:
        started.start(["prefill", "decode", "mixed"])
        yield started


async def metric(client: httpx.AsyncClient, url: str, name: str) -> float:
    lines = (await client.get(url + "/metrics")).text.splitlines()
    return sum(float(x.split()[-1]) for x in lines if x.startswith(f"fastdeploy_pd:{name}"))


def test_answers_are_the_same_under_any_load(cluster: LocalCluster) -> None:
    urls = [i.http_url for i in cluster.instances]
    rng = random.Random(11)
    prompts = [[rng.randrange(10, 1500) for _ in range(n)] for n in LENGTHS]

    async def ask(client: httpx.AsyncClient, number: int) -> None:
        prompt = number % len(prompts)
        url, wishes = (
            rng.choice(urls),
            {"ttft_ms": rng.choice([20, 500, 5000]), "priority": rng.randrange(3), "user": rng.choice("abc")},
        )
        tokens, reason = await stream_tokens(
            client, url, prompts[prompt], max_tokens=NUM_TOKENS, cache_salt=f"{number}", **wishes
        )
        assert (tokens, reason) == (expected[prompt], "length")

    async def run() -> None:
        async with httpx.AsyncClient(timeout=120) as client:
            for prompt in prompts:
                expected.append(await complete(client, urls[0], prompt, max_tokens=NUM_TOKENS, cache_salt="quiet"))
            for number in range(NUM_ROUNDS):
                await asyncio.gather(*(ask(client, 12 * number + n) for n in range(12)))
            assert await metric(client, urls[2], "predictor_relative_error_count") > 50
            computed = [await metric(client, url, "computed_tokens_total") for url in urls]
            assert min(computed) > 50, (
                computed
            )  # the mixed one, and the two of the pair, took part; how much is for placement to say
            late = await client.post(
                urls[1] + "/v1/completions",
                json={"model": "demo", "prompt": prompts[-1], "max_tokens": 500, "ignore_eos": True, "deadline": 0.05},
            )
            assert (late.status_code, late.json()["error"]["param"]) == (400, "deadline"), late.text

    expected: list[list[int]] = []
    asyncio.run(run())
