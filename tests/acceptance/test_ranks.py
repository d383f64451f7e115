"""Instances of several ranks: any pair of sizes answers what one rank does, a lost rank ends its instance and no other, nothing stays behind."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest

from fastdeploy_pd.launch.embedded_redis import EmbeddedRedis
from fastdeploy_pd.launch.local import LocalCluster, LocalInstance
from tests.acceptance.conftest import Case, answers_of, differences, make_prompts, reference_answers
from tests.acceptance.test_faults import during_streams
from tests.transfer.gpu import num_gpus

ENV = {"OMP_NUM_THREADS": "1"}
FLAGS = ["--max-num-seqs", "16", "--max-num-batched-tokens", "256", "--max-model-len", "1024", "--ops", "torch"]


def ranks(count: int) -> list[str]:
    return ["--tensor-parallel-size", str(count)]


def workers_of(pid: int) -> list[int]:
    """Process ids of an engine's workers."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def some() -> list[Case]:
    return reference_answers(make_prompts(24, 600), 12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prefill", "decode", "backend"),
    [(1, 2, "tcp"), (2, 1, "shm"), (2, 2, "tcp"), (4, 2, "shm")],
    ids=lambda v: str(v),
)
def test_a_pair_answers_what_one_rank_does(
    redis_server: EmbeddedRedis,
    some: list[Case],
    prefill: int,
    decode: int,
    backend: str,
    pytestconfig: pytest.Config,
) -> None:
    if pytestconfig.getoption("--device") == "cuda" and num_gpus() < max(prefill, decode):
        pytest.skip(f"fewer than {max(prefill, decode)} GPUs here, and ranks share none")
    flags = [*FLAGS, "--cache-transfer-protocol", backend]
    with LocalCluster(redis_server.url, f"ranks-{prefill}-{decode}", flags, ENV) as cluster:
        instances = [cluster.launch("prefill", ranks(prefill)), cluster.launch("decode", ranks(decode))]
        cluster.wait_ready(instances)
        urls = [i.http_url for i in instances]
        assert not differences(some, asyncio.run(answers_of(urls, some, concurrency=8)))
        pids = [p for i in instances for p in (i.engine_pid, *workers_of(i.engine_pid))]
        assert len(pids) == prefill + decode
    assert not any(map(is_running, pids))


def test_several_ranks_alone_answer_what_one_does(some: list[Case]) -> None:
    with LocalCluster(None, flags=[*FLAGS, *ranks(2)], env=ENV) as cluster:
        (instance,) = cluster.start(["mixed"])
        assert not differences(some, asyncio.run(answers_of([instance.http_url], some, concurrency=8)))


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["prefill", "decode"])
def test_a_killed_rank_ends_its_instance_and_the_cluster_goes_on(redis_server: EmbeddedRedis, victim: str) -> None:
    with LocalCluster(redis_server.url, f"rank-lost-{victim}", FLAGS, ENV) as cluster:
        lost = cluster.launch(victim, ranks(2))
        others = [cluster.launch("mixed"), cluster.launch("decode" if victim == "prefill" else "prefill")]
        cluster.wait_ready([lost, *others])
        worker = workers_of(lost.engine_pid)[0]

        async def kill() -> None:
            os.kill(worker, signal.SIGKILL)

        asyncio.run(during_streams(others[0].http_url, kill, num_streams=3))
        assert not is_running(lost.engine_pid)
        assert f"rank 1 (process {worker}) ended with status -9: the instance ends" in log_of(lost)


def log_of(instance: LocalInstance) -> str:
    return (instance.log_dir / "output.log").read_text(errors="replace")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_process_is_left_behind(how: signal.Signals) -> None:
    with LocalCluster(None, flags=[*FLAGS, *ranks(2)], env=ENV) as cluster:
        (instance,) = cluster.start(["mixed"])
        pids = [instance.engine_pid, *workers_of(instance.engine_pid)]
        assert len(pids) == 2
        os.kill(instance.engine_pid if how == signal.SIGKILL else instance.pid, how)
        end_s = time.monotonic() + 30
        while any(map(is_running, pids)):
            assert time.monotonic() < end_s
            time.sleep(0.05)
        if how != signal.SIGKILL:
            assert instance.process.wait(10) == 0
            assert "Traceback" not in log_of(instance) and "the instance ends" not in log_of(instance)
