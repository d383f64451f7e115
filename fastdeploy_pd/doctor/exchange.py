"""What both sides of a pair have: who may speak, a stream to measure TCP, and one end of an RDMA connection.

One TCP connection, rdma_comm's handshake (an HMAC under the cluster secret, both ways, before anything is told), then JSON frames:
the side that connected asks {"do": ...}, the side that listens answers; {"reason": ...} is a refusal.
"""

from __future__ import annotations

import hashlib
import os
import socket
from array import array
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fastdeploy_pd.clock import WallClock
from fastdeploy_pd.errors import FastDeployPDError, TransferError, TransferUnavailable
from rdma_comm.bootstrap import Handshake
from rdma_comm.errors import RdmaError

DEFAULT_PORT = 2333
HANDSHAKE_TIMEOUT_S = 3.0  # for each frame
STREAM_S = 0.3  # each way
STREAM_LIMIT_S = 10.0  # for what is on its way on a slow line
CHUNK_BYTES = 1 << 18
RDMA_BYTES, RDMA_BLOCK_BYTES = 4 << 20, 1 << 16
RDMA_TIMEOUT_S = 5.0
IB_TIMEOUT = 16  # of one try: 4.096 us * 2**16 is 0.27 s
#: what a peer may cause: it is away, refuses, says something that makes no sense, or cannot be reached by a backend
PEER_ERRORS = (OSError, RdmaError, FastDeployPDError, ValueError, KeyError, TypeError, AttributeError)
_CLOCK = WallClock()


def handshake(secret: bytes | None) -> Handshake:
    """Returns: one side's part. Nothing is offered in it: the listener speaks before it knows to whom."""
    return Handshake({"program": "fastdeploy-pd doctor", "doctor_version": 1}, secret, HANDSHAKE_TIMEOUT_S)


def send_stream(connection: socket.socket) -> None:
    """Send as fast as it goes for STREAM_S. The first byte of a chunk says whether another one follows."""
    chunk, end_s = bytearray(CHUNK_BYTES), _CLOCK.now_s() + STREAM_S
    chunk[0] = 1
    while _CLOCK.now_s() < end_s:
        connection.sendall(chunk)
    chunk[0] = 0
    connection.sendall(chunk)


def receive_stream(connection: socket.socket) -> float:
    """Returns: bytes a second. Raises: TransferError: it does not end; OSError."""
    chunk = memoryview(bytearray(CHUNK_BYTES))
    began_s, num_bytes = 0.0, 0
    while True:
        filled = 0
        while filled < CHUNK_BYTES:
            received = connection.recv_into(chunk[filled:])
            if not received:
                raise TransferError("the connection ended within the stream")
            filled += received
            now_s = _CLOCK.now_s()
            began_s = began_s or now_s
            if now_s - began_s > STREAM_LIMIT_S:
                raise TransferError(f"{num_bytes + filled} bytes in {STREAM_LIMIT_S:g} s, and no end")
        num_bytes += CHUNK_BYTES
        if not chunk[0]:
            return num_bytes / max(now_s - began_s, 1e-6)


class RdmaEnd:
    """One end of a connection between two machines' first NICs."""

    def __init__(self, peer: str, env: Mapping[str, str]) -> None:
        """Raises: TransferUnavailable: there is no RDMA here; says why."""
        try:
            import numpy as np

            from rdma_comm.endpoint import Endpoint, Options, choose_nics

            options = Options.from_environment(env)
            first = choose_nics(options.nics)[0].name
            self._endpoint = Endpoint(replace(options, nics=(first,), timeout=IB_TIMEOUT, retry_count=3))
        except (ImportError, ValueError, RdmaError) as error:
            raise TransferUnavailable(str(error)) from error
        try:
            self.memory = np.frombuffer(bytearray(os.urandom(RDMA_BYTES)), np.uint8)
            self._region = self._endpoint.register(self.memory.ctypes.data, RDMA_BYTES, self.memory, True)
            self._connection = self._endpoint.connection(peer)
            self.offer = self._connection.offer([self._region])
        except RdmaError as error:
            self._endpoint.close()
            raise TransferUnavailable(str(error)) from error

    def connect(self, offer: Any) -> None:
        """Join with the peer's end. Raises: RdmaError."""
        self._connection.connect([self._region], offer)

    def digest(self) -> str:
        """Returns: a checksum of this end's memory."""
        return hashlib.sha256(self.memory.data).hexdigest()

    def move(self, is_read: bool) -> float:
        """Write all memory over the peer's, or read the peer's. Returns: bytes a second. Raises: RdmaError."""
        offsets = array("q", range(0, RDMA_BYTES, RDMA_BLOCK_BYTES))
        sizes = array("q", [RDMA_BLOCK_BYTES]) * len(offsets)
        call = self._connection.read if is_read else self._connection.write
        began_s = _CLOCK.now_s()
        call(offsets, offsets, sizes, RDMA_TIMEOUT_S)
        return RDMA_BYTES / (_CLOCK.now_s() - began_s)

    def close(self) -> None:
        """Give the NIC back."""
        self._connection.fail()
        self._connection.close()
        self._endpoint.close()
