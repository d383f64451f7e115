"""What one instance has computed serves requests that arrive at another one."""

from __future__ import annotations

import time

import httpx
import pytest

from fastdeploy_pd.launch.embedded_redis import EmbeddedRedis
from fastdeploy_pd.launch.local import LocalCluster, LocalInstance

pytestmark = pytest.mark.slow
PROMPT = [1 + n % 300 for n in range(900)]


def ask(instance: LocalInstance, prompt: list[int]) -> tuple[list[int], int]:
    """Greedy token ids, and how many of the prompt's tokens came from a prefix cache."""
    body = {"model": "demo", "prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    answer = httpx.post(instance.http_url + "/v1/completions", json={**body, "return_token_ids": True}, timeout=120)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    return found["choices"][0]["token_ids"], found["usage"]["prompt_tokens_details"]["cached_tokens"]


def metric(instance: LocalInstance, name: str) -> float:
    """Sum of a metric's values."""
    lines = httpx.get(instance.http_url + "/metrics", timeout=30).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"fastdeploy_pd:{name}"))


def test_requests_go_where_their_prefix_is(redis_server: EmbeddedRedis) -> None:
    flags = ["--max-model-len", "2048", "--max-num-seqs", "4"]
    with LocalCluster(redis_server.url, "prefix-placement", flags, {"OMP_NUM_THREADS": "1"}) as cluster:
        instances = cluster.start(["mixed", "mixed", "mixed"])
        first, num_cached = ask(instances[0], PROMPT)
        assert num_cached == 0
        time.sleep(1.0)  # five times the interval at which instances publish
        for number, instance in enumerate(instances * 3):
            assert ask(instance, [*PROMPT, 5 + number])[1] == 896, "it was placed where the prefix is not"
        assert ask(instances[1], PROMPT)[0] == first
        assert sum(metric(i, "prefix_cache_hits_total") > 0 for i in instances) == 1


@pytest.mark.parametrize("backend", ["shm", "tcp"])
def test_a_prefix_is_fetched_from_the_peer_that_has_it(redis_server: EmbeddedRedis, backend: str) -> None:
    """An instance that has just started takes the other's blocks: decode computes the rest by itself, prefill what it is ordered."""
    longer = [*PROMPT, *range(100, 300)]
    flags = ["--max-model-len", "2048", "--max-num-seqs", "4", "--cache-transfer-protocol", backend]
    with LocalCluster(redis_server.url, f"prefix-fetch-{backend}", flags, {"OMP_NUM_THREADS": "1"}) as cluster:
        prefill, decode = cluster.start(["prefill", "decode"])
        expected, expected_longer = ask(prefill, [*PROMPT, 5])[0], ask(prefill, longer)[0]
        assert metric(decode, "handover_bytes_total") > 0
        decode.kill()
        (fresh,) = cluster.start(["decode"])
        time.sleep(1.0)
        assert ask(prefill, [*PROMPT, 5]) == (expected, 896)
        assert metric(fresh, "prefix_fetched_tokens_total") == 896
        assert metric(fresh, "prefix_fetched_bytes_total") > 0
        assert metric(fresh, "handover_bytes_total") == metric(fresh, "prefix_fetch_failures_total") == 0
        assert ask(prefill, [*PROMPT, 5]) == (expected, 896)  # it holds the prefix now, and computes the rest again
        assert metric(fresh, "prefix_fetched_tokens_total") == 896
        prefill.kill()
        (fresh_prefill,) = cluster.start(["prefill"])
        time.sleep(1.0)
        assert ask(fresh, longer) == (expected_longer, 896)
        assert metric(fresh_prefill, "prefix_fetched_tokens_total") == 896
        assert metric(fresh, "handover_bytes_total") > 0 == metric(fresh_prefill, "prefix_fetch_failures_total")


def test_blocks_come_back_from_host_memory() -> None:
    flags = [
        "--max-model-len",
        "1024",
        "--max-num-seqs",
        "2",
        "--num-gpu-blocks-override",
        "20",
        "--swap-space",
        "0.05",
    ]
    with LocalCluster(None, flags=flags, env={"OMP_NUM_THREADS": "1"}) as cluster:
        (instance,) = cluster.start(["mixed"])
        first, num_cached = ask(instance, PROMPT)
        assert num_cached == 0
        for number in range(3):  # pushes the first one's 15 blocks out of 20
            ask(instance, [300 + number, *PROMPT])
        assert ask(instance, PROMPT) == (first, 896)
        assert metric(instance, "prefix_cache_swap_hits_total") > 0
