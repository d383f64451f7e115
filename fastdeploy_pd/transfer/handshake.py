"""How two ends of a byte stream find out whether they may exchange blocks, before any request is risked on it.

client -> HELLO {version, nonce}; server -> {version, nonce, facts, proof}; client -> {facts, proof}; server -> {reason}, "" is welcome.
A proof is an HMAC over both nonces and the prover's facts under the cluster secret, so neither a stranger nor a replay passes.
Facts: model fingerprint and KV layout. Every frame has a length limit and a deadline.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import select
import socket
import struct
from typing import Any, TypeVar

import msgspec

from fastdeploy_pd.clock import WallClock
from fastdeploy_pd.core.layout import KVLayout
from fastdeploy_pd.errors import IncompatiblePeer, TransferError
from fastdeploy_pd.transfer.base import TRANSFER_VERSION

MAGIC = b"FDKV"
MAX_FRAME_BYTES = 1 << 20
_CLOCK = WallClock()
HANDSHAKE_TIMEOUT_S = 5.0
NONCE_BYTES = 32
_LENGTH = struct.Struct("<I")
T = TypeVar("T")


class Hello(msgspec.Struct):
    """The first frame of either end."""

    magic: bytes
    version: int
    nonce: bytes


class Credentials(msgspec.Struct):
    """What an end is and that it may say so."""

    facts: bytes
    proof: bytes


_HELLO, _CREDENTIALS = msgspec.msgpack.Decoder(Hello), msgspec.msgpack.Decoder(Credentials)
_FACTS, _REASON = msgspec.msgpack.Decoder(dict[str, Any]), msgspec.msgpack.Decoder(str)


def describe(fingerprint: str, layout: KVLayout) -> dict[str, Any]:
    """Returns: the facts both sides compare."""
    return {"version": TRANSFER_VERSION, "fingerprint": fingerprint, "layout": layout.to_wire()}


def difference(own: dict[str, Any], peer: dict[str, Any]) -> str:
    """Returns: what keeps two ends from exchanging blocks, naming field and values; "" if nothing does."""
    for name in ("version", "fingerprint"):
        if own.get(name) != peer.get(name):
            return f"{name}: {own.get(name)!r} != {peer.get(name)!r}"
    try:
        return "; ".join(KVLayout(**own["layout"]).differences(KVLayout(**peer["layout"])))
    except (KeyError, TypeError) as error:
        return f"layout: {error}"


def send_frame(connection: socket.socket, data: bytes) -> None:
    """Send a length-prefixed frame."""
    connection.sendall(_LENGTH.pack(len(data)) + data)


def receive_exactly(connection: socket.socket, num_bytes: int, deadline_s: float | None = None) -> bytes:
    """
    Args:
        deadline_s: when all of it must be there, on the wall clock's scale; None: the connection's own timeout holds for each piece.
    Raises: TransferError: the stream ended before, or the deadline passed; OSError.
    """
    data = bytearray()
    while len(data) < num_bytes:
        if deadline_s is not None and not is_readable(connection, deadline_s - _CLOCK.now_s()):
            raise TransferError("the peer is too slow")
        piece = connection.recv(num_bytes - len(data))
        if not piece:
            raise TransferError("the connection ended")
        data += piece
    return bytes(data)


def is_readable(connection: socket.socket, timeout_s: float) -> bool:
    """Wait for bytes, whatever the connection's own timeout, which another thread may be using.

    Returns: whether some are there, or its end is. Raises: TransferError: another thread has closed it.
    """
    poller = select.poll()
    try:
        poller.register(connection, select.POLLIN)
    except ValueError as error:
        raise TransferError("the connection ended") from error
    return timeout_s > 0 and bool(poller.poll(timeout_s * 1000))


def receive_frame(connection: socket.socket, deadline_s: float | None = None) -> bytes:
    """Raises: as receive_exactly; TransferError: the frame is too long."""
    (num_bytes,) = _LENGTH.unpack(receive_exactly(connection, _LENGTH.size, deadline_s))
    if num_bytes > MAX_FRAME_BYTES:
        raise TransferError(f"a frame of {num_bytes} bytes is over the limit of {MAX_FRAME_BYTES}")
    return receive_exactly(connection, num_bytes, deadline_s)


def decode(data: bytes, decoder: msgspec.msgpack.Decoder[T]) -> T:
    """Returns: what a peer has sent. Raises: TransferError: it is something else, or nested too deeply."""
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise TransferError(f"a frame cannot be read: {error}") from error


class Handshake:
    """One end's part; the same object serves many connections."""

    def __init__(self, facts: dict[str, Any], secret: bytes | None) -> None:
        self._facts = facts
        self._encoded = msgspec.msgpack.encode(facts)
        self._key = hmac.new(secret or b"", b"fastdeploy-pd transfer", hashlib.sha256).digest()

    def connect(self, connection: socket.socket) -> None:
        """Prove ourselves to the end that listens, and have it prove itself.

        Raises: IncompatiblePeer: it refuses us, or we it; names the reason. TransferError: it is not one of us.
        """
        connection.settimeout(HANDSHAKE_TIMEOUT_S)
        end_s = _CLOCK.now_s() + HANDSHAKE_TIMEOUT_S
        try:
            nonce = secrets.token_bytes(NONCE_BYTES)
            send_frame(connection, msgspec.msgpack.encode(Hello(MAGIC, TRANSFER_VERSION, nonce)))
            hello = self._hello(receive_frame(connection, end_s))
            self._check(decode(receive_frame(connection, end_s), _CREDENTIALS), b"server", nonce, hello.nonce)
            proof = self._proof(b"client", nonce, hello.nonce, self._encoded)
            send_frame(connection, msgspec.msgpack.encode(Credentials(self._encoded, proof)))
            reason = decode(receive_frame(connection, end_s), _REASON)
        except OSError as error:
            raise TransferError(f"handshake failed: {error}") from error
        if reason:
            raise IncompatiblePeer(reason)

    def accept(self, connection: socket.socket) -> None:
        """The listening end's part. Raises: IncompatiblePeer, TransferError."""
        connection.settimeout(HANDSHAKE_TIMEOUT_S)
        end_s = _CLOCK.now_s() + HANDSHAKE_TIMEOUT_S
        try:
            hello = self._hello(receive_frame(connection, end_s))
            nonce = secrets.token_bytes(NONCE_BYTES)
            send_frame(connection, msgspec.msgpack.encode(Hello(MAGIC, TRANSFER_VERSION, nonce)))
            proof = self._proof(b"server", hello.nonce, nonce, self._encoded)
            send_frame(connection, msgspec.msgpack.encode(Credentials(self._encoded, proof)))
            credentials = decode(receive_frame(connection, end_s), _CREDENTIALS)
            try:
                self._check(credentials, b"client", hello.nonce, nonce)
            except IncompatiblePeer as error:
                send_frame(connection, msgspec.msgpack.encode(error.message))
                raise
            send_frame(connection, msgspec.msgpack.encode(""))
        except OSError as error:
            raise TransferError(f"handshake failed: {error}") from error

    def _hello(self, data: bytes) -> Hello:
        hello = decode(data, _HELLO)
        if hello.magic != MAGIC or len(hello.nonce) != NONCE_BYTES:
            raise TransferError("the peer does not speak this protocol")
        if hello.version != TRANSFER_VERSION:
            raise IncompatiblePeer(f"version: {TRANSFER_VERSION} != {hello.version}")
        return hello

    def _check(self, credentials: Credentials, side: bytes, client_nonce: bytes, server_nonce: bytes) -> None:
        expected = self._proof(side, client_nonce, server_nonce, credentials.facts)
        if not hmac.compare_digest(expected, credentials.proof):
            raise IncompatiblePeer("cluster secret: the peer's proof does not fit ours")
        reason = difference(self._facts, decode(credentials.facts, _FACTS))
        if reason:
            raise IncompatiblePeer(reason)

    def _proof(self, side: bytes, client_nonce: bytes, server_nonce: bytes, facts: bytes) -> bytes:
        return hmac.new(self._key, side + client_nonce + server_nonce + facts, hashlib.sha256).digest()
