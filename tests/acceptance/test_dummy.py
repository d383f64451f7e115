"""--load-format dummy: a directory with a config.json alone serves, and a pair answers what one instance does."""

from __future__ import annotations

import asyncio
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import httpx

from fastdeploy_pd.launch.embedded_redis import EmbeddedRedis
from fastdeploy_pd.launch.local import LocalCluster
from tests.acceptance.conftest import complete, stream_tokens

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "max_position_embeddings": 512, "eos_token_id": 1,
    "initializer_range": 0.25,  # logits far enough apart that rounding doesn't decide
}  # fmt: skip


async def answers(urls: list[str]) -> list[list[int]]:
    rng = random.Random(5)
    prompts = [[rng.randrange(1000) for _ in range(rng.randrange(1, 300))] for _ in range(12)]
    async with httpx.AsyncClient(timeout=60) as client:
        some = [complete(client, urls[n % len(urls)], p, model="tiny") for n, p in enumerate(prompts[:-1])]
        streamed = await stream_tokens(client, urls[0], prompts[-1], model="tiny", max_tokens=12)
        return [*await asyncio.gather(*some), streamed[0]]


def test_up_asks_a_model_without_a_tokenizer_with_token_ids(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    command = [sys.executable, "-m", "fastdeploy_pd.entrypoints.cli", "up", "--once", "--ops", "torch"]
    flags = ["--model", str(tmp_path), "--", "--load-format", "dummy", "--num-gpu-blocks-override", "120"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert re.search(r"you: token ids.*: \d+ tokens\n\n  TTFT \d+ ms .*KV moved: [1-9]", done.stdout, re.DOTALL)


def test_a_pair_answers_what_one_instance_does(redis_server: EmbeddedRedis, tmp_path: Path) -> None:
    found = []
    for name, roles in (("mixed", ["mixed"]), ("pair", ["prefill", "decode"])):
        model = tmp_path / name / "tiny"  # of its own: nothing but config.json says that they are the same
        model.mkdir(parents=True)
        (model / "config.json").write_text(json.dumps(CONFIG))
        flags = ["--model", str(model), "--load-format", "dummy", "--num-gpu-blocks-override", "120"]
        with LocalCluster(redis_server.url, f"dummy-{name}", flags, {"OMP_NUM_THREADS": "1"}) as cluster:
            urls = [i.http_url for i in cluster.start(roles)]
            found.append(asyncio.run(answers(urls)))
            metrics = "".join(httpx.get(f"{url}/metrics").text for url in urls)
            assert ("fastdeploy_pd:handover_bytes_total{" in metrics) == (name == "pair")
    assert found[0] == found[1] and len({tuple(a) for a in found[0]}) > 1
    assert all(len(a) == 12 for a in found[0])
