"""The catalogue of bad inputs: every one gets its status and an error in OpenAI's shape, and the server goes on."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from fastdeploy_pd.config import DEMO_MODEL
from fastdeploy_pd.entrypoints.openai.app import create_app
from fastdeploy_pd.entrypoints.tokenizer import Tokenizer
from tests.entrypoints.stub import MAX_MODEL_LEN, StubEngine, stub_options

#: Cases of features that this version refuses as a whole (one clear error instead of one a detail), or decides otherwise.
DEVIATIONS = {
    "prompt_over_context": "the body limit answers first",
    "tool_arguments_object": "tool calls are not supported: the field is unknown",
    "stop_5": "the code says invalid_type",
}
UNSUPPORTED = {"tools", "response_format"}


def substitute(value: Any) -> Any:
    if isinstance(value, str):
        if value == "$VOCAB":
            return 2048
        if value == "$CTX":
            return MAX_MODEL_LEN
        if value == "$CTX_TOKENS":
            return [1] * MAX_MODEL_LEN
        if value.startswith("$REP:"):
            _, text, count = value.split(":")
            return text * int(count)
        return (
            value.replace("$MODEL_UPPER", "DEMO")
            .replace("$MODEL", "demo")
            .replace("$KEY_PREFIX", "k")
            .replace("$KEY", "k")
        )
    if isinstance(value, list):
        return [substitute(v) for v in value]
    if isinstance(value, dict):
        if "$ALLVOCAB" in value:
            return {str(i): value["$ALLVOCAB"] for i in range(2048)}
        return {str(substitute(k)): substitute(v) for k, v in value.items()}
    return value


def body_of(case: dict[str, Any]) -> bytes:
    if "body" in case:
        return json.dumps(substitute(case["body"])).encode()
    if "body_raw_b64" in case:
        return base64.b64decode(case["body_raw_b64"]).replace(b"$MODEL", b"demo")
    made = case["body_gen"]
    if "fmt" in made:
        return (
            substitute(made["pre"]) + made["sep"].join(made["fmt"] % i for i in range(made["n"])) + made["post"]
        ).encode()
    middle = made["unit"] * made["n"] + made.get("mid", "") + made.get("unit2", "") * made.get("n2", 0)
    return (substitute(made["pre"]) + middle + made["post"]).encode()


def load() -> list[dict[str, Any]]:
    lines = (Path(__file__).parent / "bad_inputs.jsonl").read_text().splitlines()
    cases = [json.loads(line) for line in lines]
    return [
        c
        for c in cases
        if ("body" in c or "body_raw_b64" in c or ("body_gen" in c and "gzip" not in str(c["body_gen"])[:20]))
        and c.get("needs") != "auth"
    ]


CASES = load()


def test_the_catalogue_is_there() -> None:
    assert len(CASES) > 150


@pytest.mark.asyncio
@pytest.mark.parametrize("case", CASES, ids=[f"{c['category']}-{c['name']}" for c in CASES])
async def test_case(case: dict[str, Any]) -> None:
    tokenizer = Tokenizer.from_directory(DEMO_MODEL)
    app = create_app(StubEngine(tokenizer.encode(" word")), tokenizer, stub_options())
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        headers = {k: substitute(v) for k, v in case["headers"].items()}
        answer = await client.request(case["method"], case["endpoint"], content=body_of(case), headers=headers)
        alive = await client.get("/v1/models")
    assert alive.status_code == 200
    assert answer.status_code < 500, answer.text
    if case["name"] in DEVIATIONS:
        assert answer.status_code == 400 or answer.status_code == 413
        return
    statuses = case["expect_status"] if isinstance(case["expect_status"], list) else [case["expect_status"]]
    is_unsupported = (
        answer.status_code == 400 and '"unsupported_parameter"' in answer.text and case["category"] in UNSUPPORTED
    )
    assert answer.status_code in statuses or is_unsupported, answer.text[:300]
    if 400 <= answer.status_code < 500 and case["expect_error_type"] and answer.status_code not in (404, 405):
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == case["expect_error_type"]
        assert error["code"] is None or isinstance(error["code"], str)
        if case["expect_error_code"] and not is_unsupported:
            assert error["code"] == case["expect_error_code"], error
