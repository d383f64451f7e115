"""Request bodies of the OpenAI API and our extensions, validated strictly: a wrong type is an error, an unknown field too.

Errors name the field, the value and what is allowed, in OpenAI's shape (see `validation`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator
from pydantic_core import PydanticCustomError

from fastdeploy_pd.entrypoints.openai import limits
from fastdeploy_pd.entrypoints.openai.validation import parse_body
from fastdeploy_pd.request import MAX_SLO_S

StopString = Annotated[str, Field(min_length=1, max_length=limits.MAX_STOP_CHARACTERS)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Int32 = Annotated[int, Field(ge=-(2**31), lt=2**31)]
Milliseconds = Annotated[float, Field(ge=0.001, lt=1e3 * MAX_SLO_S)]
Seconds = Annotated[float, Field(ge=0.001, lt=MAX_SLO_S)]


def _shape(value: Any) -> str | None:
    """Which branch of a union a value is meant for, so that errors speak of that one alone."""
    if isinstance(value, str):
        return "one"
    if not isinstance(value, list):
        return None
    first = value[0] if value else ""
    return "many" if isinstance(first, str) else "lists" if isinstance(first, list) else "tokens"


def _stop_shape(value: Any) -> str | None:
    return "one" if isinstance(value, str) else "many" if isinstance(value, list) else None


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
    n: Annotated[int, Field(ge=1, le=limits.MAX_CHOICES)] | None = None
    stop: (
        Annotated[
            Annotated[StopString, Tag("one")]
            | Annotated[list[StopString], Field(max_length=limits.MAX_STOPS), Tag("many")],
            Discriminator(
                _stop_shape,
                custom_error_type="stop_type",
                custom_error_message="Input should be a string or a list of strings",
            ),
        ]
        | None
    ) = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: (
        Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=limits.MAX_LOGIT_BIASES)] | None
    ) = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    # extensions
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=limits.MAX_STOP_TOKENS)] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    priority: Int32 | None = None
    ttft_ms: Milliseconds | None = None
    tpot_ms: Milliseconds | None = None
    deadline: Seconds | None = None
    return_token_ids: bool | None = None
    return_timings: bool | None = None

    @field_validator(
        "temperature",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "ttft_ms",
        "tpot_ms",
        "deadline",
        mode="before",
    )
    @classmethod
    def _whole_numbers_are_numbers(cls, value: Any) -> Any:
        return float(value) if type(value) is int and abs(value) < 2**53 else value

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _biases_are_numbers(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {k: float(v) if type(v) is int and abs(v) < 2**53 else v for k, v in value.items()}
        return value

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError(
                "stream_options", "The 'stream_options' parameter is only allowed when 'stream' is enabled."
            )
        return self


class SloHeaders(BaseModel):
    """What a request may say in its HTTP head instead of its body, by the body's names."""

    priority: Int32 | None = Field(None, alias="x-priority")
    ttft_ms: Milliseconds | None = Field(None, alias="x-slo-ttft-ms")
    tpot_ms: Milliseconds | None = Field(None, alias="x-slo-tpot-ms")
    deadline: Seconds | None = Field(None, alias="x-deadline-s")

    def complete(self, body: GenerationBody) -> None:
        """Fill in what the body leaves open."""
        for name in SloHeaders.model_fields:
            if getattr(body, name) is None:
                setattr(body, name, getattr(self, name))


class TextPart(BaseModel):
    """A piece of a message's content; text alone is understood here."""

    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: (
        Annotated[
            Annotated[str, Tag("one")] | Annotated[list[TextPart], Field(min_length=1), Tag("many")],
            Discriminator(
                _stop_shape, custom_error_type="content_type", custom_error_message="Input should be a string or a list"
            ),
        ]
        | None
    ) = None
    name: Annotated[str, Field(max_length=64)] | None = None
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None
    refusal: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError("content_missing", "a message of this role needs 'content'")
        return self

    def to_template(self) -> dict[str, Any]:
        """Returns: what chat templates expect: role, content as one text, and the name if there is one."""
        content = self.content if isinstance(self.content, str) else "".join(p.text for p in self.content or ())
        return {"role": self.role, "content": content} | ({"name": self.name} if self.name else {})


class TextFormat(BaseModel):
    """The one response format there is."""

    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=limits.MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=limits.MAX_TOP_LOGPROBS)] | None = None
    response_format: TextFormat | None = None
    tools: None = None
    tool_choice: Literal["none"] | None = None
    parallel_tool_calls: None = None
    store: Literal[False] | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    # extensions
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: Annotated[
        Annotated[str, Tag("one")]
        | Annotated[list[str], Field(min_length=1, max_length=limits.MAX_PROMPTS), Tag("many")]
        | Annotated[TokenIds, Tag("tokens")]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=limits.MAX_PROMPTS), Tag("lists")],
        Discriminator(
            _shape,
            custom_error_type="prompt_type",
            custom_error_message="Input should be a string, a list of strings, a list of token ids or a list of such lists",
        ),
    ]
    #: 0 scores the prompt alone (with echo and logprobs)
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=limits.MAX_COMPLETION_LOGPROBS)] | None = None
    best_of: Annotated[int, Field(ge=1, le=20)] | None = None
    suffix: None = None


__all__ = [
    "ChatBody",
    "ChatMessage",
    "CompletionBody",
    "GenerationBody",
    "SloHeaders",
    "StreamOptions",
    "TextPart",
    "parse_body",
]
