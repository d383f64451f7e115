"""KV blocks through Mooncake's transfer engine: the receiver reads them out of the sender's pool.

The control stream is TcpTransfer's. What is read lands in a staging buffer first and is copied into the pool from there: a read that
timed out goes on inside the engine, and its bytes arrive when the peer wakes up (seen with 0.3.13), so a buffer whose read did not end well
is never used again, and a revocation waits for a copy at most, never for the network.

The engine listens on all interfaces, whatever it is told, and asks nobody who they are: docs/deploy.md.
"""

from __future__ import annotations

import logging
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import numpy as np

from fastdeploy_pd.core.layout import KVLayout
from fastdeploy_pd.errors import ConfigError, TransferError, TransferUnavailable
from fastdeploy_pd.transfer.epochs import Incoming
from fastdeploy_pd.transfer.frames import WriteFrame
from fastdeploy_pd.transfer.handshake import decode, receive_frame, send_frame
from fastdeploy_pd.transfer.layout import KVPool, neighbours, rows_of
from fastdeploy_pd.transfer.stream import STALL_TIMEOUT_S, StreamTransfer
from fastdeploy_pd.transfer.tcp import TcpTransfer
from rdma_comm.devices import list_nics

STAGING_BYTES = 4 << 20
TRY_OUT_S = 20.0
MAX_READS = 32  # at once, of a frame
POLL_S = 20e-6
PENDING = 0  # of transfer_check_status; 1 is done, less is failed
P2P = "P2PHANDSHAKE"
METADATA = (P2P, "etcd://", "redis://", "http://", "https://")
PROTOCOLS = ("tcp", "rdma")
log = logging.getLogger("fastdeploy_pd.transfer")


@dataclass(frozen=True, slots=True)
class Options:
    """What the environment says of Mooncake."""

    metadata: str = P2P
    protocol: str = "tcp"
    nics: str = ""
    are_open_ports_allowed: bool = False

    @classmethod
    def from_environment(cls, env: Mapping[str, str]) -> Options:
        """Read FD_MOONCAKE_METADATA, FD_MOONCAKE_PROTOCOL, FD_MOONCAKE_ALLOW_OPEN_PORTS and KVCACHE_RDMA_NICS.

        Raises: ConfigError: one is wrong; names it, its value and what is allowed.
        """
        metadata = env.get("FD_MOONCAKE_METADATA") or P2P
        if metadata != P2P and not metadata.startswith(METADATA[1:]):
            raise ConfigError(
                f"FD_MOONCAKE_METADATA={metadata!r} is not allowed; it must be {P2P}, etcd://HOST:PORT, redis://HOST:PORT or http://HOST:PORT/metadata"
            )
        protocol = env.get("FD_MOONCAKE_PROTOCOL") or "tcp"
        if protocol not in PROTOCOLS:
            raise ConfigError(
                f"FD_MOONCAKE_PROTOCOL={protocol!r} is not allowed; it must be one of {', '.join(PROTOCOLS)}"
            )
        allowed = env.get("FD_MOONCAKE_ALLOW_OPEN_PORTS") or "0"
        if allowed not in ("0", "1"):
            raise ConfigError(f"FD_MOONCAKE_ALLOW_OPEN_PORTS={allowed!r} is not allowed; it must be 0 or 1")
        return cls(metadata, protocol, env.get("KVCACHE_RDMA_NICS", ""), allowed == "1")


class _Source(msgspec.Struct):
    """The sender's pool, as it tells the receiver."""

    segment: str  #: the engine's name
    pointer: Annotated[int, msgspec.Meta(gt=0, lt=1 << 62)]
    pool_bytes: Annotated[int, msgspec.Meta(gt=0, lt=1 << 62)]


_SOURCE = msgspec.msgpack.Decoder(_Source)


