"""A transfer inside one thread under virtual time: real bytes, real checksums, simulated wire. For tests and the simulation."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fastdeploy_pd.core.layout import KVLayout
from fastdeploy_pd.transfer.base import CLOSED, TRANSFER_VERSION, EpochArrived, EpochFailed, EpochSent, TransferEvent
from fastdeploy_pd.transfer.layout import KVPool


class LoopbackNetwork:
    """Carries writes between the transfers of one test; delivers them when told that time has passed."""

    def __init__(self, seed: int = 0, max_delay_s: float = 0.05, corrupt: float = 0.0, drop: float = 0.0) -> None:
        """
        Args:
            max_delay_s: each write takes up to so long.
            corrupt: share of written blocks in which one bit flips.
            drop: share of writes at which the connection breaks: the epoch fails on both sides.
        """
        self.rng = random.Random(seed)
        self.max_delay_s, self.corrupt, self.drop = max_delay_s, corrupt, drop
        self.ends: dict[str, LoopbackTransfer] = {}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._now_s = 0.0

    def run_until(self, now_s: float) -> None:
        """Deliver everything that is due by now_s, in order."""
        self._now_s = now_s
        while self._events and self._events[0][0] <= now_s:
            heapq.heappop(self._events)[2]()

    def later(self, not_before_s: float, action: Callable[[], None]) -> float:
        """Schedule a delivery. Returns: its time in seconds; one epoch's deliveries keep their order through not_before_s."""
        when_s = max(not_before_s, self._now_s + self.rng.uniform(0, self.max_delay_s))
        self._count += 1
        heapq.heappush(self._events, (when_s, self._count, action))
        return when_s


@dataclass(slots=True)
class _Outgoing:
    peer: str
    nonce: int
    remote: list[int]
    layout: KVLayout
    local_of: dict[int, int] = field(default_factory=dict)
    last_s: float = 0.0
    num_bytes: int = 0
    is_over: bool = False


@dataclass(slots=True)
class _Incoming:
    blocks: list[int]
    nonce: int
    layout: KVLayout
    num_bytes: int = 0


