"""The model that comes with the package: each backend continues a text as transformers does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

import fastdeploy_pd
from tests.model.tiny import TinyEngine

DIRECTORY = Path(fastdeploy_pd.__file__).parent / "demo_model"
TEXTS = ("The capital of France is", "Once upon a time, there was a little girl named")
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(DIRECTORY)
    return [tokenizer(text)["input_ids"] for text in TEXTS]


@pytest.fixture(scope="module")
def expected(prompts: list[list[int]]) -> list[list[int]]:
    model = transformers.AutoModelForCausalLM.from_pretrained(DIRECTORY, dtype=torch.float32).eval()
    found = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        for _ in range(NUM_TOKENS):
            with torch.no_grad():
                tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
        found.append(tokens[0, len(prompt) :].tolist())
    return found


@pytest.mark.parametrize("ops", ["paddle", "torch"])
def test_greedy_tokens(ops: str, prompts: list[list[int]], expected: list[list[int]]) -> None:
    engine = TinyEngine(DIRECTORY, ops)
    assert engine.generate([engine.request(p, NUM_TOKENS) for p in prompts]) == expected
