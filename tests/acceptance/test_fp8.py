"""KV in fp8: a pair answers what one instance does, and moves a quarter of float32's bytes."""

from __future__ import annotations

import asyncio

import pytest

from fastdeploy_pd.launch.embedded_redis import EmbeddedRedis
from fastdeploy_pd.launch.local import LocalCluster
from tests.acceptance.conftest import OUTPUT_TOKENS, Case, answers_of, make_prompts
from tests.acceptance.test_prefix_cache import metric

pytestmark = pytest.mark.slow
FLAGS = ["--ops", "torch", "--max-model-len", "512", "--no-enable-prefix-caching", "--kv-cache-dtype", "fp8"]
BLOCK_BYTES = 8 * 2 * 2 * 64 * 32  # of the demo model: layers, K and V, heads, tokens, head_dim, a byte each


def test_a_pair_answers_what_one_instance_does(redis_server: EmbeddedRedis) -> None:
    prompts = [Case(prompt, []) for prompt in make_prompts(30, 400)]
    answers = []
    for roles in (["mixed"], ["prefill", "decode"]):
        with LocalCluster(redis_server.url, f"fp8-{len(roles)}", FLAGS, {"OMP_NUM_THREADS": "1"}) as cluster:
            instances = cluster.start(roles)
            answers.append(asyncio.run(answers_of([i.http_url for i in instances], prompts)))
            if len(roles) == 2:
                blocks = sum(-(-len(c.prompt) // 64) for c in prompts)
                assert metric(instances[1], "handover_bytes_total") == blocks * BLOCK_BYTES
    assert all(len(a) == OUTPUT_TOKENS for a in answers[0])
    assert answers[0] == answers[1]
