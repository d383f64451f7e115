"""KV blocks between machines by RDMA: the receiver's NICs read them out of the sender's pool.

The control stream is StreamTransfer's: the sender announces blocks, the receiver reads them and acknowledges. Reading, not writing,
because then nobody but we ourselves can ever write into our pool: a sender that was fenced, or has gone mad, has no key to it, and a
revocation has only our own reads to wait for. Every NIC carries a share of every frame; one that fails leaves its share to the others.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from typing import Any

import msgspec
import numpy as np

from fastdeploy_pd.core.layout import KVLayout
from fastdeploy_pd.errors import ConfigError, TransferError, TransferUnavailable
from fastdeploy_pd.transfer.device_pool import DevicePool
from fastdeploy_pd.transfer.epochs import Incoming
from fastdeploy_pd.transfer.frames import WriteFrame
from fastdeploy_pd.transfer.handshake import decode, receive_frame, send_frame
from fastdeploy_pd.transfer.layout import KVPool, neighbours
from fastdeploy_pd.transfer.stream import STALL_TIMEOUT_S, StreamTransfer
from fastdeploy_pd.transfer.tcp import TcpTransfer
from rdma_comm.errors import RdmaError

_OFFER = msgspec.msgpack.Decoder(list[dict[str, Any]])


class RdmaTransfer(TcpTransfer):
    """See transfer/base.py. Listens, dials and is fenced like `tcp`; the blocks take another way."""

    name = "rdma"
    acknowledges = True  # the receiver reads: only it knows when
    port_flag = "--rdma-comm-ports"

    def __init__(
        self,
        pool: KVPool | DevicePool,
        layout: KVLayout,
        fingerprint: str,
        host: str = "127.0.0.1",
        port: int = 0,
        secret: bytes | None = None,
    ) -> None:
        """
        Args:
            pool: in host memory or a GPU's.
            host, port: of the control stream; 0 chooses a free one.
        Raises:
            TransferUnavailable: there is no RDMA here, or not with the NICs of KVCACHE_RDMA_NICS; says why.
            ConfigError: a variable is wrong, or the port cannot be had.
        """
        # Late: the compiled part is missing where there was no C compiler.
        try:
            from rdma_comm.endpoint import Connection, Endpoint, Options

            options = Options.from_environment(os.environ)
            if isinstance(pool, DevicePool):
                self._endpoint = Endpoint(options, gpu=pool.gpu.pci_address)
                self._region = self._endpoint.register(pool.pointer, layout.pool_bytes, pool, gpu=pool.gpu)
            else:
                self._endpoint = Endpoint(options)
                self._region = self._endpoint.register(pool.array.ctypes.data, layout.pool_bytes, pool.array)
        except ValueError as error:
            raise ConfigError(f"--cache-transfer-protocol names 'rdma': {error}") from error
        except ImportError as error:
            raise TransferUnavailable(
                "rdma_comm's compiled part was not built; it needs a C compiler and Python's headers (apt-get install gcc python3-dev), "
                f"then `pip install` again ({error})"
            ) from error
        except RdmaError as error:
            raise TransferUnavailable(str(error)) from error
        self._live: dict[int, Connection] = {}  # by id() of the socket
        self._live_lock = threading.Lock()
        try:
            super().__init__(pool, layout, fingerprint, host, port, secret)  # type: ignore[arg-type]
        except ConfigError:
            self._endpoint.close()
            raise

    def after_handshake(self, connection: socket.socket) -> None:
        """See base: exchange offers, be the one who is read."""
        try:
            link = self._link(connection)
            send_frame(connection, msgspec.msgpack.encode(link.offer([self._region])))
            link.connect([self._region], decode(receive_frame(connection), _OFFER))
            send_frame(connection, b"")
            if receive_frame(connection):
                raise TransferError("the peer cannot reach our NICs")
        except RdmaError as error:
            raise TransferError(f"no RDMA connection to the peer: {error}") from error

    def accepted(self, connection: socket.socket) -> Any:
        """See base. Returns: the connection to read through."""
        super().accepted(connection)
        try:
            link = self._link(connection)
            offer = decode(receive_frame(connection), _OFFER)
            send_frame(connection, msgspec.msgpack.encode(link.offer([self._region])))
            link.connect([self._region], offer)
            receive_frame(connection)
            send_frame(connection, b"")
        except RdmaError as error:
            raise TransferError(f"no RDMA connection to the peer: {error}") from error
        return link

    def drop(self, connection: socket.socket) -> None:
        """See base."""
        with self._live_lock:
            link = self._live.pop(id(connection), None)
        if link is not None:
            link.fail()
        super().drop(connection)
        if link is not None:
            with contextlib.suppress(RuntimeError):  # a read is ending: `released` closes what it used
                link.close()

    def released(self, state: Any) -> None:
        """See base."""
        if state is not None:
            state.close()

    def send_write(self, connection: socket.socket, frame: WriteFrame, last: WriteFrame | None) -> bool:
        """See StreamTransfer: unlike with `tcp` no bytes follow."""
        return StreamTransfer.send_write(self, connection, frame, last)

    def land(self, connection: socket.socket, incoming: Incoming, frame: WriteFrame, state: Any) -> None:
        """See base."""
        layout, size = incoming.layout, frame.block_bytes
        source_layer_bytes = state.remote_length(0) // layout.num_layers  # the peer may have another number of blocks
        runs = list(neighbours(*frame.pairs(source_layer_bytes // size)))
        pieces = [
            (layout.offset(layer, remote), layer * source_layer_bytes + local * size, count * size)
            for layer in frame.layers
            for local, remote, count in runs
        ]
        targets, sources, sizes = (np.array(column, dtype=np.int64) for column in zip(*pieces, strict=True))
        with incoming.landing(stop=state.fail) as is_open:
            if not is_open:
                return
            try:
                state.read(targets, sources, sizes, STALL_TIMEOUT_S)
                self._region.flush()
            except (RdmaError, ValueError) as error:
                raise TransferError(f"rdma: {error}") from error

    def skip(self, connection: socket.socket, frame: WriteFrame) -> None:
        """See base: nothing follows the frame."""

    def close(self) -> None:
        """See base."""
        super().close()
        self._endpoint.close()

    def _link(self, connection: socket.socket) -> Any:
        link = self._endpoint.connection(_peer_name(connection))
        with self._live_lock:
            self._live[id(connection)] = link
        return link


def _peer_name(connection: socket.socket) -> str:
    try:
        return str(connection.getpeername()[0])
    except OSError:
        return ""
