"""A torch.distributed process group of two for one connection, and the staging buffers that blocks pass through on their way.

No default group is needed and many pairs live side by side: a group is built directly, over a store that carries its few keys (the
addresses of gloo, the id of NCCL) through the connection itself, which has passed the handshake. So there is no store to listen anywhere.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, Protocol

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from fastdeploy_pd.clock import WallClock
from fastdeploy_pd.errors import TransferError
from fastdeploy_pd.interfaces import interface_of
from fastdeploy_pd.transfer.device_pool import DevicePool
from fastdeploy_pd.transfer.handshake import decode, receive_frame, send_frame
from fastdeploy_pd.transfer.layout import KVPool
from fastdeploy_pd.transfer.stream import STALL_TIMEOUT_S

TAG = 0
POLL_S = 20e-6
#: NCCL groups of ours neither end the process when a peer dies, nor ask the store once the group is made
_NCCL_SETTINGS = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
}
_ENTRY = msgspec.msgpack.Decoder(tuple[str, bytes])
_environment = threading.Lock()
_clock = WallClock()


class ConnectionStore(Store):
    """The keys of one group, exchanged over the connection of the pair."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__()
        self._connection: socket.socket | None = connection
        self._values: dict[str, bytes] = {}

    def set(self, key: str, value: Any) -> None:
        """Keep and pass on."""
        self._values[key] = bytes(value)
        if self._connection is not None:
            send_frame(self._connection, msgspec.msgpack.encode((key, self._values[key])))

    def get(self, key: str) -> bytes:
        """Returns: the value, once either end has set it. Raises: TransferError, OSError: it does not come."""
        self.wait([key])
        return self._values[key]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Return when all are set. Raises: as get; the connection's timeout holds."""
        while not self.check(keys):
            if self._connection is None or not self._receive():
                raise TransferError(f"the peer has not set {keys}")

    def check(self, keys: list[str]) -> bool:
        """Whether all are set."""
        return all(key in self._values for key in keys)

    def finish(self) -> None:
        """Leave the connection to others, at the same place of the stream on both sides. Raises: as get."""
        assert self._connection is not None
        send_frame(self._connection, b"")
        while self._receive():
            pass
        self._connection = None

    def _receive(self) -> bool:
        assert self._connection is not None
        data = receive_frame(self._connection)
        if data:
            key, value = decode(data, _ENTRY)
            self._values[key] = value
        return bool(data)


class Side(Protocol):
    """Where a pool's bytes lie, and how they get into staging buffers and out again."""

    kind: str  #: of process group
    chunk_bytes: int  #: of a staging buffer, at most
    frame_bytes: int  #: of a frame, at most

    def facts(self) -> dict[str, str]:
        """Returns: what `reaches` needs to know of the other side."""
        ...

    def group(self, store: Store, rank: int) -> Any:
        """Returns: a process group of two."""
        ...

    def staging(self, num_bytes: int) -> torch.Tensor:
        """Returns: [num_bytes] uint8 where the pool is."""
        ...

    def gather(self, rows: np.ndarray, staging: torch.Tensor, size: int) -> None:
        """Copy blocks ([n], as rows_of says) of so many bytes one after another into the buffer."""
        ...

    def scatter(self, staging: torch.Tensor, rows: np.ndarray, size: int) -> None:
        """Copy the buffer into blocks; when it returns the bytes are there."""
        ...


class HostSide:
    """A KVPool, over gloo."""

    kind, chunk_bytes, frame_bytes = "gloo", 4 << 20, 16 << 20

    def __init__(self, pool: KVPool, host: str) -> None:
        """Raises: RuntimeError: gloo cannot listen on this host."""
        self._pool = pool
        self._device = dist.ProcessGroupGloo.create_device(hostname=host)  # one listening port for all pairs

    def facts(self) -> dict[str, str]:
        """See Side."""
        return {"group": self.kind}

    def group(self, store: Store, rank: int) -> Any:
        """See Side."""
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # its stub calls it Options
        options._devices, options._timeout, options._threads = [self._device], timedelta(seconds=STALL_TIMEOUT_S), 1
        return dist.ProcessGroupGloo(store, rank, 2, options)

    def staging(self, num_bytes: int) -> torch.Tensor:
        """See Side."""
        return torch.empty(num_bytes, dtype=torch.uint8)

    def gather(self, rows: np.ndarray, staging: torch.Tensor, size: int) -> None:
        """See Side."""
        np.take(self._pool.array.reshape(-1, size), rows, axis=0, out=staging.numpy().reshape(-1, size), mode="clip")

    def scatter(self, staging: torch.Tensor, rows: np.ndarray, size: int) -> None:
        """See Side."""
        self._pool.array.reshape(-1, size)[rows] = staging.numpy().reshape(-1, size)


