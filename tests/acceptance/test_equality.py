"""A disaggregated cluster gives token for token the answers of one mixed instance and of transformers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from fastdeploy_pd.launch.embedded_redis import EmbeddedRedis
from fastdeploy_pd.launch.local import LocalCluster
from tests.acceptance.conftest import Case, answers_of, differences
from tests.acceptance.standing import Standing
from tests.transfer.optional import has_mooncake

TOPOLOGIES = {  # in the order in which least has to be started
    "mixed": ["mixed"],
    "mixed+1P1D": ["mixed", "prefill", "decode"],
    "1P1D": ["prefill", "decode"],
    "2P2D": ["prefill", "prefill", "decode", "decode"],
}
#: (ops, chunked prefill, prefix cache)
SETTINGS = {
    ("paddle", True, True): list(TOPOLOGIES),
    ("paddle", False, False): list(TOPOLOGIES),
    ("torch", True, True): list(TOPOLOGIES),
    ("torch", False, False): ["mixed", "1P1D"],
    ("paddle", True, False): ["1P1D"],
    ("paddle", False, True): ["1P1D"],
}


@pytest.fixture(scope="module")
def standing(redis_server: EmbeddedRedis, request: pytest.FixtureRequest) -> Iterator[Standing]:
    """One cluster a setting."""
    ops, chunked, prefix = request.param
    flags = ["--ops", ops, "--max-num-seqs", "16", "--max-model-len", "2048"]
    flags += (
        ["--enable-chunked-prefill", "--max-num-batched-tokens", "512"] if chunked else ["--no-enable-chunked-prefill"]
    )
    flags += ["--enable-prefix-caching" if prefix else "--no-enable-prefix-caching"]
    topic = f"equality-{ops}-{chunked}-{prefix}"
    with LocalCluster(redis_server.url, topic, flags, {"OMP_NUM_THREADS": "1"}) as cluster:
        yield Standing(cluster, topic)


def id_of(value: object) -> str:
    return value if isinstance(value, str) else "{}-chunks-{}-prefix-{}".format(*value)  # type: ignore[misc]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("standing", "topology"), [(s, t) for s, names in SETTINGS.items() for t in names], indirect=["standing"], ids=id_of
)
def test_tokens_are_those_of_transformers(standing: Standing, cases: list[Case], topology: str) -> None:
    urls = [i.http_url for i in standing.of(TOPOLOGIES[topology])]
    # A salt of its own: what another topology has computed is in no prefix cache.
    assert not differences(cases, asyncio.run(answers_of(urls, cases, salt=topology)))


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
