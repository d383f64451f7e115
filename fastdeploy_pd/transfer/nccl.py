"""KV blocks through torch.distributed, point to point: NCCL between GPUs, gloo between host pools.

The control stream is TcpTransfer's. Bytes take a process group of two that each connection has for itself (torch_link.py): the sender
gathers scattered blocks into a staging buffer, the receiver receives into one and copies from there into its pool. So the network never
writes into a pool, and a revocation waits for a copy at most.
"""

from __future__ import annotations

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
from fastdeploy_pd.transfer.handshake import send_frame
from fastdeploy_pd.transfer.layout import KVPool, rows_of, unpack_ids
from fastdeploy_pd.transfer.tcp import TcpTransfer
from rdma_comm.errors import RdmaError


class NcclTransfer(TcpTransfer):
    """See transfer/base.py. Listens, dials and authenticates like `tcp`."""

    name = "nccl"
    acknowledges = True  # what is staged has not arrived

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
            pool: in host memory (gloo), or on a GPU (NCCL).
            host, port: of the control stream; the group listens on the same host, on a port of its own choice.
        Raises:
            TransferUnavailable: torch, or what it needs for this pool, is not here; says how to get it.
            ConfigError: the port cannot be had, or is reachable from elsewhere without a secret.
        """
        self._side = _side(pool, host)
        self.piece_bytes = self._side.frame_bytes
        self._lanes: dict[int, Any] = {}  # torch_link.Lane by id() of the socket
        self._lanes_lock = threading.Lock()
        super().__init__(pool, layout, fingerprint, host, port, secret)  # type: ignore[arg-type]

    def address(self) -> dict[str, Any]:
        """See base."""
        return {**super().address(), **self._side.facts()}

    def reaches(self, peer: dict[str, Any]) -> str:
        """See base."""
        own = self._side.facts()
        if own["group"] != peer.get("group"):
            return f"group: {own['group']} != {peer.get('group')} (a GPU's pool and one in host memory)"
        if "gpu" in own and own["gpu"] == peer.get("gpu"):
            return f"gpu: both ends are on {own['gpu']}, and NCCL needs two (`ipc` moves inside one)"
        return super().reaches(peer)

    def after_handshake(self, connection: socket.socket) -> None:
        """See base: make the group."""
        self._join(connection, is_sender=True)

    def accepted(self, connection: socket.socket) -> Any:
        """See base. Returns: the Lane to receive from."""
        super().accepted(connection)
        return self._join(connection, is_sender=False)

    def drop(self, connection: socket.socket) -> None:
        """See base."""
        with self._lanes_lock:
            lane = self._lanes.pop(id(connection), None)
        if lane is not None:
            lane.fail()
        super().drop(connection)

    def send_write(self, connection: socket.socket, frame: WriteFrame, last: WriteFrame | None) -> bool:
        """See base: what a frame announces follows it, also if its epoch is cancelled meanwhile."""
        with self.reading(frame.epoch) as outgoing:
            if outgoing is None:
                return False
            send_frame(connection, msgspec.msgpack.encode(frame.after(last)))
            try:
                rows = rows_of(frame.layers, unpack_ids(frame.local), outgoing.layout.num_blocks)
                self._lane(connection).send(rows, frame.block_bytes)
            except RdmaError as error:
                raise TransferError(f"nccl: {error}") from error
        return True

    def land(self, connection: socket.socket, incoming: Incoming, frame: WriteFrame, state: Any) -> None:
        """See base: what arrives after a revocation stays in the staging buffer."""
        landing_in = rows_of(frame.layers, unpack_ids(frame.remote), incoming.layout.num_blocks)
        for staging, rows in state.receive(landing_in, frame.block_bytes):
            with incoming.landing() as is_open:
                if not is_open:
                    continue
                try:
                    self._side.scatter(staging, rows, frame.block_bytes)
                except (RdmaError, ValueError) as error:
                    raise TransferError(f"nccl: {error}") from error

    def skip(self, connection: socket.socket, frame: WriteFrame) -> None:
        """See base."""
        for _ in self._lane(connection).receive(np.zeros(frame.num_blocks, np.int64), frame.block_bytes):
            pass

    def _join(self, connection: socket.socket, is_sender: bool) -> Any:
        from fastdeploy_pd.transfer.torch_link import Lane

        lane = Lane(connection, self._side, is_sender)
        with self._lanes_lock:
            self._lanes[id(connection)] = lane
        lane.open()
        return lane

    def _lane(self, connection: socket.socket) -> Any:
        with self._lanes_lock:
            lane = self._lanes.get(id(connection))
        if lane is None:
            raise TransferError("the connection ended")
        return lane


def _side(pool: KVPool | DevicePool, host: str) -> Any:
    """Returns: a torch_link.Side. Raises: TransferUnavailable, ConfigError."""
    # Late: torch is no requirement of the package.
    try:
        import torch
        import torch.distributed as dist
    except ImportError as error:
        raise TransferUnavailable(f"torch is not here ({error}): pip install 'fastdeploy-pd[torch]'") from error
    is_device = isinstance(pool, DevicePool)
    if is_device and not (torch.cuda.is_available() and dist.is_available() and dist.is_nccl_available()):
        raise TransferUnavailable(
            f"torch {torch.__version__} has no CUDA or NCCL, which a GPU's pool needs: "
            "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu130"
        )
    if not is_device and not (dist.is_available() and dist.is_gloo_available()):
        raise TransferUnavailable(
            f"torch {torch.__version__} was built without gloo, which a host pool needs: pip install --force-reinstall torch"
        )
    from fastdeploy_pd.transfer.torch_link import DeviceSide, HostSide

    try:
        return DeviceSide(pool, host) if isinstance(pool, DevicePool) else HostSide(pool, host)
    except RuntimeError as error:
        raise ConfigError(f"--cache-transfer-protocol names 'nccl': gloo cannot listen on {host}: {error}") from error