class DeviceSide:
    """A DevicePool, over NCCL."""

    kind, chunk_bytes, frame_bytes = "nccl", 32 << 20, 128 << 20

    def __init__(self, pool: DevicePool, host: str) -> None:
        self._pool = pool
        self._device = torch.device("cuda", pool.gpu.ordinal)
        interface = interface_of(host)
        if interface:  # otherwise NCCL listens on the first that it finds
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")

    def facts(self) -> dict[str, str]:
        """See Side."""
        return {"group": self.kind, "gpu": self._pool.gpu.uuid}

    def group(self, store: Store, rank: int) -> Any:
        """See Side."""
        torch.cuda.set_device(self._device)
        with _environment:
            before = {name: os.environ.get(name) for name in _NCCL_SETTINGS}
            os.environ.update(_NCCL_SETTINGS)
            try:
                group = dist.ProcessGroupNCCL(store, rank, 2, dist.ProcessGroupNCCL.Options())
            finally:
                for name, value in before.items():
                    os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
        return group

    def staging(self, num_bytes: int) -> torch.Tensor:
        """See Side."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def gather(self, rows: np.ndarray, staging: torch.Tensor, size: int) -> None:
        """See Side."""
        packed, scattered = (n.astype(np.uint64) * np.uint64(size) for n in (np.arange(len(rows)), rows))
        self._pool.copy_out(staging.data_ptr(), packed, scattered, size)

    def scatter(self, staging: torch.Tensor, rows: np.ndarray, size: int) -> None:
        """See Side."""
        packed, scattered = (n.astype(np.uint64) * np.uint64(size) for n in (np.arange(len(rows)), rows))
        self._pool.copy(staging.data_ptr(), packed, scattered, size)


class Lane:
    """One connection's way for bytes, in one direction: a group of two and two staging buffers that take turns."""

    def __init__(self, connection: socket.socket, side: Side, is_sender: bool) -> None:
        """Both ends make theirs at the same time, then `open`. Raises: TransferError, OSError: there is no way to the peer."""
        self._side, self._peer, self._is_sender = side, 0 if is_sender else 1, is_sender
        self._has_failed = False
        self._buffers = [side.staging(side.chunk_bytes) for _ in range(2)]
        self._works: list[Any] = [None, None]
        self._turn = 0
        connection.settimeout(STALL_TIMEOUT_S)
        self._store = ConnectionStore(connection)
        try:
            self._group = side.group(self._store, 1 if is_sender else 0)
        except RuntimeError as error:
            raise TransferError(f"no {side.kind} group with the peer: {error}") from error

    def open(self) -> None:
        """Send a first byte: NCCL connects with it, and needs the store for that; then the store is over. Raises: as __init__."""
        self._wait(self._post(self._buffers[0][:1]))
        self._store.finish()

    def send(self, rows: np.ndarray, size: int) -> None:
        """Send blocks of so many bytes; when it returns the pool is not read any more. Raises: TransferError."""
        for chunk in self._chunks(rows, size):
            turn, self._turn = self._turn, 1 - self._turn
            if self._works[turn] is not None:
                self._wait(self._works[turn])
            part = self._buffers[turn][: len(chunk) * size]
            self._side.gather(chunk, part, size)
            self._works[turn] = self._post(part)

    def receive(self, rows: np.ndarray, size: int) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
        """Receive as many. While a chunk is being used, the next one travels.

        Yields: ([bytes] uint8, its rows); the buffer holds them until the next is asked for. Raises: TransferError.
        """
        chunks = self._chunks(rows, size)
        parts = [self._buffers[i % 2][: len(chunk) * size] for i, chunk in enumerate(chunks)]
        works = [self._post(part) for part in parts[:1]]
        for part, chunk, following in zip(parts, chunks, [*parts[1:], None], strict=True):
            if following is not None:
                works.append(self._post(following))
            self._wait(works.pop(0))
            yield part, chunk

    def _chunks(self, rows: np.ndarray, size: int) -> list[np.ndarray]:
        count = max(1, self._side.chunk_bytes // size)
        if len(self._buffers[0]) < size:  # a block that is larger than a chunk
            self._buffers = [self._side.staging(size) for _ in range(2)]
        return [rows[first : first + count] for first in range(0, len(rows), count)]

    def fail(self) -> None:
        """From any thread: end what is under way with an error, at both ends."""
        if self._has_failed:
            return
        self._has_failed = True
        with contextlib.suppress(RuntimeError):
            if self._side.kind == "nccl":
                self._group.abort()
            else:  # gloo's abort wakes nobody; a message that comes too late closes the pair, and that does
                late = self._group.recv([torch.empty(1, dtype=torch.uint8)], self._peer, TAG + 1)
                late.wait(timedelta(milliseconds=1))

    def _post(self, part: torch.Tensor) -> Any:
        try:
            move = self._group.send if self._is_sender else self._group.recv
            return move([part], self._peer, TAG)
        except RuntimeError as error:
            raise TransferError(f"{self._side.kind}: {error}") from error

    def _wait(self, work: Any) -> None:
        """Raises: TransferError: the peer is gone, or stalls."""
        try:
            if self._side.kind == "gloo":
                work.wait(timedelta(seconds=STALL_TIMEOUT_S))
                return
            end_s = _clock.now_s() + STALL_TIMEOUT_S
            while not work.is_completed():  # its wait() would only order streams
                if self._has_failed or _clock.now_s() > end_s:
                    self.fail()
                    raise TransferError("nccl: the connection ended, or the peer stalls")
                time.sleep(POLL_S)
            work.wait()  # says what failed
        except RuntimeError as error:
            raise TransferError(f"{self._side.kind}: {error}") from error
