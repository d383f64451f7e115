"""Logits and greedy tokens of every family on every backend equal transformers'."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from fastdeploy_pd.core.batch import ScheduledSequence
from fastdeploy_pd.model.ops.base import StepInputs
from fastdeploy_pd.model.runner import attention_plan
from tests.model.tiny import FAMILIES, TinyEngine, write_checkpoint

OPS = ("reference", "paddle", "torch")


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, transformers.PreTrainedModel]:
    directory = tmp_path_factory.mktemp(request.param)
    return directory, write_checkpoint(request.param, directory, shard=request.param == "qwen2")


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed + length).integers(2, 199, length).tolist()


def reference_tokens(model: transformers.PreTrainedModel, prompt: list[int], num_tokens: int) -> list[int]:
    tokens = torch.tensor([prompt])
    for _ in range(num_tokens):
        with torch.no_grad():
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    return tokens[0, len(prompt) :].tolist()


@pytest.mark.parametrize("ops", OPS)
def test_logits(family: tuple[Path, transformers.PreTrainedModel], ops: str) -> None:
    directory, model = family
    engine = TinyEngine(directory, ops)
    for length in (1, 63, 64, 65, 200):
        prompt = prompt_of(length)
        with torch.no_grad():
            expected = model(torch.tensor([prompt])).logits[0].numpy()
        sequence = ScheduledSequence(engine.request(prompt), 0, length)
        rows = np.arange(length)
        plan = attention_plan([sequence], engine.layout.block_size)
        runner = engine.runner
        logits = runner.decoder.forward(StepInputs(np.array(prompt), rows, rows, plan), runner.caches)
        assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("ops", OPS)
def test_64_greedy_tokens(family: tuple[Path, transformers.PreTrainedModel], ops: str) -> None:
    directory, model = family
    prompt = prompt_of(30)
    engine = TinyEngine(directory, ops)
    assert engine.generate([engine.request(prompt, 64)]) == [reference_tokens(model, prompt, 64)]


@pytest.mark.parametrize("ops", OPS)
def test_chunks_and_batches_change_nothing(family: tuple[Path, transformers.PreTrainedModel], ops: str) -> None:
    directory, model = family
    lengths = (1, 5, 64, 65, 130)
    engine = TinyEngine(directory, ops, block_size=16, num_blocks=80)
    expected = [reference_tokens(model, prompt_of(n), 6) for n in lengths]
    together = engine.generate([engine.request(prompt_of(n), 6) for n in lengths], chunk=37)
    assert together == expected


@pytest.mark.parametrize(
    ("first_ops", "second_ops"), [("paddle", "torch"), ("torch", "paddle"), ("paddle", "reference")]
)
def test_one_backend_continues_what_another_began(
    family: tuple[Path, transformers.PreTrainedModel], first_ops: str, second_ops: str
) -> None:
    """What one writes lies in the pool's bytes; what is put into the other's bytes is what it attends to."""
    directory, model = family
    prompt = prompt_of(70)
    first, second = TinyEngine(directory, first_ops), TinyEngine(directory, second_ops)
    second.generate([second.request(prompt_of(90), 2)])
    request = first.request(prompt, 10)
    first.step([request])
    second.pool[:] = first.pool
    assert second.generate([request]) == [reference_tokens(model, prompt, 10)]


@pytest.mark.parametrize("ops", ["paddle", "torch"])
def test_prompt_logprobs_do_not_depend_on_chunks(family: tuple[Path, transformers.PreTrainedModel], ops: str) -> None:
    directory, model = family
    prompt = prompt_of(50)
    with torch.no_grad():
        logprobs = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    expected = [float(logprobs[p - 1, t]) for p, t in enumerate(prompt) if p]
    for chunk in (7, 1000):
        engine = TinyEngine(directory, ops)
        request = engine.request(prompt, 1, prompt_logprobs=2, logprobs=3)
        found: list[object] = []
        while not request.output_token_ids:
            output = engine.step([request], chunk)[0]
            found.extend(output.prompt_logprobs)
        assert found[0] is None
        assert [f.logprob for f in found[1:]] == pytest.approx(expected, abs=1e-3)
        assert len(found) == len(prompt)
        assert output.logprobs is not None
        assert output.logprobs.token_id == output.logprobs.top[0][0]
