"""The handshake over TCP by which two processes agree to connect: who they are, what they hold, and how to reach their NICs.

client -> {magic, version, nonce}; server -> {magic, version, nonce, facts, proof}; client -> {facts, proof}; server -> {refusal}.
Facts are whatever both sides must have in common (`must_match`) plus an offer of queue pairs. A proof is an HMAC under the shared
secret over both nonces, the side and the facts, so neither a stranger nor a replay nor somebody in between passes. Frames are JSON
behind a four-byte length, of at most MAX_FRAME_BYTES, each within TIMEOUT_S.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import socket
import struct
import time
from collections.abc import Mapping
from typing import Any

from rdma_comm.errors import HandshakeFailed

MAGIC = "rdma_comm"
VERSION = 1
MAX_FRAME_BYTES = 1 << 20
TIMEOUT_S = 10.0
NONCE_BYTES = 32
_LENGTH = struct.Struct("<I")


class PeerEnded(HandshakeFailed):
    """The peer ended the connection."""


def send_frame(connection: socket.socket, value: Mapping[str, Any]) -> None:
    """Send a JSON object. Raises: OSError."""
    data = json.dumps(value).encode()
    connection.sendall(_LENGTH.pack(len(data)) + data)


def _receive(connection: socket.socket, num_bytes: int) -> bytes:
    """The connection's timeout holds for all of it, and not for each piece: a peer that drips is no better than one that is silent."""
    data = bytearray()
    timeout_s = connection.gettimeout()
    end_s = None if timeout_s is None else time.monotonic() + timeout_s
    try:
        while len(data) < num_bytes:
            if end_s is not None:
                connection.settimeout(max(1e-6, end_s - time.monotonic()))
            piece = connection.recv(num_bytes - len(data))
            if not piece:
                raise PeerEnded(f"the peer ended the connection after {len(data)} of {num_bytes} bytes")
            data += piece
    finally:
        connection.settimeout(timeout_s)
    return bytes(data)


def receive_frame(connection: socket.socket) -> dict[str, Any]:
    """Returns: a JSON object. Raises: HandshakeFailed: it is too long, cut off or none; OSError."""
    (num_bytes,) = _LENGTH.unpack(_receive(connection, _LENGTH.size))
    if num_bytes > MAX_FRAME_BYTES:
        raise HandshakeFailed(f"a frame of {num_bytes} bytes is over the limit of {MAX_FRAME_BYTES}")
    try:
        value = json.loads(_receive(connection, num_bytes))
    except (ValueError, RecursionError) as error:
        raise HandshakeFailed(f"a frame is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise HandshakeFailed(f"a frame holds a {type(value).__name__}; it must be an object")
    return value


class Handshake:
    """One side's part."""

    def __init__(
        self, must_match: Mapping[str, Any], secret: bytes | None = None, timeout_s: float = TIMEOUT_S
    ) -> None:
        """
        Args:
            must_match: plain values that both sides compare: layout, data type, tensor parallel size ...
            secret: what both sides know; without one anybody who reaches the port may connect.
            timeout_s: of each frame.
        """
        self._timeout_s = timeout_s
        self._must_match = dict(must_match)
        self._key = hmac.new(secret or b"", b"rdma_comm bootstrap", hashlib.sha256).digest()

    def connect(self, connection: socket.socket, offer: Any) -> Any:
        """Returns: the server's offer. Raises: HandshakeFailed: names what differs; OSError."""
        connection.settimeout(self._timeout_s)
        nonce = secrets.token_hex(NONCE_BYTES)
        send_frame(connection, {"magic": MAGIC, "version": VERSION, "nonce": nonce})
        hello = self._check_hello(receive_frame(connection))
        facts = self._check(hello, "server", nonce + hello["nonce"])
        send_frame(connection, self._credentials("client", nonce + hello["nonce"], offer))
        answer = receive_frame(connection)
        if answer.get("refusal"):
            raise HandshakeFailed(f"the peer refuses: {answer['refusal']}")
        return facts.get("offer")

    def accept(self, connection: socket.socket, offer: Any) -> Any:
        """Returns: the client's offer. Raises: HandshakeFailed, OSError."""
        connection.settimeout(self._timeout_s)
        hello = self._check_hello(receive_frame(connection))
        nonce = secrets.token_hex(NONCE_BYTES)
        nonces = hello["nonce"] + nonce
        send_frame(
            connection,
            {"magic": MAGIC, "version": VERSION, "nonce": nonce, **self._credentials("server", nonces, offer)},
        )
        try:
            facts = self._check(receive_frame(connection), "client", nonces)
        except PeerEnded as error:
            raise PeerEnded(f"{error}, once it had our proof: its secret is probably another one") from error
        except HandshakeFailed as error:
            send_frame(connection, {"refusal": str(error)})
            raise
        return facts.get("offer")

    def welcome(self, connection: socket.socket, refusal: str = "") -> None:
        """The server's last word, once it has connected its side (or why it could not)."""
        send_frame(connection, {"refusal": refusal})

    def _credentials(self, side: str, nonces: str, offer: Any) -> dict[str, str]:
        facts = json.dumps({"must_match": self._must_match, "offer": offer})
        return {"facts": facts, "proof": self._proof(side, nonces, facts)}

    def _proof(self, side: str, nonces: str, facts: str) -> str:
        return hmac.new(self._key, f"{side}:{nonces}:{facts}".encode(), hashlib.sha256).hexdigest()

    def _check_hello(self, hello: dict[str, Any]) -> dict[str, Any]:
        nonce = hello.get("nonce")
        is_nonce = isinstance(nonce, str) and nonce.isascii() and len(nonce) == 2 * NONCE_BYTES
        if hello.get("magic") != MAGIC or not is_nonce:
            raise HandshakeFailed("the peer does not speak this protocol")
        if hello.get("version") != VERSION:
            raise HandshakeFailed(f"version: {VERSION} here, {hello.get('version')!r} there")
        return hello

    def _check(self, credentials: dict[str, Any], side: str, nonces: str) -> dict[str, Any]:
        facts, proof = credentials.get("facts"), credentials.get("proof")
        if not isinstance(facts, str) or not isinstance(proof, str):
            raise HandshakeFailed("facts and proof must be strings")
        try:
            if not hmac.compare_digest(self._proof(side, nonces, facts).encode(), proof.encode()):
                raise HandshakeFailed("secret: the peer's proof does not fit ours")
            known = json.loads(facts)
            theirs = known["must_match"]
            if not isinstance(theirs, dict):  # its keys would be no names
                raise HandshakeFailed(f"the peer's facts hold a {type(theirs).__name__}; it must be an object")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise HandshakeFailed(f"the peer's facts cannot be read: {error}") from error
        for name in sorted({*self._must_match, *theirs}):
            if self._must_match.get(name) != theirs.get(name):
                raise HandshakeFailed(f"{name}: {self._must_match.get(name)!r} here, {theirs.get(name)!r} there")
        return dict(known)
