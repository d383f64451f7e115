"""What rank 0 and the worker processes of its other ranks say to each other, and the socket pair that carries it.

Both ends are one instance's processes, of one version: nothing is authenticated or negotiated. `steps` goes one way and holds what to
compute (model/parallel.py); `orders` holds the rest. A worker loads its part of the model and says how many blocks it has room for
(Answer); hears what all agreed on (Attach), says that it has its pool and then how its ends are reached (Answers), and from then on takes
Calls for these ends.
"""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import msgspec

from fastdeploy_pd.config import InstanceConfig
from fastdeploy_pd.transfer.base import EpochArrived, EpochFailed, EpochSent, TransferEvent

TIMEOUT_S = 60.0  # a process that neither takes nor gives a byte for so long has failed
_LENGTH = struct.Struct("<Q")
_EVENTS: dict[str, Callable[..., TransferEvent]] = {
    kind.__name__: kind for kind in (EpochArrived, EpochSent, EpochFailed)
}


class Setup(msgspec.Struct):
    """The first message to a worker."""

    rank: int
    num_ranks: int
    config: InstanceConfig
    group: str  #: path of the file by which ranks find each other


class Attach(msgspec.Struct):
    """What all ranks have agreed on."""

    num_blocks: int
    fingerprint: str


class Call(msgspec.Struct, array_like=True):
    """Call a method of an end."""

    backend: str
    method: str
    arguments: list[Any]
    step: int = 0  #: not before the rank's K and V of this step and layer are in its pool
    layer: int = 0
    is_asked: bool = False  #: an Answer is waited for


class Answer(msgspec.Struct, tag=True):
    """What a call has returned, or what rank 0 waits for at the start."""

    value: Any = None


class Refusal(msgspec.Struct, tag=True):
    """Why a worker cannot start."""

    message: str


class Happened(msgspec.Struct, tag=True):
    """An event of an end."""

    backend: str
    kind: str
    fields: dict[str, Any]

    @classmethod
    def of(cls, backend: str, event: TransferEvent) -> Happened:
        """Returns: an event's message."""
        return cls(backend, type(event).__name__, asdict(event))

    def event(self) -> TransferEvent:
        """Returns: the event."""
        fields = {name: tuple(value) if isinstance(value, list) else value for name, value in self.fields.items()}
        return _EVENTS[self.kind](**fields)


class Channel:
    """One end of a socket pair: messages with a length before them."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        connection.settimeout(TIMEOUT_S)
        self._poller = select.poll()
        self._poller.register(connection, select.POLLIN)

    def send(self, data: bytes) -> None:
        """Raises: OSError: the other end is gone, or takes nothing for TIMEOUT_S."""
        self._connection.sendall(_LENGTH.pack(len(data)) + data)

    def receive(self, timeout_s: float | None) -> bytes | None:
        """
        Args:
            timeout_s: how long to wait for a message's first byte; None: for as long as the other end lives.
        Returns: a message; None: none has come. Raises: EOFError: the other end is gone; OSError: it stalls in a message.
        """
        if not self._poller.poll(None if timeout_s is None else timeout_s * 1000):
            return None
        (num_bytes,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
        return bytes(self._exactly(num_bytes))

    def _exactly(self, num_bytes: int) -> bytearray:
        data = bytearray(num_bytes)
        view = memoryview(data)
        while view:
            received = self._connection.recv_into(view)
            if not received:
                raise EOFError("the process at the other end is gone")
            view = view[received:]
        return data
