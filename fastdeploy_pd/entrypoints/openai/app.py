"""The HTTP application: OpenAI's endpoints, health and metrics, over an `EngineClient`."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from fastdeploy_pd import __version__
from fastdeploy_pd.clock import WallClock
from fastdeploy_pd.engine.admin import InstanceAdmin
from fastdeploy_pd.engine.client_api import EngineClient
from fastdeploy_pd.entrypoints.openai.admin import add_admin
from fastdeploy_pd.entrypoints.openai.chat import stream_chat, whole_chat
from fastdeploy_pd.entrypoints.openai.completions import stream_completion, whole_completion
from fastdeploy_pd.entrypoints.openai.generation import EndObserver, Generation
from fastdeploy_pd.entrypoints.openai.guard import Guard, refusal
from fastdeploy_pd.entrypoints.openai.limits import BODY_TIMEOUT_S, MAX_BODY_BYTES
from fastdeploy_pd.entrypoints.openai.protocol import ChatBody, CompletionBody, SloHeaders
from fastdeploy_pd.entrypoints.openai.stream import (
    EventStream,
    error_body,
    error_headers,
    read_body,
    unless_client_leaves,
)
from fastdeploy_pd.entrypoints.openai.validation import parse_body, validate
from fastdeploy_pd.entrypoints.serving import Choice, Serving, ServingOptions, new_id
from fastdeploy_pd.entrypoints.tokenizer import AnyTokenizer
from fastdeploy_pd.errors import FastDeployPDError, InvalidRequest

SAFE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
LARGE_BODY_BYTES = 64 * 2**10
SLO_HEADERS = SloHeaders.model_json_schema()["properties"]
SLO_PREFIXES = ("x-slo-", "x-deadline")  # a typing error in one of them is said, as one in the body is
ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
ERROR_STATUSES = (400, 401, 403, 404, 405, 408, 409, 413, 414, 415, 429, 431, 500, 503, 504)


class Api:
    """The endpoints' logic."""

    def __init__(self, client: EngineClient, serving: Serving, observer: EndObserver | None) -> None:
        self.client, self.serving, self.observer = client, serving, observer
        self.clock = WallClock()

    async def generate(self, kind: type[ChatBody] | type[CompletionBody], request: Request) -> Any:
        """Answer one of the two generating endpoints."""
        _refuse_unknown_slo_headers(request)
        names = [name for name in SLO_HEADERS if name in request.headers]
        # One that is given twice becomes a list, which is no number: neither is silently dropped.
        slo = validate(SloHeaders, {name: ", ".join(request.headers.getlist(name)) for name in names})
        raw = await read_body(request.receive, MAX_BODY_BYTES, BODY_TIMEOUT_S)
        answer_id = new_id("chatcmpl" if kind is ChatBody else "cmpl")
        if len(raw) > LARGE_BODY_BYTES:  # other streams go on while this one is tokenised
            body, choices = await asyncio.to_thread(self._prepare, kind, raw, slo, answer_id)
        else:
            body, choices = self._prepare(kind, raw, slo, answer_id)
        generation = Generation(self.client, self.serving, choices, self.clock, self.observer)
        created = int(self.clock.unix_s())
        headers = [(b"x-fastdeploy-pd-request-id", answer_id.encode())]
        given = request.headers.get("x-request-id", "")
        if SAFE_ID.fullmatch(given):
            headers.append((b"x-request-id", given.encode()))
        if body.stream:
            events = (
                stream_chat(body, generation, answer_id, created)
                if isinstance(body, ChatBody)
                else stream_completion(body, generation, answer_id, created)
            )
            return EventStream(events, headers)
        work = (
            whole_chat(body, generation, answer_id, created)
            if isinstance(body, ChatBody)
            else whole_completion(body, generation, answer_id, created)
        )
        data = await unless_client_leaves(work, request.receive)
        return Response(
            data or b"", media_type="application/json", headers={k.decode(): v.decode() for k, v in headers}
        )

    def _prepare(
        self, kind: type[ChatBody] | type[CompletionBody], raw: bytes, slo: SloHeaders, answer_id: str
    ) -> tuple[ChatBody | CompletionBody, list[Choice]]:
        body = parse_body(kind, raw)
        slo.complete(body)
        if not self.serving.has_text and body.return_token_ids is None:
            body.return_token_ids = True  # without a tokenizer they are all there is to answer
        return body, self.serving.choices(body, answer_id)


def _refuse_unknown_slo_headers(request: Request) -> None:
    """Raises: InvalidRequest: a header looks like one that states an objective, and is none."""
    for name in request.headers:
        if name.startswith(SLO_PREFIXES) and name not in SLO_HEADERS:
            known = f"Unknown header '{name[:80]}'; objectives are stated by {', '.join(SLO_HEADERS)}."
            raise InvalidRequest(known, param=name[:80], code="unknown_parameter")


