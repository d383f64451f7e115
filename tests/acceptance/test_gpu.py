"""The cluster on GPUs: the same tokens as transformers on the CPU, KV by CUDA IPC."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from fastdeploy_pd.launch.embedded_redis import EmbeddedRedis
from fastdeploy_pd.launch.local import LocalCluster
from tests.acceptance.conftest import OUTPUT_TOKENS, Case, answers_of, differences, make_prompts
from tests.transfer.gpu import num_gpus

pytestmark = [pytest.mark.slow, pytest.mark.skipif(num_gpus() == 0, reason="no GPU here")]
FLAGS = ["--device", "cuda", "--dtype", "float32", "--num-gpu-blocks-override", "700", "--max-num-seqs", "16"]


def start(cluster: LocalCluster, roles: list[str]) -> list[str]:
    """Returns: the instances' URLs; each on a GPU of its own as long as there are as many."""
    instances = [
        cluster.launch(
            role, [], {"CUDA_VISIBLE_DEVICES": ",".join(str((n + i) % num_gpus()) for i in range(num_gpus()))}
        )
        for n, role in enumerate(roles)
    ]
    cluster.wait_ready(instances)
    return [i.http_url for i in instances]


@pytest.mark.parametrize("roles", [["mixed"], ["prefill", "decode"], ["mixed", "prefill", "decode"]], ids="-".join)
@pytest.mark.parametrize("is_chunked", [True, False], ids=["chunks", "whole"])
def test_tokens_are_those_of_transformers(
    redis_server: EmbeddedRedis, cases: list[Case], roles: list[str], is_chunked: bool
) -> None:
    flags = [*FLAGS, "--max-model-len", "2048"]
    flags += (
        ["--enable-chunked-prefill", "--max-num-batched-tokens", "512"]
        if is_chunked
        else ["--no-enable-chunked-prefill"]
    )
    with LocalCluster(redis_server.url, f"gpu-{'-'.join(roles)}-{is_chunked}", flags) as cluster:
        urls = start(cluster, roles)
        assert not differences(cases, asyncio.run(answers_of(urls, cases)))
        if roles == ["prefill", "decode"]:
            metrics = "".join(httpx.get(f"{url}/metrics").text for url in urls)
            moved = [line for line in metrics.splitlines() if line.startswith("fastdeploy_pd:handover_bytes_total{")]
            assert len(moved) == 1 and 'backend="ipc"' in moved[0] and float(moved[0].split()[-1]) > 1e6, moved


@pytest.mark.parametrize(("kv_dtype", "count"), [("auto", 500), ("fp8", 100)])
def test_prompts_in_bfloat16_have_the_same_answers_from_a_pair_and_from_one(
    redis_server: EmbeddedRedis, kv_dtype: str, count: int
) -> None:
    """One at a time: what is computed beside a sequence changes products' shapes, and so what bfloat16 makes of near ties."""
    prompts = [Case(prompt, []) for prompt in make_prompts(count, 1900)]
    flags = ["--device", "cuda", "--dtype", "bfloat16", "--max-num-seqs", "16", "--max-model-len", "2048"]
    flags += ["--kv-cache-dtype", kv_dtype]
    answers = []
    for roles in (["mixed"], ["prefill", "decode"]):
        # No prefix cache: it cuts prompts elsewhere, and so do chunks.
        more = ["--num-gpu-blocks-override", "700", "--no-enable-prefix-caching", "--no-enable-chunked-prefill"]
        with LocalCluster(redis_server.url, f"gpu-{kv_dtype}-{len(roles)}", [*flags, *more]) as cluster:
            answers.append(asyncio.run(answers_of(start(cluster, roles)[-1:], prompts, concurrency=1)))
    assert len(answers[0]) == count and all(len(a) == OUTPUT_TOKENS for a in answers[0])
    assert answers[0] == answers[1]


def test_what_does_not_fit_is_said(redis_server: EmbeddedRedis) -> None:
    with LocalCluster(
        redis_server.url, "gpu-large", ["--device", "cuda", "--num-gpu-blocks-override", "100000000"]
    ) as cluster:
        instance = cluster.launch("mixed")
        with pytest.raises(Exception, match="no KV pool on it: cuMemAlloc failed: CUDA_ERROR_OUT_OF_MEMORY"):
            cluster.wait_ready([instance])


@pytest.mark.skipif(num_gpus() < 2, reason="fewer than two GPUs here")
@pytest.mark.parametrize("sizes", [[2], [2, 1], [1, 2], [2, 2]], ids=str)
def test_several_ranks_answer_what_one_does(redis_server: EmbeddedRedis, cases: list[Case], sizes: list[int]) -> None:
    """Of [2, 1] prefill has two ranks, decode one. NCCL wants a GPU a rank; instances may share them."""
    flags = [*FLAGS, "--max-model-len", "2048", "--max-num-batched-tokens", "512"]
    roles = ["mixed"] if len(sizes) == 1 else ["prefill", "decode"]
    with LocalCluster(redis_server.url, f"gpu-ranks-{'-'.join(map(str, sizes))}", flags) as cluster:
        instances = []
        for number, (role, size) in enumerate(zip(roles, sizes, strict=True)):
            order = ",".join(str((number + i) % num_gpus()) for i in range(num_gpus()))
            instances.append(
                cluster.launch(role, ["--tensor-parallel-size", str(size)], {"CUDA_VISIBLE_DEVICES": order})
            )
        cluster.wait_ready(instances)
        assert not differences(cases, asyncio.run(answers_of([i.http_url for i in instances], cases)))
