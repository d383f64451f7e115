"""KV blocks inside one machine, through shared memory: the receiver copies them out of the sender's pool.

The sender passes its pool's descriptor once, over a Unix socket, and the receiver maps it read-only. Only the receiver ever writes to
its own pool, so a sender that was stopped and wakes up can do no harm.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
import socket
import struct
from pathlib import Path
from typing import Any

import numpy as np

from fastdeploy_pd.core.layout import KVLayout
from fastdeploy_pd.errors import TransferError
from fastdeploy_pd.transfer.epochs import Incoming
from fastdeploy_pd.transfer.frames import WriteFrame
from fastdeploy_pd.transfer.layout import KVPool, neighbours
from fastdeploy_pd.transfer.stream import CONNECT_TIMEOUT_S, StreamTransfer

_SIZE = struct.Struct("<Q")
_CREDENTIALS = struct.Struct("3i")


def host_id() -> str:
    """Returns: what two processes share exactly if they can reach each other's abstract sockets: kernel and network namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.stat('/proc/self/ns/net').st_ino}"


def check_user(connection: socket.socket) -> int:
    """Returns: the id, as this process sees it, of the process at the other end of a Unix socket.

    Raises: TransferError: it is not this user's.
    """
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    process, user, _ = _CREDENTIALS.unpack(credentials)
    if user != os.getuid():
        raise TransferError("the peer belongs to another user")
    return int(process)


class ShmTransfer(StreamTransfer):
    """See transfer/base.py."""

    name = "shm"
    acknowledges = True  # the source is read by the receiver: only it knows when

    def __init__(
        self,
        pool: KVPool,
        layout: KVLayout,
        fingerprint: str,
        host: str = "",
        port: int = 0,
        secret: bytes | None = None,
    ) -> None:
        """
        Args:
            host, port: not used; every backend is built with the same arguments.
        """
        # An abstract address has no file to leave behind; its name can't be guessed, and who calls is checked all the same.
        self._path = f"fastdeploy-pd-kv-{secrets.token_hex(16)}"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind("\0" + self._path)
        listener.listen(128)
        self._host_id = host_id()
        super().__init__(pool, layout, fingerprint, secret, listener)

    def address(self) -> dict[str, Any]:
        """See base."""
        return {"host_id": self._host_id, "path": self._path}

    def reaches(self, peer: dict[str, Any]) -> str:
        """See base."""
        if peer.get("host_id") != self._host_id:
            return f"host_id: {self._host_id} != {peer.get('host_id')}"
        return super().reaches(peer)

    def connect_socket(self, descriptor: dict[str, Any]) -> socket.socket:
        """See base."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(CONNECT_TIMEOUT_S)
        connection.connect("\0" + descriptor["path"])
        return connection

    def after_handshake(self, connection: socket.socket) -> None:
        """Pass our pool."""
        socket.send_fds(connection, [_SIZE.pack(self._layout.pool_bytes)], [self._pool.fd])

    def accepted(self, connection: socket.socket) -> np.ndarray:
        """Check who calls and map its pool. Returns: [bytes] uint8, read-only."""
        check_user(connection)
        data, descriptors, _, _ = socket.recv_fds(connection, _SIZE.size, 1)
        if len(descriptors) != 1 or len(data) != _SIZE.size:
            for descriptor in descriptors:
                os.close(descriptor)
            raise TransferError("the peer passed no pool")
        (num_bytes,) = _SIZE.unpack(data)
        try:
            if os.fstat(descriptors[0]).st_size != num_bytes or num_bytes == 0:
                raise TransferError("the peer's pool has another size than it says")
            if not fcntl.fcntl(descriptors[0], fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
                raise TransferError("the peer's pool could become smaller while it is read")
            mapping = mmap.mmap(descriptors[0], num_bytes, prot=mmap.PROT_READ)
        finally:
            os.close(descriptors[0])
        return np.frombuffer(mapping, dtype=np.uint8)

    def land(self, connection: socket.socket, incoming: Incoming, frame: WriteFrame, state: np.ndarray) -> None:
        """See base."""
        layout, size, target = incoming.layout, frame.block_bytes, self._pool.array
        layer_bytes = len(state) // layout.num_layers  # the peer may have another number of blocks
        runs = list(neighbours(*frame.pairs(layer_bytes // size)))
        pieces = [
            (layer * layer_bytes + local * size, layout.offset(layer, remote), count * size)
            for layer in frame.layers
            for local, remote, count in runs
        ]
        with incoming.landing() as is_open:
            if not is_open:
                return
            for start, offset, num_bytes in pieces:
                target[offset : offset + num_bytes] = state[start : start + num_bytes]

    def skip(self, connection: socket.socket, frame: WriteFrame) -> None:
        """See base: nothing follows the frame."""