class MooncakeTransfer(TcpTransfer):
    """See transfer/base.py. Listens, dials and authenticates like `tcp`; the blocks take another way."""

    name = "mooncake"
    acknowledges = True  # the receiver reads: only it knows when

    def __init__(
        self,
        pool: KVPool,
        layout: KVLayout,
        fingerprint: str,
        host: str = "127.0.0.1",
        port: int = 0,
        secret: bytes | None = None,
    ) -> None:
        """
        Args:
            host, port: of the control stream; the engine takes free ports.
        Raises:
            TransferUnavailable: the engine is not here or does not start, the pool is a GPU's, or the engine's ports would be open
                where no secret guards the instance.
            ConfigError: a variable is wrong, or the port cannot be had.
        """
        if not isinstance(pool, KVPool):
            raise TransferUnavailable(
                "the KV pool is a GPU's, which `ipc`, `rdma` and `nccl` move; `mooncake` is for host memory"
            )
        self._options = Options.from_environment(os.environ)
        if secret is None and not self._options.are_open_ports_allowed:
            raise TransferUnavailable(
                "Mooncake listens on all interfaces without authentication, and this instance has no cluster secret "
                "(--cluster-secret-file or FD_CLUSTER_SECRET); FD_MOONCAKE_ALLOW_OPEN_PORTS=1 allows it all the same"
            )
        new_engine = _load()
        if self._options.protocol == "rdma":
            _check_nics(self._options.nics)
        self._staging: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()
        self._memory: list[np.ndarray] = []  # all buffers ever: a late read may still write into one
        self._is_registered = False
        self._registering = threading.Lock()
        self._engine, self._segment = new_engine(), ""
        super().__init__(pool, layout, fingerprint, host, port, secret)
        try:
            self._start()
        except TransferUnavailable:
            self.close()
            raise
        log.warning(
            "mooncake listens on all interfaces (%s and another port), not on %s alone, and asks nobody for the cluster secret: who reaches "
            "these ports can read and change the KV pool of an instance that sends; keep them behind a firewall",
            self._engine.get_rpc_port(),
            host,
        )

    def address(self) -> dict[str, Any]:
        """See base."""
        return {**super().address(), "metadata": self._options.metadata, "protocol": self._options.protocol}

    def reaches(self, peer: dict[str, Any]) -> str:
        """See base."""
        for name in ("metadata", "protocol"):
            if getattr(self._options, name) != peer.get(name):
                return f"{name}: {getattr(self._options, name)} != {peer.get(name)}"
        return super().reaches(peer)

    def after_handshake(self, connection: socket.socket) -> None:
        """See base: say where our pool is; the peer answers when it has read of it."""
        with self._registering:  # not before: who only receives keeps its pool to itself
            if not self._is_registered:
                self._register(self._pool.array)
                self._is_registered = True
        source = _Source(self._segment, self._pool.array.ctypes.data, self._layout.pool_bytes)
        send_frame(connection, msgspec.msgpack.encode(source))
        connection.settimeout(STALL_TIMEOUT_S)
        refusal = receive_frame(connection)
        if refusal:
            raise TransferError(f"the peer cannot read our pool: {refusal.decode(errors='replace')}")

    def accepted(self, connection: socket.socket) -> Any:
        """See base. Returns: a _Source.

        The first read is made here, of a block: to open a peer that stalls takes the engine a minute, and now it is known to be alive.
        """
        super().accepted(connection)
        try:
            source = decode(receive_frame(connection), _SOURCE)
            with self._reading(source, np.zeros(1, dtype=np.int64), self._layout.block_bytes):
                pass
        except TransferError as error:
            send_frame(connection, str(error).encode())
            raise TransferError(f"the sender's pool cannot be read: {error}") from error
        send_frame(connection, b"")
        return source

    def send_write(self, connection: socket.socket, frame: WriteFrame, last: WriteFrame | None) -> bool:
        """See StreamTransfer: unlike with `tcp` no bytes follow."""
        return StreamTransfer.send_write(self, connection, frame, last)

    def land(self, connection: socket.socket, incoming: Incoming, frame: WriteFrame, state: _Source) -> None:
        """See base."""
        layout, size = incoming.layout, frame.block_bytes
        num_source_blocks = state.pool_bytes // layout.num_layers // size  # the peer may have another number
        local, remote = frame.pairs(num_source_blocks)
        source = rows_of(frame.layers, local, num_source_blocks)
        target = rows_of(frame.layers, remote, layout.num_blocks)
        rows = self._pool.array.reshape(-1, size)
        step = max(1, STAGING_BYTES // size)
        for first in range(0, len(source), step):
            part = source[first : first + step]
            with self._reading(state, part, size) as staging, incoming.landing() as is_open:
                if not is_open:
                    return
                rows[target[first : first + step]] = staging[: len(part)]

    def skip(self, connection: socket.socket, frame: WriteFrame) -> None:
        """See base: nothing follows the frame."""

    def close(self) -> None:
        """See base."""
        super().close()
        # The threads are gone. Buffers outlive the engine, which may still write into one.
        self._engine = None

    @contextmanager
    def _reading(self, source: _Source, rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
        """Read rows of so many bytes of the peer's pool. Yields: [at least n, size] uint8. Raises: TransferError: it is gone, or stalls."""
        try:
            staging = self._staging.get_nowait()
        except queue.Empty:
            staging = self._new_staging()
        pieces = [
            (staging.ctypes.data + place * size, source.pointer + row * size, count * size)
            for row, place, count in neighbours(rows, np.arange(len(rows)))
        ]
        self._read(source.segment, pieces)  # if it fails, nobody gets the buffer again
        try:
            yield staging[: len(staging) - len(staging) % size].reshape(-1, size)
        finally:
            self._staging.put(staging)

    def _read(self, segment: str, pieces: list[tuple[int, int, int]]) -> None:
        waiting: set[int] = set()
        last_s = self._clock.now_s()
        while pieces or waiting:
            while pieces and len(waiting) < MAX_READS:
                target, address, num_bytes = pieces.pop()
                # One read a piece, and not all in one batch: only the first read of a batch can be asked for without waiting.
                read = self._engine.batch_transfer_async_read(segment, [target], [address], [num_bytes])
                if not read:
                    raise TransferError(f"mooncake: {segment} cannot be read")
                waiting.add(read)
            states = {read: self._engine.transfer_check_status(read) for read in waiting}
            waiting = {read for read, state in states.items() if state == PENDING}
            if any(state < 0 for state in states.values()):
                raise TransferError(f"mooncake: a read from {segment} failed")
            now_s = self._clock.now_s()
            if len(waiting) < len(states):
                last_s = now_s
            elif self._is_closed or now_s - last_s > STALL_TIMEOUT_S:
                raise TransferError("this end is closed" if self._is_closed else f"mooncake: {segment} stalls")
            else:
                time.sleep(POLL_S)

    def _start(self) -> None:
        engine, options = self._engine, self._options
        is_p2p = options.metadata == P2P
        if not is_p2p:
            os.environ.setdefault(
                "MC_TCP_BIND_ADDRESS", self._host
            )  # what it tells peers; otherwise the first it finds
            _try_out(options)
        name = self._host if is_p2p else f"{self._host}:{self._port}"  # where it is a key it must be unique
        if engine.initialize(name, options.metadata, options.protocol, options.nics):
            raise TransferUnavailable(
                f"Mooncake's engine does not start (metadata {options.metadata}, protocol {options.protocol}); its log above says why"
            )
        self._segment = f"{self._host}:{engine.get_rpc_port()}" if is_p2p else name

    def _new_staging(self) -> np.ndarray:
        staging = np.empty(max(STAGING_BYTES, self._layout.block_bytes), np.uint8)
        self._memory.append(staging)
        self._register(staging)
        return staging

    def _register(self, memory: np.ndarray) -> None:
        if self._engine.register_memory(memory.ctypes.data, memory.nbytes):
            raise TransferError(f"mooncake cannot register {memory.nbytes} bytes")


def _check_nics(names: str) -> None:
    """Raises: TransferUnavailable: there is no such RDMA device; the engine would take TCP instead, and say nothing."""
    active = [nic.name for nic in list_nics() if nic.active_port is not None]
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not active or not set(wanted) <= set(active):
        raise TransferUnavailable(
            f"FD_MOONCAKE_PROTOCOL is 'rdma' and KVCACHE_RDMA_NICS {names!r}; RDMA devices with an active port: {', '.join(active) or 'none'}"
        )


def _try_out(options: Options) -> None:
    """Start an engine in another process: it ends its process where it was built without this kind of metadata (0.3.13: redis).

    Raises: TransferUnavailable.
    """
    code = "import sys; from mooncake.engine import TransferEngine; sys.exit(TransferEngine().initialize(*sys.argv[1:]) != 0)"
    command = [sys.executable, "-c", code, f"try-out-{os.getpid()}", options.metadata, options.protocol, options.nics]
    try:
        done = subprocess.run(command, timeout=TRY_OUT_S, capture_output=True, text=True, check=False)
        last_words = next((line for line in done.stderr.splitlines() if line.startswith(("F", "E"))), "")
        reason = f"it ended with {done.returncode}: {last_words}" if done.returncode else ""
    except subprocess.TimeoutExpired:
        reason = f"no answer for {TRY_OUT_S:g} s"
    if reason:
        raise TransferUnavailable(
            f"Mooncake's engine does not start with FD_MOONCAKE_METADATA={options.metadata}: {reason}"
        )


def _load() -> Any:
    """Returns: the engine's class. Raises: TransferUnavailable: it is not installed, or cannot be loaded."""
    os.environ.setdefault("MC_TCP_STATUS_TIMEOUT_SEC", str(int(STALL_TIMEOUT_S)))
    os.environ.setdefault("MC_LOG_LEVEL", "ERROR")  # it logs every connection
    # Late: it is no requirement of the package, and needs system libraries.
    try:
        from mooncake.engine import TransferEngine
    except ModuleNotFoundError as error:
        raise TransferUnavailable(
            "Mooncake is not installed: pip install 'fastdeploy-pd[mooncake-cpu]' (or [mooncake], where there is CUDA 12)"
        ) from error
    except ImportError as error:
        raise TransferUnavailable(
            f"Mooncake cannot be loaded ({error}): apt-get install libibverbs1 libnuma1 libcurl4"
        ) from error
    return TransferEngine
