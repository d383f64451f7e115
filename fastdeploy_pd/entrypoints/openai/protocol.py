"""Request bodies of the OpenAI API and our extensions, validated strictly: a wrong type is an error, an unknown field too.

Errors name the field, the value and what is allowed, in OpenAI's shape.
"""

from __future__ import annotations

import json
import math
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from fastdeploy_pd.errors import InvalidRequest

MAX_DEPTH = 64
MAX_CHOICES = 8
MAX_PROMPTS = 64
MAX_STOP_BYTES = 4096

StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_BYTES)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class StreamOptions(BaseModel):
    """What a stream carries besides tokens."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool | None = None
    continuous_usage_stats: Literal[False] | None = None


class GenerationBody(BaseModel):
    """Fields that both endpoints share. After `# extensions`: ours, with vLLM's names."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: Annotated[str, Field(min_length=1, max_length=512)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] | None = None
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    # extensions
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    return_token_ids: bool | None = None
    return_timings: bool | None = None

    @field_validator(
        "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", mode="before"
    )
    @classmethod
    def _whole_numbers_are_numbers(cls, value: Any) -> Any:
        return float(value) if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53 else value

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _biases_are_numbers(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {k: float(v) if isinstance(v, int) and not isinstance(v, bool) else v for k, v in value.items()}
        return value


class TextPart(BaseModel):
    """A piece of a message's content; text alone is understood here."""

    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(min_length=1)] | None
    name: Annotated[str, Field(max_length=64)] | None = None
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None
    refusal: str | None = None

    def to_template(self) -> dict[str, Any]:
        """Returns: what chat templates expect; `developer` is what older templates call `system`."""
        content = self.content if isinstance(self.content, str) else "".join(p.text for p in self.content or ())
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": content}
        return message | ({"name": self.name} if self.name else {})


class TextFormat(BaseModel):
    """The one response format there is."""

    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: TextFormat | None = None
    tools: None = None
    tool_choice: None = None
    parallel_tool_calls: bool | None = None
    store: Literal[False] | None = None
    metadata: dict[str, str] | None = None
    add_generation_prompt: bool | None = None


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    best_of: Annotated[int, Field(ge=1, le=20)] | None = None
    suffix: None = None


Body = TypeVar("Body", bound=BaseModel)

_UNSUPPORTED = {
    "tools",
    "tool_choice",
    "response_format",
    "suffix",
    "functions",
    "function_call",
    "audio",
    "modalities",
    "prediction",
    "web_search_options",
}


def parse_json(raw: bytes) -> Any:
    """Returns: the body's value. Raises: InvalidRequest: not JSON as the standard has it, a key twice, or too deep."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items):
            raise ValueError("a key appears twice in one object")
        return found

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is not a JSON number")

    def number(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise ValueError(f"{text} is out of range")
        return value

    try:
        text = raw.decode("utf-8")
        value = json.loads(text, object_pairs_hook=pairs, parse_constant=constant, parse_float=number)
        _check_depth(value, 0)
        return value
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise InvalidRequest(f"We could not parse the JSON body of your request: {reason}") from error


def _check_depth(value: Any, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise RecursionError
    if isinstance(value, str):
        value.encode("utf-8")  # a lone surrogate is no text
    elif isinstance(value, dict):
        for key, item in value.items():
            key.encode("utf-8")
            _check_depth(item, depth + 1)
    elif isinstance(value, list):
        if value and type(value[0]) is int and len(value) > 64:
            return
        for item in value:
            _check_depth(item, depth + 1)


def parse_body(kind: type[Body], raw: bytes) -> Body:
    """Returns: a validated body. Raises: InvalidRequest."""
    value = parse_json(raw)
    if not isinstance(value, dict):
        raise InvalidRequest("the body must be a JSON object")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise _translate(error) from error


_CODES = {
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


def _translate(error: ValidationError) -> InvalidRequest:
    """The first problem, as OpenAI would say it. Of a union's problems the deepest is the likeliest to be meant."""
    problems = error.errors(include_url=False, include_context=False)
    first = problems[0]
    same_field = [p for p in problems if p["loc"][:1] == first["loc"][:1]]
    problem = max(same_field, key=lambda p: sum(isinstance(x, int) for x in p["loc"]))
    path = ""
    for part in problem["loc"]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and part not in ("str", "int", "float", "bool", "list", "TextPart"):
            path += f".{part}" if path else part
    field = path.split(".")[0].split("[")[0]
    kind = problem["type"]
    if kind == "missing":
        return InvalidRequest(f"Missing required parameter: '{path}'.", param=path, code="missing_required_parameter")
    if field in _UNSUPPORTED:
        return InvalidRequest(
            f"'{field}' is not supported yet; leave it out.", param=field, code="unsupported_parameter"
        )
    if kind == "extra_forbidden":
        return InvalidRequest(f"Unknown parameter: '{path}'.", param=path, code="unknown_parameter")
    shown = repr(problem["input"])
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    code = _CODES.get(kind, "invalid_type")
    if code in ("below_min_value", "above_max_value"):
        code = ("decimal_" if isinstance(problem["input"], float) else "integer_") + code
    return InvalidRequest(f"Invalid '{path}': {problem['msg']}, but got {shown}.", param=path, code=code)
