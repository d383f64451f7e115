"""The catalogue of bad inputs against a real server: every case gets the answer it should, and the server lives on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest

from fastdeploy_pd.entrypoints.openai import app, http_protocol
from tests.entrypoints.bad_inputs import Target, complaints, load_cases, send
from tests.entrypoints.stub_engine import MODEL, StubEngine, default_options, demo_tokenizer, serving, story_tokens

KEY = "test-key-0123456789"
CASES = load_cases()


@pytest.fixture(scope="module")
def targets() -> Iterator[dict[bool, Target]]:
    """Servers with (True) and without an API key, with short time limits so that slow clients don't make slow tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "BODY_TIMEOUT_S", 1.0)
        patch.setattr(http_protocol, "HEADER_TIMEOUT_S", 1.0)
        tokens = story_tokens(demo_tokenizer())
        options = default_options(max_model_len=4096)
        closed = replace(options, api_keys=(KEY,))
        with serving(StubEngine(tokens), options) as free_url, serving(StubEngine(tokens), closed) as closed_url:
            yield {
                needs_key: Target(int(url.rsplit(":", 1)[1]), MODEL, KEY, options.vocab_size, options.max_model_len)
                for needs_key, url in ((False, free_url), (True, closed_url))
            }


@pytest.mark.parametrize("case", CASES, ids=[c["name"] for c in CASES])
def test_case(case: dict[str, Any], targets: dict[bool, Target]) -> None:
    target = targets[case.get("needs") == "auth"]
    answer = send(case, target, case.get("max_seconds") or 10)
    assert complaints(case, answer) == []
    alive = httpx.get(f"http://127.0.0.1:{target.port}/v1/models", headers={"authorization": f"Bearer {KEY}"})
    assert alive.status_code == 200


def test_catalogue_is_whole() -> None:
    assert len({c["name"] for c in CASES}) == len(CASES) >= 200