def create_app(
    client: EngineClient,
    tokenizer: AnyTokenizer,
    options: ServingOptions,
    metrics: Callable[[], tuple[bytes, str]] | None = None,
    observer: EndObserver | None = None,
    admin: InstanceAdmin | None = None,
) -> ASGIApp:
    """Returns: the ASGI application of one API process.

    Args:
        metrics: makes the body and content type of /metrics.
        observer: told of every request's end.
        admin: changes the instance; None: there are no admin endpoints.
    """
    app = FastAPI(title="fastdeploy-pd", version=__version__, docs_url=None, redoc_url=None)
    api = Api(client, Serving(tokenizer, options), observer)
    _add_generation(app, api)
    _add_models(app, options)
    _add_state(app, client, metrics)
    if admin is not None:
        add_admin(app, admin, _responses())
    _add_errors(app)
    return Guard(app, options.api_keys)


def _responses() -> dict[int | str, dict[str, Any]]:
    content = {"application/json": {"schema": ERROR_SCHEMA}}
    return {status: {"description": "an error in OpenAI's shape", "content": content} for status in ERROR_STATUSES}


def _body_schema(kind: type[ChatBody] | type[CompletionBody]) -> dict[str, Any]:
    # Definitions are written out in place: the document has no components of ours to refer to.
    schema = kind.model_json_schema()
    definitions = schema.pop("$defs", {})

    def resolve(value: Any) -> Any:
        if isinstance(value, dict):
            if "$ref" in value:
                return resolve(definitions[value["$ref"].split("/")[-1]])
            return {k: resolve(v) for k, v in value.items()}
        return [resolve(v) for v in value] if isinstance(value, list) else value

    headers = [{"name": name, "in": "header", "schema": field} for name, field in SLO_HEADERS.items()]
    content = {"application/json": {"schema": resolve(schema)}}
    return {"requestBody": {"required": True, "content": content}, "parameters": headers}


def _add_generation(app: FastAPI, api: Api) -> None:
    @app.post("/v1/chat/completions", responses=_responses(), openapi_extra=_body_schema(ChatBody), response_model=None)
    async def chat_completions(request: Request) -> Any:
        return await api.generate(ChatBody, request)

    @app.post(
        "/v1/completions", responses=_responses(), openapi_extra=_body_schema(CompletionBody), response_model=None
    )
    async def completions(request: Request) -> Any:
        return await api.generate(CompletionBody, request)


def _add_models(app: FastAPI, options: ServingOptions) -> None:
    def card(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": options.created_unix_s,
            "owned_by": "fastdeploy-pd",
            "max_model_len": options.max_model_len,
        }

    @app.get("/v1/models", responses=_responses())
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card(n) for n in options.model_names]}

    parameter = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}

    # Read from the request by hand: a declared parameter would put FastAPI's 422 into the schema, which is never answered.
    @app.get("/v1/models/{name:path}", responses=_responses(), openapi_extra={"parameters": [parameter]})
    async def model(request: Request) -> dict[str, Any]:
        name = request.path_params["name"]
        if name not in options.model_names:
            raise refusal(404, f"The model '{name[:80]}' does not exist", "model_not_found")
        return card(name)


def _add_state(app: FastAPI, client: EngineClient, metrics: Callable[[], tuple[bytes, str]] | None) -> None:
    @app.get("/health")
    @app.get("/healthcheck", include_in_schema=False)
    async def health() -> Response:
        report = await client.health()
        body = orjson.dumps({"status": "ok" if report.is_ready else "not ready", **report.detail})
        return Response(body, 200 if report.is_ready else 503, media_type="application/json")

    @app.get("/live")
    async def live() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @app.get("/metrics", response_class=Response)
    async def show_metrics() -> Response:
        if metrics is None:
            raise refusal(404, "metrics are not kept here")
        body, content_type = metrics()
        return Response(body, media_type=content_type)


def _add_errors(app: FastAPI) -> None:
    def shaped(error: FastDeployPDError) -> Response:
        headers = {k.decode(): v.decode() for k, v in error_headers(error) if k != b"content-type"}
        return Response(error_body(error), error.status, headers, "application/json")

    @app.exception_handler(FastDeployPDError)
    async def ours(_: Request, error: FastDeployPDError) -> Response:
        return shaped(error)

    @app.exception_handler(HTTPException)
    async def theirs(request: Request, error: HTTPException) -> Response:
        texts = {
            404: f"There is no {request.url.path[:200]} here",
            405: f"{request.method} is not allowed on {request.url.path[:200]}",
        }
        return shaped(refusal(error.status_code, texts.get(error.status_code, str(error.detail))))
