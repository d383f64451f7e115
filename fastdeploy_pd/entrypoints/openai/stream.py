"""Answers over HTTP: server-sent events and plain JSON, both of which end when the client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fastdeploy_pd.errors import DeadlineExceeded, FastDeployPDError, InvalidRequest

DONE = b"data: [DONE]\n\n"
#: Where a scope holds the server's own `send`: a stream uses it for all but its head, because every layer that wraps it costs each token.
DIRECT_SEND = "fastdeploy_pd.send"


def event(data: bytes) -> bytes:
    """Returns: one server-sent event."""
    return b"data: " + data + b"\n\n"


def text_json(text: str) -> bytes:
    """Returns: a JSON string without the characters at which some clients break lines (U+0085, U+2028, U+2029)."""
    data = orjson.dumps(text)
    if len(data) != len(text) + 2:  # not ASCII alone, or something was escaped
        for raw, escaped in ((b"\xc2\x85", b"\\u0085"), (b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029")):
            data = data.replace(raw, escaped)
    return data


def error_body(error: FastDeployPDError) -> bytes:
    """Returns: an error as OpenAI shapes it."""
    body = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
    return orjson.dumps({"error": body})


def error_headers(error: FastDeployPDError) -> list[tuple[bytes, bytes]]:
    """Returns: headers that tell OpenAI's clients whether to try again."""
    headers = [(b"content-type", b"application/json")]
    if error.retryable:
        wait_s = error.retry_after_s
        headers += [(b"retry-after", b"%d" % wait_s), (b"retry-after-ms", b"%d" % (1000 * wait_s))]
    elif error.code == "poison" or isinstance(error, DeadlineExceeded):
        headers.append((b"x-should-retry", b"false"))
    if error.status in (408, 413):
        headers.append((b"connection", b"close"))  # the rest of the body is not waited for
    return headers


async def client_left(receive: Receive) -> None:
    """Return when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A response of events (a Response, because FastAPI passes on nothing else as it is).

    The first event comes before the status line, so that an early failure is a plain HTTP error.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], headers: list[tuple[bytes, bytes]]) -> None:
        super().__init__()
        self._events, self._extra_headers = events, headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until they end or the client leaves; leaving closes the iterator, which aborts the request."""
        sending = asyncio.create_task(self._send(send, scope.get(DIRECT_SEND, send)))
        leaving = asyncio.create_task(client_left(receive))
        try:
            await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:  # also when the server itself is told to stop now
            sending.cancel()
            leaving.cancel()
            results = await asyncio.gather(sending, leaving, return_exceptions=True)
            await self._events.aclose()
        if isinstance(results[0], Exception) and not isinstance(results[0], OSError):
            raise results[0]

    async def _send(self, send: Send, send_body: Send) -> None:
        try:
            first = await anext(self._events, b"")
        except FastDeployPDError as error:
            await send({"type": "http.response.start", "status": error.status, "headers": error_headers(error)})
            await send({"type": "http.response.body", "body": error_body(error)})
            return
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            *self._extra_headers,
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send_body({"type": "http.response.body", "body": first, "more_body": True})
        try:
            async for data in self._events:
                await send_body({"type": "http.response.body", "body": data, "more_body": True})
        except FastDeployPDError as error:
            # No [DONE]: that is how OpenAI's clients see that the answer is not whole.
            await send_body({"type": "http.response.body", "body": event(error_body(error)), "more_body": True})
        await send_body({"type": "http.response.body", "body": b""})


async def unless_client_leaves(work: Awaitable[bytes], receive: Receive) -> bytes | None:
    """Returns: what the work yields, or None if the client left first (the work is cancelled then)."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.create_task(client_left(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        leaving.cancel()
        working.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def read_body(receive: Receive, limit_bytes: int, timeout_s: float) -> bytes:
    """Returns: the request's body. Raises: InvalidRequest: too large (413), too slow (408) or cut off."""
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise InvalidRequest("the connection ended before the body did")
                body += message.get("body", b"")
                if len(body) > limit_bytes:
                    error = InvalidRequest(f"the body is larger than {limit_bytes} bytes", code="request_too_large")
                    error.status = 413
                    raise error
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError as timeout:
        error = InvalidRequest(f"the body did not arrive within {timeout_s:g} s")
        error.status = 408
        raise error from timeout
