"""Bytes to a validated body: JSON as the standard has it and nothing more, and pydantic's complaints in OpenAI's words."""

from __future__ import annotations

import json
import math
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from fastdeploy_pd.entrypoints.openai.limits import MAX_JSON_DEPTH, MAX_JSON_KEYS
from fastdeploy_pd.errors import InvalidRequest

Body = TypeVar("Body", bound=BaseModel)

#: Fields of OpenAI's that are refused rather than ignored.
UNSUPPORTED = frozenset(
    {
        "tools",
        "tool_calls",
        "tool_choice",
        "parallel_tool_calls",
        "response_format",
        "suffix",
        "functions",
        "function_call",
        "audio",
        "modalities",
        "prediction",
        "web_search_options",
    }
)
BLAMED_WHOLE = frozenset({"prompt", "stop", "logit_bias"})  #: which element is wrong is in the message alone
UNION_FIELDS = frozenset({"prompt", "stop", "content"})
UNION_TAGS = frozenset({"one", "many", "tokens", "lists"})  #: names of branches, which are no part of a path
FOREIGN_PARTS = ("image_url", "input_audio", "file", "refusal")
CODES = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    "greater_than_equal": "below_min_value",
    "greater_than": "below_min_value",
    "less_than_equal": "above_max_value",
    "less_than": "above_max_value",
    "too_long": "array_above_max_length",
    "too_short": "empty_array",
    "string_too_long": "string_above_max_length",
    "string_too_short": "empty_string",
    "literal_error": "invalid_value",
}
SHOWN_CHARACTERS = 80  # of a wrong value


def parse_body(kind: type[Body], raw: bytes) -> Body:
    """Returns: a validated body. Raises: InvalidRequest."""
    value = parse_json(raw)
    if not isinstance(value, dict):
        raise InvalidRequest(f"The body must be a JSON object, but is {_shown(value)}.")
    return validate(kind, value)


def validate(kind: type[Body], value: dict[str, Any]) -> Body:
    """Returns: the value as a model. Raises: InvalidRequest: names the field, its value and what is allowed."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise _translate(error) from error


def parse_json(raw: bytes) -> Any:
    """Returns: the body's value. Raises: InvalidRequest: not JSON as the standard has it, a key twice, too deep or too wide."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items):
            raise ValueError("a key appears twice in one object")
        if len(found) > MAX_JSON_KEYS:
            raise ValueError(f"an object has more than {MAX_JSON_KEYS} keys")
        return found

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is not a JSON number")

    def number(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise ValueError(f"{text[:SHOWN_CHARACTERS]} is out of range")
        return value

    try:
        value = json.loads(raw.decode(), object_pairs_hook=pairs, parse_constant=constant, parse_float=number)
        _check(value, 0)
    except RecursionError as error:
        raise InvalidRequest(
            f"We could not parse the JSON body of your request: it is nested more than {MAX_JSON_DEPTH} deep."
        ) from error
    except ValueError as error:
        raise InvalidRequest(f"We could not parse the JSON body of your request: {error}") from error
    return value


def _check(value: Any, depth: int) -> None:
    """Raises: RecursionError: too deep. UnicodeEncodeError: a lone surrogate, which is no text."""
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, dict):
        if depth >= MAX_JSON_DEPTH:
            raise RecursionError
        for key, item in value.items():
            key.encode()
            _check(item, depth + 1)
    elif isinstance(value, list):
        if depth >= MAX_JSON_DEPTH:
            raise RecursionError
        for item in value:
            if type(item) is not int:
                _check(item, depth + 1)


def _translate(error: ValidationError) -> InvalidRequest:
    """The first problem, as OpenAI would say it."""
    problem = error.errors(include_url=False)[0]
    location, kind = problem["loc"], problem["type"]
    path = _path(location)
    if kind == "stream_options":
        return InvalidRequest(problem["msg"], param="stream_options")
    if kind in ("missing", "content_missing"):
        path += ".content" if kind == "content_missing" else ""
        return InvalidRequest(f"Missing required parameter: '{path}'.", param=path, code="missing_required_parameter")
    place = next((n for n, part in enumerate(location) if part in UNSUPPORTED), None)
    if place is not None and not (path == "response_format" and not isinstance(problem["input"], dict)):
        return _unsupported(str(location[place]), _path(location[: place + 1]))
    if kind == "extra_forbidden":
        return InvalidRequest(f"Unknown parameter: '{path}'.", param=path, code="unknown_parameter")
    limits = problem.get("ctx", {}).values()
    is_decimal = any(isinstance(number, float) for number in (problem["input"], *limits))  # a header's value is a text
    return _wrong_value(path, kind, problem["msg"], problem["input"], is_decimal)


def _unsupported(name: str, path: str) -> InvalidRequest:
    if name == "tool_choice":
        return InvalidRequest("'tool_choice' is only allowed when 'tools' are specified.", param=path)
    return InvalidRequest(f"'{name}' is not supported yet; leave it out.", param=path, code="unsupported_parameter")


def _wrong_value(path: str, kind: str, message: str, value: Any, is_decimal: bool) -> InvalidRequest:
    code = CODES.get(kind, "invalid_type")
    if code in ("below_min_value", "above_max_value"):
        code = ("decimal_" if is_decimal else "integer_") + code
    if path.endswith("].type") and value in FOREIGN_PARTS:
        path = path.removesuffix(".type")
        return InvalidRequest(
            f"Invalid '{path}': this model understands content of type 'text' alone, but got '{value}'.",
            param=path,
            code="unsupported_parameter",
        )
    top = path.split("[")[0].split(".")[0]
    return InvalidRequest(
        f"Invalid '{path}': {message}, but got {_shown(value)}.", param=top if top in BLAMED_WHOLE else path, code=code
    )


def _path(location: tuple[int | str, ...]) -> str:
    path = ""
    before: int | str = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not (part in UNION_TAGS and before in UNION_FIELDS):
            path += f".{part}" if path else part
        before = part
    return path


def _shown(value: Any) -> str:
    # Cut before it is spelled out: a value may be megabytes long.
    if isinstance(value, str):
        return repr(value[:SHOWN_CHARACTERS]) + ("..." if len(value) > SHOWN_CHARACTERS else "")
    if isinstance(value, dict):
        return "an object"
    text = repr(value[:8] if isinstance(value, list) else value)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."
