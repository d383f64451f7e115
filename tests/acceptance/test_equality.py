"""A disaggregated cluster gives token for token the answers of one mixed instance and of transformers."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from fastdeploy_pd.launch.embedded_redis import EmbeddedRedis
from fastdeploy_pd.launch.local import LocalCluster
from tests.acceptance.conftest import Case, answers_of, differences
from tests.transfer.optional import has_mooncake

TOPOLOGIES = {
    "mixed": ["mixed"],
    "1P1D": ["prefill", "decode"],
    "2P2D": ["prefill", "prefill", "decode", "decode"],
    "mixed+1P1D": ["mixed", "prefill", "decode"],
}
#: (chunked prefill, prefix cache): on and off
SETTINGS = [(True, True), (False, False)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ops", "topology", "setting"),
    [
        *((o, t, s) for o, t, s in itertools.product(["paddle", "torch"], ["mixed", "1P1D"], SETTINGS)),
        *((o, t, SETTINGS[0]) for o, t in itertools.product(["paddle", "torch"], ["2P2D", "mixed+1P1D"])),
        ("paddle", "2P2D", SETTINGS[1]),
        ("paddle", "mixed+1P1D", SETTINGS[1]),
        ("paddle", "1P1D", (True, False)),
        ("paddle", "1P1D", (False, True)),
    ],
    ids=lambda v: v if isinstance(v, str) else f"chunks-{v[0]}-prefix-{v[1]}",
)
def test_tokens_are_those_of_transformers(
    redis_server: EmbeddedRedis, cases: list[Case], ops: str, topology: str, setting: tuple[bool, bool]
) -> None:
    chunked, prefix = setting
    flags = ["--ops", ops, "--max-num-seqs", "16", "--max-model-len", "2048"]
    flags += (
        ["--enable-chunked-prefill", "--max-num-batched-tokens", "512"] if chunked else ["--no-enable-chunked-prefill"]
    )
    flags += ["--enable-prefix-caching" if prefix else "--no-enable-prefix-caching"]
    with LocalCluster(
        redis_server.url,
        f"equality-{ops}-{topology}-{chunked}-{prefix}".replace("+", "-"),
        flags,
        {"OMP_NUM_THREADS": "1"},
    ) as cluster:
        instances = cluster.start(TOPOLOGIES[topology])
        answers = asyncio.run(answers_of([i.http_url for i in instances], cases))
        assert not differences(cases, answers)


@pytest.mark.slow
def test_paddle_prefills_for_torch_and_the_other_way_round(redis_server: EmbeddedRedis, cases: list[Case]) -> None:
    some = cases[:40]
    for number, (prefill, decode) in enumerate([("paddle", "torch"), ("torch", "paddle")]):
        with LocalCluster(redis_server.url, f"frameworks-{number}", ["--cache-transfer-protocol", "tcp"]) as cluster:
            instances = [cluster.launch("prefill", ["--ops", prefill]), cluster.launch("decode", ["--ops", decode])]
            cluster.wait_ready(instances)
            assert not differences(some, asyncio.run(answers_of([i.http_url for i in instances], some)))


@pytest.mark.slow
def test_a_pair_whose_blocks_differ_says_so_once_and_decode_computes(
    redis_server: EmbeddedRedis, cases: list[Case]
) -> None:
    some = cases[:6]
    with LocalCluster(redis_server.url, "block-sizes", ["--ops", "torch"], {"OMP_NUM_THREADS": "1"}) as cluster:
        instances = [cluster.launch("prefill"), cluster.launch("decode", ["--block-size", "32"])]
        cluster.wait_ready(instances)
        assert not differences(some, asyncio.run(answers_of([i.http_url for i in instances], some)))
        log = (instances[0].log_dir / "output.log").read_text()
    assert log.count(f"no KV cache can be handed to {instances[1].instance_id}") == 1
    assert "block_size: 64 != 32" in log


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["nccl", "mooncake"])
def test_other_ways_for_the_blocks(redis_server: EmbeddedRedis, cases: list[Case], backend: str) -> None:
    if backend == "mooncake" and not has_mooncake():
        pytest.skip("no Mooncake here")
    some = cases[:20]
    flags = ["--cache-transfer-protocol", backend]
    env = {"FD_CLUSTER_SECRET": "a secret that all instances know"}
    with LocalCluster(redis_server.url, f"way-{backend}", flags, env) as cluster:
        instances = cluster.start(["prefill", "decode"])
        assert not differences(some, asyncio.run(answers_of([i.http_url for i in instances], some)))
