"""Messages as bytes: MessagePack of [version, type name, fields], decoded strictly into the dataclasses of `messages`."""

from __future__ import annotations

import typing

import msgspec

from fastdeploy_pd.cluster import messages
from fastdeploy_pd.cluster.messages import PROTOCOL_VERSION, HandOver, Message, Tokens
from fastdeploy_pd.errors import ProtocolError
from fastdeploy_pd.request import MAX_TOKEN_ID

MAX_MESSAGE_BYTES = 64 * 2**20


class _Envelope(msgspec.Struct, array_like=True):
    version: int
    name: str
    body: msgspec.Raw


_TYPES: dict[str, type[Message]] = {t.__name__: t for t in typing.get_args(messages.Message)}
_DECODERS: dict[str, msgspec.msgpack.Decoder[Message]] = {
    name: msgspec.msgpack.Decoder(t) for name, t in _TYPES.items()
}
_ENVELOPE = msgspec.msgpack.Decoder(_Envelope)
_ENCODER = msgspec.msgpack.Encoder()


def encode(message: Message) -> bytes:
    """Returns: the message's bytes."""
    body = msgspec.Raw(_ENCODER.encode(message))
    return _ENCODER.encode(_Envelope(PROTOCOL_VERSION, type(message).__name__, body))


def decode(data: bytes) -> Message:
    """Raises: ProtocolError: too long, another version, an unknown type, or fields that don't fit."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"a message of {len(data)} bytes is over the limit of {MAX_MESSAGE_BYTES}")
    try:
        envelope = _ENVELOPE.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"not a message: {error}") from error
    if envelope.version != PROTOCOL_VERSION:
        raise ProtocolError(f"the peer speaks protocol version {envelope.version}; this is version {PROTOCOL_VERSION}")
    decoder = _DECODERS.get(envelope.name)
    if decoder is None:
        raise ProtocolError(f"unknown message type {envelope.name[:64]!r}")
    try:
        message = decoder.decode(envelope.body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"a broken {envelope.name}: {error}") from error
    _check_tokens(message)
    return message


def _check_tokens(message: Message) -> None:
    """Raises: ProtocolError: a token id is out of range. request.py's classes know nothing of msgspec, which could say so."""
    chunks = (
        message.chunks if isinstance(message, Tokens) else (message.chunk,) if isinstance(message, HandOver) else ()
    )
    for chunk in chunks:
        for extreme in (min(chunk.token_ids), max(chunk.token_ids)) if chunk is not None and chunk.token_ids else ():
            if not 0 <= extreme <= MAX_TOKEN_ID:
                raise ProtocolError(f"token id {extreme}; it must be from 0 to {MAX_TOKEN_ID}")
