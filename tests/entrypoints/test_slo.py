"""What a request expects reaches the engine, from the body or the head; what is out of range is named."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from fastdeploy_pd.entrypoints.openai.protocol import SloHeaders
from fastdeploy_pd.request import Request, Slo
from tests.entrypoints.stub_engine import EOS, MODEL, StubEngine, scripted, serving


@pytest.fixture(scope="module")
def engine() -> StubEngine:
    """Ends at once."""
    return StubEngine(scripted([EOS]))


@pytest.fixture(scope="module")
def url(engine: StubEngine) -> Iterator[str]:
    """A server over it."""
    with serving(engine) as url:
        yield url


def post(url: str, headers: Any = None, path: str = "completions", **fields: Any) -> httpx.Response:
    prompt = {"prompt": "x"} if path == "completions" else {"messages": [{"role": "user", "content": "x"}]}
    return httpx.post(f"{url}/v1/{path}", json={"model": MODEL, **prompt, **fields}, headers=headers)


def asked(engine: StubEngine) -> tuple[Slo, int]:
    """Of the newest request, after a way over the wire."""
    request = Request.from_wire(engine.requests[-1].to_wire())
    return request.slo, request.priority


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_body_and_head(engine: StubEngine, url: str, path: str) -> None:
    head = {"x-slo-ttft-ms": "300", "x-slo-tpot-ms": "20.5", "x-deadline-s": "7", "x-priority": "-3"}
    for headers, fields, expected in (
        ({}, {}, (Slo(), 0)),
        ({}, {"ttft_ms": 250, "tpot_ms": 10, "deadline": 2.5, "priority": 4}, (Slo(0.25, 0.01, 2.5), 4)),
        (head, {}, (Slo(0.3, 0.0205, 7.0), -3)),
        (head, {"ttft_ms": 1, "priority": 0, "deadline": None}, (Slo(0.001, 0.0205, 7.0), 0)),
    ):
        answer = post(url, headers, path, **fields)
        assert answer.status_code == 200, answer.text
        assert asked(engine) == expected


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_the_user_is_the_tenant(engine: StubEngine, url: str, path: str) -> None:
    for fields, tenant in (({}, ""), ({"user": "red"}, "red")):
        assert post(url, None, path, **fields).status_code == 200
        assert Request.from_wire(engine.requests[-1].to_wire()).tenant == tenant


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("ttft_ms", 0, "greater than or equal to 0.001, but got 0"),
        ("ttft_ms", -1.5, "greater than or equal to 0.001, but got -1.5"),
        ("tpot_ms", 1e9, "less than 1000000000, but got 1000000000.0"),
        ("deadline", 1e6, "less than 1000000, but got 1000000.0"),
        ("deadline", "soon", "valid number, but got 'soon'"),
        ("priority", 2**31, "less than 2147483648, but got 2147483648"),
    ],
)
def test_a_wrong_field_is_named(url: str, field: str, value: Any, allowed: str) -> None:
    answer = post(url, **{field: value})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, field)
    assert f"Invalid '{field}'" in error["message"] and allowed in error["message"]


@pytest.mark.parametrize(
    ("header", "field", "value", "code"),
    [
        ("x-deadline-s", "deadline", 0, "decimal_below_min_value"),
        ("x-slo-ttft-ms", "ttft_ms", 10**9, "decimal_above_max_value"),
        ("x-priority", "priority", 2**31, "integer_above_max_value"),
    ],
)
def test_body_and_head_have_the_same_code(url: str, header: str, field: str, value: int, code: str) -> None:
    for answer in (post(url, {header: f"{value}"}), post(url, **{field: value})):
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)


@pytest.mark.parametrize("header", ["x-slo-ttft", "X-SLO-TPOT-S", "x-deadline", "x-deadline-ms"])
def test_a_header_that_is_none_of_ours_is_not_dropped(url: str, header: str) -> None:
    answer = post(url, {header: "5"})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "unknown_parameter", header.lower())
    assert "x-slo-ttft-ms, x-slo-tpot-ms, x-deadline-s" in error["message"]


@pytest.mark.parametrize(
    ("header", "values", "allowed"),
    [
        ("x-slo-ttft-ms", ["0"], "greater than or equal to 0.001, but got '0'"),
        ("x-slo-tpot-ms", ["nan"], "but got 'nan'"),
        ("x-deadline-s", ["inf"], "less than 1000000, but got 'inf'"),
        ("x-deadline-s", [""], "valid number"),
        ("x-deadline-s", ["1", "2"], "valid number, unable to parse string as a number, but got '1, 2'"),
        ("x-priority", ["high"], "valid integer"),
    ],
)
def test_a_wrong_header_is_named_even_if_the_body_wins(url: str, header: str, values: list[str], allowed: str) -> None:
    answer = post(url, [(header, v) for v in values], ttft_ms=1, tpot_ms=1, deadline=1, priority=1)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, header)
    assert f"Invalid '{header}'" in error["message"] and allowed in error["message"]


def test_the_schema_has_them(url: str) -> None:
    chat = httpx.get(f"{url}/openapi.json").json()["paths"]["/v1/chat/completions"]["post"]
    assert {p["name"] for p in chat["parameters"]} == {f.alias for f in SloHeaders.model_fields.values()}
    properties = chat["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert set(SloHeaders.model_fields) <= set(properties)
