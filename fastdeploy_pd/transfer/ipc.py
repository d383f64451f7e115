"""KV blocks between GPUs of one machine: the receiver's GPU reads them out of the sender's memory, through a CUDA IPC mapping.

One kernel launch a frame copies its blocks, however scattered, over NVLink or PCI, and another one checksums what has landed, while the
other connection's frame is copied. The sender's GPU serves reads and computes its own checksums meanwhile: the prefill that runs there
keeps its multiprocessors. Only the receiver ever writes to its own pool.
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
from fastdeploy_pd.transfer.frames import WriteFrame
from fastdeploy_pd.transfer.handshake import decode, receive_frame, send_frame
from fastdeploy_pd.transfer.layout import unpack_ids
from fastdeploy_pd.transfer.outgoing import Outgoing
from fastdeploy_pd.transfer.shm import ShmTransfer, check_user
from rdma_comm.cuda.blocks import BlockMover
from rdma_comm.cuda.driver import Gpu
from rdma_comm.errors import RdmaError


class _Mapping(msgspec.Struct):
    """How the receiver gets at the sender's pool."""

    pool_bytes: int
    handle: bytes  #: CUDA IPC handle of the allocation
    offset: int  #: of the pool in it
    ordinal: int  #: for an end in the same process, which cannot open a handle of its own
    pointer: int


_MAPPING = msgspec.msgpack.Decoder(_Mapping)


@dataclass(slots=True)
class _Source:
    """The sender's pool as this process sees it, and what copies out of it: one a connection."""

    pointer: int
    pool_bytes: int
    mapped: int  #: what is to be unmapped; 0 in the same process
    mover: BlockMover
    packed: tuple[bytes, bytes, int] = (b"", b"", 0)  #: the last frame's blocks, here and there ...
    offsets: tuple[np.ndarray, np.ndarray] = (
        np.zeros(0),
        np.zeros(0),
    )  #: ... and where they lie: layers come with the same


class IpcTransfer(ShmTransfer):
    """See transfer/base.py. Called and fenced like `shm`; the pool is a GPU's."""

    name = "ipc"
    num_connections = 2  # while one frame is copied the next is prepared
    piece_bytes = 512 << 20  # 1.4 ms over NVLink

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
        mapping = _Mapping(self._layout.pool_bytes, self._handle, self._offset, pool.gpu.ordinal, pool.pointer)
        send_frame(connection, msgspec.msgpack.encode(mapping))
        refusal = receive_frame(connection)
        if refusal:
            raise TransferError(f"the peer cannot map our GPU's memory: {refusal.decode(errors='replace')}")

    def accepted(self, connection: socket.socket) -> Any:
        """See base: check who calls and map its pool. Returns: a _Source."""
        # Not by a process id that it tells: in two containers two processes may have the same.
        is_own = check_user(connection) == os.getpid()
        try:
            source = self._map(decode(receive_frame(connection), _MAPPING), is_own)
        except (RdmaError, TransferError, ValueError) as error:
            send_frame(connection, str(error).encode())
            raise TransferError(f"the sender's GPU memory cannot be mapped: {error}") from error
        send_frame(connection, b"")
        return source

    def released(self, state: Any) -> None:
        """See base: unmap."""
        if state is not None:
            state.mover.close()
            if state.mapped:
                self._device_pool.gpu.close_handle(state.mapped)

    def land(self, connection: socket.socket, incoming: Incoming, frame: WriteFrame, state: Any) -> None:
        """See base."""
        pool, size, parts = self._device_pool, frame.block_bytes, incoming.layout.parts
        layer_bytes = state.pool_bytes // self._layout.num_layers  # the peer may have another number of blocks
        if state.packed != (frame.local, frame.remote, size):
            local, remote = frame.pairs(layer_bytes // size)
            state.packed, state.offsets = (
                (frame.local, frame.remote, size),
                (local.astype(np.uint64) * np.uint64(size), pool.offsets(remote, parts)),
            )
        with incoming.landing() as is_open:
            if not is_open:
                return
            try:
                planes = pool.planes(frame.layers, layer_bytes, parts)
                sums = state.mover.copy_and_digest(
                    state.pointer, pool.pointer, *state.offsets, size, frame.nonce, planes
                )
            except (RdmaError, ValueError) as error:
                raise TransferError(f"ipc: {error}") from error
        incoming.sums.add(frame.remote, sums)

    def send_write(self, connection: socket.socket, frame: WriteFrame, last: WriteFrame | None) -> bool:
        """See base. While the receiver copies, what it should find is computed here."""
        with self.reading(frame.epoch) as outgoing:
            if outgoing is None or not super().send_write(connection, frame, last):
                return False
            try:
                sums = self._device_pool.digest_layers(
                    frame.layers, unpack_ids(frame.local), frame.nonce, outgoing.layout.parts
                )
            except RdmaError as error:
                raise TransferError(f"ipc: {error}") from error
            outgoing.sums.add(frame.remote, sums)
        return True

    def digests_sent(self, outgoing: Outgoing) -> tuple[int, ...]:
        """See base: they were computed as the blocks went out."""
        return outgoing.sums.of(outgoing.remote)

    def digests_arrived(self, incoming: Incoming) -> tuple[int, ...]:
        """See base: they were computed as the blocks came in."""
        return incoming.sums.of(incoming.block_ids)

    def _map(self, mapping: _Mapping, is_own: bool) -> _Source:
        gpu = self._device_pool.gpu
        if mapping.pool_bytes <= 0 or mapping.offset < 0:
            raise ValueError(f"a pool of {mapping.pool_bytes} bytes at {mapping.offset}")
        if is_own:
            gpu.reach(Gpu(mapping.ordinal))
            return _Source(mapping.pointer, mapping.pool_bytes, 0, BlockMover(gpu))
        base = gpu.open(mapping.handle)
        return _Source(base + mapping.offset, mapping.pool_bytes, base, BlockMover(gpu))
