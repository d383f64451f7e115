"""The demo model's answers are the recorded ones, token for token, on both frameworks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastdeploy_pd.entrypoints.tokenizer import Tokenizer
from fastdeploy_pd.flags import DEMO_MODEL
from tests.model.tiny import TinyEngine

RECORDED = json.loads((Path(__file__).parent / "demo_answers.json").read_text())
ANSWERS = RECORDED if isinstance(RECORDED, list) else RECORDED["answers"]


@pytest.mark.parametrize("ops", ["paddle", "torch"])
def test_answers(ops: str) -> None:
    assert len(ANSWERS) >= 20
    tokenizer = Tokenizer.from_directory(DEMO_MODEL)
    engine = TinyEngine(DEMO_MODEL, ops, num_blocks=400)
    for recorded in ANSWERS:
        prompt = tokenizer.encode_chat(recorded["messages"])
        assert prompt == recorded["prompt_token_ids"]
        expected = recorded.get("token_ids") or recorded["answer_token_ids"]
        request = engine.request(prompt, len(expected))
        assert engine.generate([request]) == [expected]
        engine.blocks.release(request.local.block_table)
        text = tokenizer.decode(expected)
        assert text.strip() == recorded["answer"].strip()