class LoopbackTransfer:
    """One end. See transfer/base.py."""

    name = "loopback"

    def __init__(
        self, end: str, pool: KVPool, layout: KVLayout, network: LoopbackNetwork, fingerprint: str = ""
    ) -> None:
        self._end, self._pool, self._layout, self._network, self._fingerprint = end, pool, layout, network, fingerprint
        self._out: dict[str, _Outgoing] = {}
        self._in: dict[str, _Incoming] = {}
        self._seen: set[str] = set()
        self._events: list[TransferEvent] = []
        self._is_closed = False
        network.ends[end] = self

    def descriptor(self) -> dict[str, Any]:
        """See base."""
        return {
            "backend": self.name,
            "version": TRANSFER_VERSION,
            "address": self._end,
            "fingerprint": self._fingerprint,
            "layout": self._layout.to_wire(),
        }

    def reaches(self, peer: dict[str, Any]) -> str:
        """See base."""
        if peer["version"] != TRANSFER_VERSION:
            return f"version: {TRANSFER_VERSION} != {peer['version']}"
        if peer["fingerprint"] != self._fingerprint:
            return f"fingerprint: {self._fingerprint} != {peer['fingerprint']}"
        return "; ".join(self._layout.differences(KVLayout(**peer["layout"])))

    def open_epoch(self, epoch: str, block_ids: Sequence[int], nonce: int, parts: int = 1) -> None:
        """See base."""
        if epoch in self._seen:
            raise ValueError(f"epoch {epoch} was opened before")
        self._seen.add(epoch)
        self._in[epoch] = _Incoming(list(block_ids), nonce, self._layout.cut(parts))

    def revoke(self, epoch: str) -> None:
        """See base."""
        self._in.pop(epoch, None)

    def start(
        self, epoch: str, nonce: int, peer: dict[str, Any], remote_block_ids: Sequence[int], parts: int = 1
    ) -> None:
        """See base."""
        self._out[epoch] = _Outgoing(peer["address"], nonce, list(remote_block_ids), self._layout.cut(parts))

    def write(
        self, epoch: str, layers: Sequence[int], local_block_ids: Sequence[int], remote_block_ids: Sequence[int]
    ) -> None:
        """See base."""
        outgoing = self._out.get(epoch)
        if outgoing is None or outgoing.is_over:
            return
        outgoing.local_of.update(zip(remote_block_ids, local_block_ids, strict=True))
        pairs = list(zip(local_block_ids, remote_block_ids, strict=True))
        for layer in layers:
            outgoing.last_s = self._network.later(outgoing.last_s, partial(self._deliver, epoch, layer, pairs))

    def finish(self, epoch: str) -> None:
        """See base."""
        outgoing = self._out.get(epoch)
        if outgoing is not None and not outgoing.is_over:
            outgoing.last_s = self._network.later(outgoing.last_s, lambda: self._complete(epoch))

    def cancel(self, epoch: str) -> None:
        """See base."""
        outgoing = self._out.get(epoch)
        if outgoing is not None and not outgoing.is_over:
            self._fail(epoch, outgoing, "cancelled")

    def poll(self) -> list[TransferEvent]:
        """See base."""
        events, self._events = self._events, []
        return events

    def close(self) -> None:
        """See base."""
        self._is_closed = True
        self._network.ends.pop(self._end, None)
        for epoch, outgoing in self._out.items():
            if not outgoing.is_over:
                self._fail(epoch, outgoing, "the sender is gone")

    def _deliver(self, epoch: str, layer: int, pairs: list[tuple[int, int]]) -> None:
        outgoing, network = self._out[epoch], self._network
        if outgoing.is_over:
            return
        peer = network.ends.get(outgoing.peer)
        incoming = peer._in.get(epoch) if peer is not None else None
        if peer is None or incoming is None or incoming.nonce != outgoing.nonce or network.rng.random() < network.drop:
            self._fail(epoch, outgoing, "the connection ended" if incoming is not None else CLOSED)
            return
        if outgoing.layout.block_bytes != incoming.layout.block_bytes:
            sizes = outgoing.layout.block_bytes, incoming.layout.block_bytes
            self._fail(epoch, outgoing, f"blocks of {sizes[0]} bytes, not of {sizes[1]}")
            return
        for local, remote in pairs:
            if remote not in incoming.blocks:
                self._fail(epoch, outgoing, f"block {remote} is not part of the epoch")
                return
            data = bytearray(_bytes_of(self._pool, outgoing.layout, layer, local))
            if network.rng.random() < network.corrupt:
                data[network.rng.randrange(len(data))] ^= 1 << network.rng.randrange(8)
            _bytes_of(peer._pool, incoming.layout, layer, remote)[:] = data
            outgoing.num_bytes += len(data)

    def _complete(self, epoch: str) -> None:
        outgoing = self._out[epoch]
        if outgoing.is_over:
            return
        peer = self._network.ends.get(outgoing.peer)
        incoming = peer._in.get(epoch) if peer is not None else None
        if peer is None or incoming is None:
            self._fail(epoch, outgoing, CLOSED)
            return
        outgoing.is_over = True
        local = [outgoing.local_of[remote] for remote in outgoing.remote]
        self._events.append(
            EpochSent(epoch, self._pool.digest(local, outgoing.nonce, outgoing.layout.parts), outgoing.num_bytes, 0.0)
        )
        arrived = peer._pool.digest(incoming.blocks, incoming.nonce, incoming.layout.parts)
        peer._events.append(EpochArrived(epoch, arrived, outgoing.num_bytes))

    def _fail(self, epoch: str, outgoing: _Outgoing, reason: str) -> None:
        outgoing.is_over = True
        self._events.append(EpochFailed(epoch, reason))
        peer = self._network.ends.get(outgoing.peer)
        if peer is not None and epoch in peer._in:
            peer._events.append(EpochFailed(epoch, reason))


def _bytes_of(pool: KVPool, layout: KVLayout, layer: int, block_id: int) -> memoryview:
    offset = layout.offset(layer, block_id)
    return pool.view[offset : offset + layout.block_bytes]
