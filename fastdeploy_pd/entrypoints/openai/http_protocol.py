"""HTTP/1.1 with limits that hold before an ASGI application exists: time and bytes that heads and chunk framing may take.

uvicorn's parser protocol waits for ever for a head that never ends and keeps all of it; this one does not. Bodies are bounded in
`stream.read_body`, everything that a complete head shows in `guard`.
"""

from __future__ import annotations

import asyncio
import fcntl
import struct
import termios

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from fastdeploy_pd.entrypoints.openai.limits import HEADER_TIMEOUT_S, MAX_FRAMING_FACTOR, MAX_HEAD_BYTES
from fastdeploy_pd.entrypoints.openai.stream import error_body
from fastdeploy_pd.errors import InvalidRequest

UNREAD_S = 0.01  #: that what waits in the kernel gets to be read before its connection may be closed
_REASONS = {400: b"Bad Request", 408: b"Request Timeout", 431: b"Request Header Fields Too Large"}


class BoundedHttpProtocol(HttpToolsProtocol):
    """uvicorn's fast protocol, with a deadline and a size for every request's head, and errors in OpenAI's shape."""

    _deadline: asyncio.TimerHandle | None = None
    _num_head_bytes = 0
    _is_in_head = True
    _num_body_bytes = 0  # what chunks hold ...
    _num_framed_bytes = 0  # ... and what they took on the wire

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A new connection has to send a whole head in time."""
        super().connection_made(transport)
        self._deadline = self.loop.call_later(HEADER_TIMEOUT_S, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the deadline."""
        self._end_deadline()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count what belongs to a head that is not complete, and what chunks take besides their contents; parse."""
        if self._is_in_head:
            self._num_head_bytes += len(data)
        else:
            self._num_framed_bytes += len(data)
        super().data_received(data)
        if self._num_framed_bytes > MAX_HEAD_BYTES + MAX_FRAMING_FACTOR * self._num_body_bytes:
            self._refuse(400, "the body's chunks are nearly all framing")
        # A complete head has reset the count; what is left here is one that goes on and on.
        if self._is_in_head and self._num_head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse(431, f"the request's head is longer than {MAX_HEAD_BYTES} bytes")

    def on_message_begin(self) -> None:
        """A head begins; the first one's deadline runs since the connection was made."""
        super().on_message_begin()
        self._is_in_head = True
        if self._deadline is None:
            self._deadline = self.loop.call_later(HEADER_TIMEOUT_S, self._head_is_late)

    def on_headers_complete(self) -> None:
        """The head is complete."""
        self._end_deadline()
        # What came with the head's end is body already.
        self._is_in_head, self._num_framed_bytes, self._num_head_bytes = False, self._num_head_bytes, 0
        self._num_body_bytes = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._num_body_bytes += len(body)
        super().on_body(body)

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP as OpenAI shapes errors, and close."""
        self._refuse(400, msg)

    def timeout_keep_alive_handler(self) -> None:
        """Nothing came for long: close."""
        self._close_idle()

    def _close_idle(self) -> None:
        """Close, unless a request waits to be read: timers run before sockets are read, and after a close its client sees a reset."""
        if not self.transport.is_closing() and self._num_unread_bytes():
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(UNREAD_S, self._close_idle)
        else:
            self.transport.close()

    def _num_unread_bytes(self) -> int:
        request = fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.FIONREAD, struct.pack("i", 0))
        return int(struct.unpack("i", request)[0])

    def _head_is_late(self) -> None:
        self._deadline = None
        if self._num_head_bytes:
            self._refuse(408, f"the request's head did not arrive within {HEADER_TIMEOUT_S:g} s")
        else:
            self._close_idle()

    def _end_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _refuse(self, status: int, message: str) -> None:
        self._end_deadline()
        if self.transport.is_closing():
            return
        is_answered = self.cycle is not None and self.cycle.response_started
        if is_answered and (not self._is_in_head or not self.cycle.response_complete):
            self.transport.close()  # anything written now would be read as a part of the answer, or as another one
            return
        body = error_body(InvalidRequest(message))
        head = b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
        self.transport.write(head % (status, _REASONS[status], len(body)) + body)
        self.transport.close()
