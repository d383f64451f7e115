"""`RDMACommunicator`: the calls of FastDeploy's extension of that name, over this package.

A decode process constructs it with a port and is written to; a prefill process constructs it with port "0" and writes. Return codes
are FastDeploy's; `last_error` has the exception behind one that is not 0, and the `*_or_raise` forms raise it.
Source: FastDeploy's fastdeploy/cache_manager/transfer_factory/kvcache_transfer (the calls and their codes).
"""

from __future__ import annotations

import errno
import logging
import socket
import threading
import time
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from rdma_comm.bootstrap import Handshake
from rdma_comm.endpoint import Connection, Endpoint, Options
from rdma_comm.errors import RdmaError
from rdma_comm.strangers import Strangers, shut

log = logging.getLogger("rdma_comm")

CONNECTED, FAILED, INVALID = 0, 2, 4
WRITTEN, NOT_WRITTEN = 0, -1
CONNECT_TIMEOUT_S = 3.0
ACCEPT_PAUSE_S = 0.1
PASSING = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ECONNABORTED)  # a listener lives on


class RDMACommunicator:
    """One rank's KV cache, reachable by RDMA or reaching others'.

    Args:
        splitwise_role: "decode" listens on `port`, "prefill" connects.
        gpu_idx: kept for compatibility; NICs are chosen by KVCACHE_RDMA_NICS.
        port: decimal; "0" chooses a free one (see `port`).
        key_cache_ptrs, value_cache_ptrs: one address a layer; value_cache_ptrs may be empty.
        block_number: blocks of each layer's cache.
        block_bytes: bytes of one block in one layer's key (or value) cache.
        key_scale_ptrs, value_scale_ptrs: of a quantised cache: one address a layer, or none.
        scale_block_bytes: bytes of one block in one layer's scales.
        prefill_tp_size, prefill_tp_idx: a decode block holds that many prefill ranks' slices; which one is ours.
        secret: shared by both sides; without one anybody who reaches the port may connect.
        host: address to listen on.
    Raises: ValueError: an argument is not valid; RdmaError.
    """

    def __init__(
        self,
        splitwise_role: str,
        gpu_idx: int,
        port: str,
        key_cache_ptrs: Sequence[int],
        value_cache_ptrs: Sequence[int],
        block_number: int,
        block_bytes: int,
        key_scale_ptrs: Sequence[int] = (),
        value_scale_ptrs: Sequence[int] = (),
        scale_block_bytes: int = 0,
        prefill_tp_size: int = 1,
        prefill_tp_idx: int = 0,
        *,
        secret: bytes | None = None,
        host: str = "0.0.0.0",
        options: Options | None = None,
    ) -> None:
        if splitwise_role not in ("prefill", "decode"):
            raise ValueError(f"splitwise_role is {splitwise_role!r}; it must be 'prefill' or 'decode'")
        if not 0 <= prefill_tp_idx < prefill_tp_size:
            raise ValueError(f"prefill_tp_idx is {prefill_tp_idx}; it must be below prefill_tp_size {prefill_tp_size}")
        self.role, self.gpu_idx, self._num_blocks = splitwise_role, gpu_idx, block_number
        self.last_error: Exception | None = None
        self._tp = (prefill_tp_size, prefill_tp_idx)
        self._num_layers = len(key_cache_ptrs)
        pointers = {
            "key_cache_ptrs": key_cache_ptrs,
            "value_cache_ptrs": value_cache_ptrs,
            "key_scale_ptrs": key_scale_ptrs,
            "value_scale_ptrs": value_scale_ptrs,
        }
        self._caches = _caches(pointers, block_number, block_bytes, scale_block_bytes)
        slices = 1 if splitwise_role == "decode" else prefill_tp_size
        self._handshake = Handshake(
            {
                "num_caches": len(self._caches),
                "full_block_bytes": block_bytes * slices,
                "full_scale_block_bytes": scale_block_bytes * slices,
            },
            secret,
        )
        self._endpoint = Endpoint(options)
        self._regions = [
            self._endpoint.register(p, block_number * size, is_writable_by_peers=splitwise_role == "decode")
            for p, size in self._caches
        ]
        self._lock = threading.Lock()  # of what follows; nobody waits for the network with it
        self._turns: dict[tuple[str, str], threading.Lock] = {}  # one connects, or writes, at a time: a lock a peer
        self._connections: dict[tuple[str, str], Connection] = {}
        self._remote_blocks: dict[tuple[str, str], int] = {}
        self._channels: dict[tuple[str, str], socket.socket] = {}  # open as long as the connection is wanted
        self._accepted: dict[Connection, socket.socket] = {}
        self._listener: socket.socket | None = None
        self.port, self._is_closed, self._strangers = port, False, Strangers()
        if splitwise_role == "decode":
            self._listener = socket.create_server((host, int(port)), backlog=128)
            self.port = str(self._listener.getsockname()[1])
            threading.Thread(target=self._serve, name="rdma-accept", daemon=True).start()

    # FastDeploy's calls

    def connect(self, dst_ip: str, dst_port: str, dst_tp_size: int = 0) -> int:
        """Returns: 0 connected, 2 failed, 4 invalid argument; see `last_error`."""
        try:
            self.connect_or_raise(dst_ip, dst_port)
        except ValueError as error:
            self.last_error = error
            return INVALID
        except (RdmaError, OSError) as error:
            self.last_error = error
            return FAILED
        return CONNECTED

    def is_connected(self, dst_ip: str, dst_port: str) -> bool:
        """Returns: whether blocks can be written there."""
        connection = self._connections.get((dst_ip, str(dst_port)))
        return connection is not None and connection.num_rails > 0

    def write_cache(
        self,
        dst_ip: str,
        dst_port: str,
        local_block_ids: Sequence[int],
        remote_block_ids: Sequence[int],
        layer_idx: int,
    ) -> int:
        """Write one layer of some blocks. Returns: 0, or -1; see `last_error`."""
        try:
            self.write_cache_or_raise(dst_ip, dst_port, local_block_ids, remote_block_ids, layer_idx)
        except (RdmaError, ValueError) as error:
            self.last_error = error
            return NOT_WRITTEN
        return WRITTEN

    # with exceptions

    def connect_or_raise(self, dst_ip: str, dst_port: str) -> None:
        """Connect to a decode process. Does nothing if connected. Raises: ValueError, RdmaError, OSError."""
        if self.role != "prefill":
            raise ValueError("only a prefill process connects")
        key = (dst_ip, str(dst_port))
        with self._turn(key):
            if self.is_connected(*key):
                return
            self._drop(key)
            connection = self._endpoint.connection(f"{dst_ip}:{dst_port}")
            channel: socket.socket | None = None
            try:
                channel = socket.create_connection((dst_ip, int(dst_port)), timeout=CONNECT_TIMEOUT_S)
                channel.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                answer = self._handshake.connect(channel, connection.offer(self._regions))
                connection.connect(self._regions, answer)
                lengths = [length for _, length, _ in answer[0]["regions"]]
                self._remote_blocks[key] = min(
                    length // (size * self._tp[0]) for length, (_, size) in zip(lengths, self._caches, strict=True)
                )
            except BaseException:
                if channel is not None:
                    channel.close()
                _end(connection)
                raise
            self._connections[key], self._channels[key] = connection, channel

    def write_cache_or_raise(
        self,
        dst_ip: str,
        dst_port: str,
        local_block_ids: Sequence[int],
        remote_block_ids: Sequence[int],
        layer_idx: int,
    ) -> None:
        """Write one layer of some blocks. Raises: ValueError: an argument is not valid; CompletionFailed."""
        key = (dst_ip, str(dst_port))
        if key not in self._connections:
            raise ValueError(f"{dst_ip}:{dst_port} is not connected")
        if len(local_block_ids) != len(remote_block_ids):
            raise ValueError(
                f"{len(local_block_ids)} local and {len(remote_block_ids)} remote blocks; they must be equally many"
            )
        if not 0 <= layer_idx < self._num_layers:
            raise ValueError(f"layer_idx is {layer_idx}; it must be below {self._num_layers}")
        for name, ids, count in (
            ("local", local_block_ids, self._num_blocks),
            ("remote", remote_block_ids, self._remote_blocks[key]),
        ):
            bad = next((i for i in ids if not 0 <= i < count), None)
            if bad is not None:
                raise ValueError(f"{name}_block_ids has {bad}; it must be below {count}")
        tp_size, tp_index = self._tp
        with self._turn(key):
            if key not in self._connections:
                raise ValueError(f"{dst_ip}:{dst_port} is not connected any more")
            for index in range(layer_idx, len(self._caches), self._num_layers):
                size = self._caches[index][1]
                local = array("q", [i * size for i in local_block_ids])
                remote = array("q", [(i * tp_size + tp_index) * size for i in remote_block_ids])
                self._connections[key].write(local, remote, array("q", [size]) * len(local), region=index)

    def close(self) -> None:
        """End every connection. Idempotent."""
        if self._listener is not None:
            shut(self._listener)
            self._listener.close()
        with self._lock:
            self._is_closed = True
            turns = list(self._turns.items())
        for key, turn in turns:
            with turn:
                self._drop(key)
        with self._lock:
            for connection, channel in self._accepted.items():
                shut(channel)
                _end(connection)
            self._accepted.clear()
            self._endpoint.close()

    # inside

    @contextmanager
    def _turn(self, key: tuple[str, str]) -> Iterator[None]:
        """Inside the block nobody else connects this peer or writes to it. Raises: RdmaError: closed."""
        with self._lock:
            turn = self._turns.setdefault(key, threading.Lock())
        with turn:
            if self._is_closed:  # said before `close` waits for its turn
                raise RdmaError("this communicator is closed")
            yield

    def _drop(self, key: tuple[str, str]) -> None:
        connection, channel = self._connections.pop(key, None), self._channels.pop(key, None)
        if channel is not None:
            channel.close()
        if connection is not None:
            _end(connection)

    def _serve(self) -> None:
        listener = self._listener
        while listener is not None:
            try:
                channel, address = listener.accept()
            except OSError as error:
                if self._is_closed or error.errno not in PASSING:
                    return
                log.warning("cannot take a connection: %s", error.strerror)
                time.sleep(ACCEPT_PAUSE_S)
                continue
            self._strangers.admit(channel)
            serve = threading.Thread(
                target=self._accept, args=(channel, address[0]), name="rdma-handshake", daemon=True
            )
            try:
                serve.start()
            except RuntimeError as error:  # no more threads for now
                log.warning("cannot take a connection: %s", error)
                self._strangers.leave(channel)
                channel.close()

    def _accept(self, channel: socket.socket, peer: str) -> None:
        with self._lock:
            connection = None if self._is_closed else self._new_connection(peer)
            if connection is not None:
                self._accepted[connection] = channel
        try:
            if connection is not None:
                self._serve_peer(channel, connection)
        except (RdmaError, OSError, ValueError) as error:
            if not self._is_closed:
                log.warning("the connection from %s has ended: %s", peer, error)
        finally:
            with self._lock:
                if connection is not None and self._accepted.pop(connection, None) is not None:
                    _end(connection)
            channel.close()
            self._strangers.leave(channel)

    def _new_connection(self, peer: str) -> Connection | None:
        try:
            return self._endpoint.connection(peer)
        except RdmaError as error:  # the NIC, or this process, has no more queue pairs for now
            log.warning("the connection from %s cannot be taken: %s", peer, error)
            return None

    def _serve_peer(self, channel: socket.socket, connection: Connection) -> None:
        """Raises: RdmaError, OSError, ValueError: why it has ended."""
        channel.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        offer = self._handshake.accept(channel, connection.offer(self._regions))
        self._strangers.leave(channel)
        try:
            connection.connect(self._regions, offer)
        except (RdmaError, ValueError) as error:
            self._handshake.welcome(channel, str(error))
            raise
        self._handshake.welcome(channel)
        channel.settimeout(None)
        channel.recv(1)  # until the peer drops its end, or dies


def _caches(
    pointers: Mapping[str, Sequence[int]], num_blocks: int, block_bytes: int, scale_block_bytes: int
) -> list[tuple[int, int]]:
    """Returns: (address, bytes of a block): keys of all layers, then values, then scales. Raises: ValueError."""
    num_layers = len(pointers["key_cache_ptrs"])
    if num_blocks < 1 or block_bytes < 1 or not num_layers:
        raise ValueError(f"block_number {num_blocks}, block_bytes {block_bytes} and key_cache_ptrs must not be empty")
    caches = []
    for name, addresses in pointers.items():
        if addresses and len(addresses) != num_layers:
            raise ValueError(
                f"{name} has {len(addresses)} addresses; it must have none or {num_layers}, as key_cache_ptrs"
            )
        if addresses and "scale" in name and scale_block_bytes < 1:
            raise ValueError(f"scale_block_bytes is {scale_block_bytes}; with scales it must be at least 1")
        caches += [(address, scale_block_bytes if "scale" in name else block_bytes) for address in addresses]
    return caches


def _end(connection: Connection) -> None:
    connection.fail()
    connection.close()
