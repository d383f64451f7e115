"""Real clusters of processes on this machine; with `--device cuda` (pytest's, this directory given) on its GPUs."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch
import transformers

from fastdeploy_pd.entrypoints.tokenizer import Tokenizer
from fastdeploy_pd.flags import DEMO_MODEL
from fastdeploy_pd.launch.local import LocalCluster, LocalInstance
from tests.transfer.gpu import num_gpus

NUM_PROMPTS = 200
MAX_PROMPT_TOKENS = 2000
OUTPUT_TOKENS = 12
MIN_GAP = 2e-3  # of the two best logits: closer than rounding could turn, a token is nobody's fault

#: last on every instance's command line, so it counts
GPU_FLAGS = ["--device", "cuda", "--ops", "torch", "--dtype", "float32", "--cache-transfer-protocol", "ipc"]
GPU_FLAGS += [
    "--gpu-memory-utilization",
    "0.02",
]  # a share of what is free: instances have to find room beside each other
NOT_ON_GPUS = {
    "test_paddle_prefills_for_torch_and_the_other_way_round": "Paddle's wheels have no kernels for every card",
    "test_other_ways_for_the_blocks": "the way between GPUs is ipc",
    "test_the_idle_side_gives_an_instance": "the demo model puts no GPU under pressure",
    "test_a_drain_under_load_ends_when_all_is_served": "a GPU has served all before the second command is there",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where instances compute")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--device", "cpu") == "cuda":
        for item in items:
            name = getattr(item, "originalname", item.name)
            reason = "no GPU here" if num_gpus() == 0 else NOT_ON_GPUS.get(name)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def device(request: pytest.FixtureRequest) -> Iterator[None]:
    """With --device cuda every instance that a test launches is on a GPU, as long as there are as many one of its own."""
    launch = LocalCluster.launch

    def on_gpu(
        cluster: LocalCluster, role: str, flags: Sequence[str] = (), env: Mapping[str, str] | None = None
    ) -> LocalInstance:
        place = len(cluster.instances)
        order = ",".join(str((place + n) % num_gpus()) for n in range(num_gpus()))
        return launch(cluster, role, [*flags, *GPU_FLAGS], {"CUDA_VISIBLE_DEVICES": order, **(env or {})})

    with pytest.MonkeyPatch.context() as patch:
        if request.config.getoption("--device", "cpu") == "cuda":
            patch.setattr(LocalCluster, "launch", on_gpu)
        yield


@dataclass(frozen=True)
class Case:
    """A prompt and what any correct server answers, as far as it is beyond rounding."""

    prompt: list[int]
    expected: list[int]


def make_prompts(count: int, longest: int) -> list[list[int]]:
    """Prompts of 1 to `longest` tokens of the demo model's own kind of text; some share long beginnings."""
    rng = random.Random(11)
    tokenizer = Tokenizer.from_directory(DEMO_MODEL)
    sentences = [
        "What is prefill?", "Once upon a time, there was a small fox named Tom who lived near a lighthouse. ",
        "Prefill reads the prompt. Decode writes the answer. ", "Tell me a story about an owl and a river. ",
        "The KV cache holds the keys and values of all tokens so far. ", "Redis is where the instances find each other. ",
    ]  # fmt: skip
    shared = tokenizer.encode("".join(rng.choice(sentences) for _ in range(200)))
    prompts = []
    for number in range(count):
        length = 1 + round((longest - 1) * (number / (count - 1)) ** 6)
        own = tokenizer.encode("".join(rng.choice(sentences) for _ in range(length // 4 + 8)))
        start = shared[: rng.randrange(length)] if rng.random() < 0.4 else []
        prompts.append((start + own)[:length])
    rng.shuffle(prompts)
    return prompts


def reference_answers(prompts: Sequence[list[int]], num_tokens: int) -> list[Case]:
    """Greedy answers of transformers in float32, cut where the two best logits are nearly equal."""
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()
    cases = []
    for prompt in prompts:
        cache, ids, expected = None, torch.tensor([prompt]), []
        for _ in range(num_tokens):
            with torch.inference_mode():
                output = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            best = output.logits[0, -1].topk(2)
            if best.values[0] - best.values[1] < MIN_GAP:
                break
            cache, ids = output.past_key_values, best.indices[:1].view(1, 1)
            expected.append(int(best.indices[0]))
        cases.append(Case(prompt, expected))
    return cases


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    found = reference_answers(make_prompts(NUM_PROMPTS, MAX_PROMPT_TOKENS), OUTPUT_TOKENS)
    assert sum(len(c.expected) for c in found) > 0.9 * NUM_PROMPTS * OUTPUT_TOKENS
    return found


async def complete(client: httpx.AsyncClient, url: str, prompt: list[int], **changes: object) -> list[int]:
    """The greedy answer's token ids."""
    body = {"model": "demo", "prompt": prompt, "max_tokens": OUTPUT_TOKENS, "temperature": 0, "ignore_eos": True}
    answer = await client.post(url + "/v1/completions", json={**body, "return_token_ids": True, **changes})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["token_ids"]


async def stream_tokens(
    client: httpx.AsyncClient, url: str, prompt: list[int], into: list[int] | None = None, **changes: object
) -> tuple[list[int], str | None]:
    """Token ids of a streamed answer, which come into `into` one by one, and its finish reason (None: the stream broke off)."""
    body = {
        "model": "demo",
        "prompt": prompt,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    tokens: list[int] = [] if into is None else into
    reason = None
    async with client.stream("POST", url + "/v1/completions", json={**body, **changes}) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                assert "error" not in event, event
                for choice in event["choices"]:
                    tokens += choice.get("token_ids", [])
                    reason = choice["finish_reason"] or reason
    return tokens, reason


async def answers_of(
    urls: Sequence[str], cases: Sequence[Case], concurrency: int = 24, salt: str = ""
) -> list[list[int]]:
    """Every case's answer, many at a time, spread over the instances' ports."""
    limit = asyncio.Semaphore(concurrency)
    async with httpx.AsyncClient(timeout=240, limits=httpx.Limits(max_connections=concurrency + 8)) as client:

        async def one(number: int, case: Case) -> list[int]:
            async with limit:
                return await complete(
                    client, urls[number % len(urls)], case.prompt, **({"cache_salt": salt} if salt else {})
                )

        return await asyncio.gather(*(one(n, c) for n, c in enumerate(cases)))


def differences(cases: Sequence[Case], answers: Sequence[Sequence[int]]) -> list[tuple[int, list[int], list[int]]]:
    """(prompt length, expected, found) of every answer that is not what it must be."""
    return [
        (len(c.prompt), c.expected, list(a)[: len(c.expected)])
        for c, a in zip(cases, answers, strict=True)
        if list(a)[: len(c.expected)] != c.expected or len(a) != OUTPUT_TOKENS
    ]


def logs_of(directory: Path) -> str:
    """Whatever the instances said, for a failing test's report."""
    return "\n".join(p.read_text(errors="replace")[-2000:] for p in directory.rglob("output.log"))
