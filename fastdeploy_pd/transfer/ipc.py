"""KV blocks between GPUs of one machine: the receiver's GPU reads them out of the sender's memory, through a CUDA IPC mapping.

One kernel launch a frame copies its blocks, however scattered, over NVLink or PCI, and another one checksums what has landed. The
sender's GPU only serves reads: the prefill that runs there keeps its multiprocessors. Only the receiver ever writes to its own pool.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from fastdeploy_pd.core.layout import KVLayout
from fastdeploy_pd.errors import TransferError, TransferUnavailable
from fastdeploy_pd.transfer.device_pool import DevicePool
from fastdeploy_pd.transfer.epochs import Incoming
from fastdeploy_pd.transfer.handshake import receive_frame, send_frame
from fastdeploy_pd.transfer.shm import ShmTransfer, check_user
from fastdeploy_pd.transfer.stream import WriteFrame
from rdma_comm.cuda.driver import Gpu
from rdma_comm.errors import RdmaError


class _Mapping(msgspec.Struct):
    """How the receiver gets at the sender's pool."""

    process: int
    pool_bytes: int
    handle: bytes  #: CUDA IPC handle of the allocation
    offset: int  #: of the pool in it
    ordinal: int  #: for an end in the same process, which cannot open a handle of its own
    pointer: int


@dataclass(slots=True)
class _Source:
    """The sender's pool as this process sees it."""

    pointer: int
    pool_bytes: int
    mapped: int  #: what is to be unmapped; 0 in the same process


class IpcTransfer(ShmTransfer):
    """See transfer/base.py. Called and fenced like `shm`; the pool is a GPU's."""

    name = "ipc"
    num_connections = 2  # while one frame is copied the next is prepared
    piece_bytes = 256 << 20  # 0.7 ms over NVLink

    def __init__(
        self,
        pool: Any,
        layout: KVLayout,
        fingerprint: str,
        host: str = "",
        port: int = 0,
        secret: bytes | None = None,
    ) -> None:
        """
        Args:
            pool: a DevicePool.
        Raises: TransferUnavailable: the pool is not a GPU's, or cannot be shared.
        """
        if not isinstance(pool, DevicePool):
            raise TransferUnavailable("the KV pool is in host memory, which `shm` moves; `ipc` is for a GPU's")
        self._device_pool = pool
        try:
            self._handle, self._offset = pool.export()
        except RdmaError as error:
            raise TransferUnavailable(f"the GPU's memory cannot be shared: {error}") from error
        super().__init__(pool, layout, fingerprint, host, port, secret)  # type: ignore[arg-type]

    def after_handshake(self, connection: socket.socket) -> None:
        """See base: say how our pool is mapped; the peer answers when it has."""
        pool = self._device_pool
        mapping = _Mapping(
            os.getpid(), self._layout.pool_bytes, self._handle, self._offset, pool.gpu.ordinal, pool.pointer
        )
        send_frame(connection, msgspec.msgpack.encode(mapping))
        refusal = receive_frame(connection)
        if refusal:
            raise TransferError(f"the peer cannot map our GPU's memory: {refusal.decode(errors='replace')}")

    def accepted(self, connection: socket.socket) -> Any:
        """See base: check who calls and map its pool. Returns: a _Source."""
        check_user(connection)
        try:
            source = self._map(msgspec.msgpack.decode(receive_frame(connection), type=_Mapping))
        except (RdmaError, msgspec.MsgspecError, ValueError) as error:
            send_frame(connection, str(error).encode())
            raise TransferError(f"the sender's GPU memory cannot be mapped: {error}") from error
        send_frame(connection, b"")
        return source

    def released(self, state: Any) -> None:
        """See base: unmap."""
        if state is not None and state.mapped:
            self._device_pool.gpu.close_handle(state.mapped)

    def land(self, connection: socket.socket, incoming: Incoming, frame: WriteFrame, state: Any) -> None:
        """See base."""
        pool, size = self._device_pool, self._layout.block_bytes
        layer_bytes = state.pool_bytes // self._layout.num_layers  # the peer may have another number of blocks
        source, remote = frame.pairs(layer_bytes // size)
        source_offsets = np.concatenate([source * size + layer * layer_bytes for layer in frame.layers]).astype(
            np.uint64
        )
        target_offsets = np.concatenate([pool.offsets(layer, remote) for layer in frame.layers])
        with incoming.landing() as is_open:
            if not is_open:
                return
            try:
                pool.copy(state.pointer, source_offsets, target_offsets, size)
            except (RdmaError, ValueError) as error:
                raise TransferError(f"ipc: {error}") from error

    def _map(self, mapping: _Mapping) -> _Source:
        gpu = self._device_pool.gpu
        if mapping.pool_bytes <= 0 or mapping.offset < 0:
            raise ValueError(f"a pool of {mapping.pool_bytes} bytes at {mapping.offset}")
        if mapping.process == os.getpid():
            gpu.reach(Gpu(mapping.ordinal))
            return _Source(mapping.pointer, mapping.pool_bytes, 0)
        base = gpu.open(mapping.handle)
        return _Source(base + mapping.offset, mapping.pool_bytes, base)
