"""KV blocks over TCP, between any two machines: sent straight from the pool, received straight into it."""

from __future__ import annotations

import ipaddress
import socket
from typing import Any

import msgspec
import numpy as np

from fastdeploy_pd.core.layout import KVLayout
from fastdeploy_pd.errors import ConfigError, TransferError
from fastdeploy_pd.transfer.epochs import Incoming
from fastdeploy_pd.transfer.frames import WriteFrame
from fastdeploy_pd.transfer.handshake import is_readable, send_frame
from fastdeploy_pd.transfer.layout import KVPool, neighbours, unpack_ids
from fastdeploy_pd.transfer.outgoing import LEAST_BYTES_PER_S
from fastdeploy_pd.transfer.stream import CONNECT_TIMEOUT_S, STALL_TIMEOUT_S, StreamTransfer

SOCKET_BUFFER_BYTES = 4 << 20
#: a probe after so many seconds of silence, then one every so many, and so many without an answer
KEEPALIVE = ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3))
MAX_VIEWS = 256  # of one system call; the kernel's limit is 1024


class TcpTransfer(StreamTransfer):
    """See transfer/base.py."""

    name = "tcp"
    port_flag = "--cache-queue-port"

    def __init__(
        self,
        pool: KVPool,
        layout: KVLayout,
        fingerprint: str,
        host: str = "127.0.0.1",
        port: int = 0,
        secret: bytes | None = None,
        num_connections: int = 2,
    ) -> None:
        """
        Args:
            host: address to listen on and to tell peers.
            port: 0 chooses a free one.
            num_connections: to each peer; a large request is spread over all of them.
        Raises: ConfigError: the address is taken, or not this machine's, or reachable from elsewhere without a secret.
        """
        if secret is None and not _is_loopback(host):
            raise ConfigError(
                f"KV blocks may not be received on {host} without a cluster secret (--cluster-secret-file or FD_CLUSTER_SECRET)"
            )
        try:
            listener = socket.create_server((host, port), backlog=128)
        except OSError as error:
            where = f"{self.port_flag} {port} on {host}" if port else f"--advertise-host {host}"
            raise ConfigError(f"{where} cannot be used: {error.strerror}") from error
        self.num_connections = num_connections
        self._host, self._port = host, int(listener.getsockname()[1])
        self._scratch = bytearray(1 << 16)
        super().__init__(pool, layout, fingerprint, secret, listener)

    def address(self) -> dict[str, Any]:
        """See base."""
        return {"host": self._host, "port": self._port}

    def connect_socket(self, descriptor: dict[str, Any]) -> socket.socket:
        """See base."""
        connection = socket.create_connection((descriptor["host"], descriptor["port"]), timeout=CONNECT_TIMEOUT_S)
        _tune(connection)
        return connection

    def accepted(self, connection: socket.socket) -> Any:
        """See base."""
        _tune(connection)
        return None

    def send_write(self, connection: socket.socket, frame: WriteFrame, last: WriteFrame | None) -> bool:
        """See base. Its bytes are done when the socket has taken them."""
        with self.reading(frame.epoch) as outgoing:
            if outgoing is None:
                return False
            send_frame(connection, msgspec.msgpack.encode(frame.after(last)))
            _send_all(connection, self._views(outgoing.layout, frame.layers, unpack_ids(frame.local)))
        self.add_done(frame.epoch, frame.num_bytes)
        return True

    def land(self, connection: socket.socket, incoming: Incoming, frame: WriteFrame, state: Any) -> None:
        """See base."""
        views = self._views(incoming.layout, frame.layers, unpack_ids(frame.remote))
        end_s = self._end_s(frame.num_bytes)
        while views:
            # Waiting is done before; while landing, only bytes that are here already are taken.
            self._wait(connection, end_s)
            with incoming.landing() as is_open:
                if not is_open:
                    break
                num_bytes = _receive_now(connection, views)
            views = _after(views, num_bytes)
        self._skip_bytes(connection, sum(len(v) for v in views))

    def skip(self, connection: socket.socket, frame: WriteFrame) -> None:
        """See base."""
        self._skip_bytes(connection, frame.num_bytes)

    def _skip_bytes(self, connection: socket.socket, num_bytes: int) -> None:
        scratch, end_s = bytearray(min(num_bytes, len(self._scratch))), self._end_s(num_bytes)
        while num_bytes:
            self._wait(connection, end_s)
            received = connection.recv_into(scratch, min(num_bytes, len(scratch)))
            if received == 0:
                raise TransferError("the connection ended")
            num_bytes -= received

    def _end_s(self, num_bytes: int) -> float:
        """Returns: when what a frame announces must be here: a sender may be slow, but not for ever."""
        return self._clock.now_s() + STALL_TIMEOUT_S + num_bytes / LEAST_BYTES_PER_S

    def _wait(self, connection: socket.socket, end_s: float) -> None:
        """Raises: TransferError: no byte comes, or too few have."""
        if not is_readable(connection, min(STALL_TIMEOUT_S, end_s - self._clock.now_s())):
            raise TransferError("the sender stalls in the middle of a block")

    def _views(self, layout: KVLayout, layers: list[int], block_ids: np.ndarray) -> list[memoryview]:
        """The blocks' bytes, layer by layer; neighbours in the pool as one piece."""
        views: list[memoryview] = []
        runs = list(neighbours(block_ids, block_ids))
        for layer in layers:
            for block_id, _, count in runs:
                offset = layout.offset(layer, block_id)
                views.append(self._pool.view[offset : offset + count * layout.block_bytes])
        return views


def _tune(connection: socket.socket) -> None:
    # A machine that vanishes says no good-bye: without probes what it was connected to would wait for it for ever.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE:
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER_BYTES)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _send_all(connection: socket.socket, views: list[memoryview]) -> None:
    while views:
        views = _after(views, connection.sendmsg(views[:MAX_VIEWS]))


def _receive_now(connection: socket.socket, views: list[memoryview]) -> int:
    try:
        num_bytes, _, _, _ = connection.recvmsg_into(views[:MAX_VIEWS], 0, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return 0
    if num_bytes == 0:
        raise TransferError("the connection ended")
    return num_bytes


def _after(views: list[memoryview], num_bytes: int) -> list[memoryview]:
    """Returns: what is left of the views after num_bytes."""
    for index, view in enumerate(views):
        if num_bytes < len(view):
            return [view[num_bytes:], *views[index + 1 :]]
        num_bytes -= len(view)
    return []
