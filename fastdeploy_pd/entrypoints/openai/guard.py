"""What every HTTP request passes before anybody looks into it: sizes, API key, and errors in OpenAI's shape whatever the path."""

from __future__ import annotations

import hashlib
import hmac
import logging

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastdeploy_pd.config import is_loopback
from fastdeploy_pd.entrypoints.openai.limits import MAX_BODY_BYTES, MAX_HEADER_BYTES, MAX_HEADERS, MAX_URL_BYTES
from fastdeploy_pd.entrypoints.openai.stream import DIRECT_SEND, error_body, error_headers
from fastdeploy_pd.errors import AuthenticationFailed, FastDeployPDError, InvalidRequest

log = logging.getLogger("fastdeploy_pd.api")

#: What answers without a key: probes alone. /metrics needs one too (a scraper without it uses --metrics-port, on a network of its own).
OPEN_PATHS = frozenset({"/health", "/healthcheck", "/live"})
ADMIN_PREFIX = "/v1/admin/"


def refusal(status: int, message: str, code: str | None = None) -> InvalidRequest:
    """Returns: an error with another status than 400."""
    error = InvalidRequest(message, code=code)
    error.status = status
    return error


async def send_error(send: Send, error: FastDeployPDError) -> None:
    """Answer with an error."""
    body = error_body(error)
    headers = [*error_headers(error), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Guard:
    """ASGI middleware; only requests within the limits and with a valid key go on."""

    def __init__(self, app: ASGIApp, api_keys: tuple[str, ...]) -> None:
        self._app = app
        # Digests are compared, so that neither time nor length tells anything of the keys.
        self._digests = [hashlib.sha256(k.encode()).digest() for k in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check, then pass on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        error = self._check(scope)
        if error is not None:
            await send_error(send, error)
            return
        await self._answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The last resort of an API process: a defect of ours must not take the other requests with it."""
        has_begun = False
        scope[DIRECT_SEND] = send

        async def noting(message: Message) -> None:
            nonlocal has_begun
            has_begun = has_begun or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except Exception:
            log.exception("a request to %s failed", scope["path"])
            if has_begun:
                raise
            await send_error(
                send, FastDeployPDError("an internal error; the server's log says more", code="internal_error")
            )

    def _check(self, scope: Scope) -> FastDeployPDError | None:
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        if scope["http_version"] not in ("1.0", "1.1"):
            return refusal(505, f"HTTP/{scope['http_version']} is not spoken here; use HTTP/1.1")
        num_hosts = sum(name == b"host" for name, _ in headers)
        if num_hosts != 1 and not (num_hosts == 0 and scope["http_version"] == "1.0"):
            return refusal(400, f"there are {num_hosts} Host headers; there must be one")
        if len(scope.get("raw_path") or b"") + len(scope.get("query_string", b"")) > MAX_URL_BYTES:
            return refusal(414, f"the URL is longer than {MAX_URL_BYTES} bytes")
        if len(headers) > MAX_HEADERS or sum(len(k) + len(v) for k, v in headers) > MAX_HEADER_BYTES:
            return refusal(431, f"there are more than {MAX_HEADERS} headers or {MAX_HEADER_BYTES} bytes of them")
        raw_path = (scope.get("raw_path") or b"").lower()
        if b"%2f" in raw_path and not raw_path.startswith(b"/v1/models/"):
            return refusal(404, "there is no such path here")  # proxies and we may differ about what it means
        error = self._authenticate(scope["path"], headers) or self._check_admin(scope, dict(headers))
        return error or self._check_body(scope, dict(headers))

    def _check_admin(self, scope: Scope, headers: dict[bytes, bytes]) -> FastDeployPDError | None:
        """Without a key to ask for, only programs on this machine may change what an instance does; no page in a browser may."""
        if self._digests or not scope["path"].startswith(ADMIN_PREFIX):
            return None
        host, own = ((scope.get(end) or ("",))[0] for end in ("client", "server"))
        # A connection between one address and itself is this machine's, too: its own go over loopback, whatever --host is.
        if (is_loopback(host) or (host and host == own)) and b"origin" not in headers:
            return None
        caller = f"from {host}" if b"origin" not in headers else "from a web page"
        return refusal(
            403,
            f"{ADMIN_PREFIX} answers programs on this machine alone, not one {caller}; to use it from elsewhere, start "
            "the instances with --api-key KEY, and give the key to `fastdeploy-pd role` or `drain` too (--api-key KEY, or FD_API_KEY)",
            "forbidden",
        )

    def _check_body(self, scope: Scope, headers: dict[bytes, bytes]) -> FastDeployPDError | None:
        if scope["method"] != "POST":
            return None
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > MAX_BODY_BYTES:
            return refusal(413, f"the body is larger than {MAX_BODY_BYTES} bytes", "request_too_large")
        if headers.get(b"content-encoding", b"identity") != b"identity":
            return refusal(415, "content-encoding is not supported; send the body as it is")
        media = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if media not in (b"application/json", b""):
            return refusal(415, f"content-type is {media.decode('latin-1')!r}; it must be application/json")
        return None

    def _authenticate(self, path: str, headers: list[tuple[bytes, bytes]]) -> FastDeployPDError | None:
        if not self._digests or path in OPEN_PATHS:
            return None
        given = [v for k, v in headers if k == b"authorization"]
        scheme, _, key = (given[0] if len(given) == 1 else b"").partition(b" ")
        if scheme.lower() != b"bearer" or not key.strip():
            return AuthenticationFailed("You didn't provide an API key. Send it as: Authorization: Bearer KEY")
        digest = hashlib.sha256(key.strip()).digest()
        matches = [hmac.compare_digest(digest, d) for d in self._digests]
        return None if any(matches) else AuthenticationFailed("Incorrect API key provided.", code="invalid_api_key")
