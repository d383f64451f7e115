"""The receiving side's book of epochs: which blocks each may write, what has landed, and the fence.

Bytes land only inside `Incoming.landing`, in pieces that take well under a millisecond, and `revoke` closes the epoch and waits for
the pieces that are landing: when it returns, nothing of it lands any more, whatever the network still holds. A piece that takes longer
(its peer has died in the middle of it) is stopped.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from fastdeploy_pd.config import MAX_RANKS
from fastdeploy_pd.core.layout import KVLayout, Share, shard, share_heads, whole
from fastdeploy_pd.errors import TransferError
from fastdeploy_pd.transfer.layout import pack_ids, unpack_ids

PATIENCE_S = 0.05  # how long a revocation waits for a piece before it stops it
_PART = "@"  # between an epoch's name and which part of it


def name_of_part(epoch: str, num_sources: int, source_rank: int, target_rank: int) -> str:
    """Returns: the name of what one rank sends to another of an epoch between instances whose ranks are not equally many."""
    return f"{epoch}{_PART}{num_sources}.{source_rank}.{target_rank}"


def split_name(name: str) -> tuple[str, int]:
    """Returns: the epoch that a part belongs to, and how many ranks send; 0: the name is an epoch's own, or nonsense."""
    epoch, _, part = name.partition(_PART)
    words = part.split(".")
    if len(words) != 3 or not all(w.isdecimal() and len(w) <= 3 for w in words):
        return epoch, 0
    num_sources, source = int(words[0]), int(words[1])
    return epoch, num_sources if 0 <= source < num_sources <= MAX_RANKS else 0


class Sums:
    """Checksums of an epoch's blocks that grow layer by layer. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._parts: dict[bytes, np.ndarray] = {}  # of equal lists of blocks: mostly one, for all layers

    def add(self, block_ids: bytes, sums: np.ndarray) -> None:
        """
        Args:
            block_ids: n of them, packed; sums: [n] uint64, added modulo 2^64.
        """
        with self._lock:
            before = self._parts.get(block_ids)
            self._parts[block_ids] = sums if before is None else before + sums

    def of(self, block_ids: Sequence[int]) -> tuple[int, ...]:
        """Returns: [n] sums, in this order. Raises: KeyError: a block has none."""
        if len(self._parts) == 1:
            ((packed, sums),) = self._parts.items()
            if packed == pack_ids(block_ids):
                return tuple(sums.tolist())
        found: dict[int, int] = {}
        for packed, sums in self._parts.items():
            for block_id, value in zip(unpack_ids(packed).tolist(), sums.tolist(), strict=True):
                found[block_id] = (found.get(block_id, 0) + value) % 2**64
        return tuple(found[block_id] for block_id in block_ids)


class Incoming:
    """One open epoch on the receiving side."""

    def __init__(self, epoch: str, block_ids: Sequence[int], nonce: int, layout: KVLayout) -> None:
        self.epoch, self.nonce = epoch, nonce
        self.block_ids = list(block_ids)
        self.lock = threading.Condition()
        self.is_open = True
        self._stops: dict[int, Callable[[], None]] = {}  # of the pieces that are landing
        self.num_bytes = 0  # landed
        self.announced_bytes: int | None = None  # told by the sender's end mark
        self.sums = Sums()  # of what has landed, where the backend computes checksums as it goes
        self.is_told = False  # its end was reported
        self.connections: set[int] = set()  # that carried some of it: their end before its end is its failure
        self._place = np.full(layout.num_blocks, -1, dtype=np.int32)  # of a block in the epoch
        self._place[self.block_ids] = np.arange(len(self.block_ids))
        self._last: tuple[bytes, np.ndarray] = (
            b"",
            np.zeros(0, dtype=bool),
        )  # list of blocks, where they are in the epoch
        self._written = np.zeros((layout.num_layers, len(self.block_ids)), dtype=bool)
        self.layout = layout  #: of the pool, cut as the epoch's blocks are

    def admit(self, layers: Sequence[int], block_ids: bytes, nonce: int) -> None:
        """Check a write before its bytes may land, and mark its blocks as written.

        Args:
            block_ids: n of them, packed, the same in each layer.

        Raises: TransferError: wrong nonce, foreign block, no such layer, or written before.
        """
        if nonce != self.nonce:
            raise TransferError("the nonce is not the epoch's")
        for layer in layers:
            if not 0 <= layer < self.layout.num_layers:
                raise TransferError(f"there is no layer {layer}")
        if self._last[0] != block_ids:  # layers come with the same
            self._last = block_ids, self._places(block_ids)
        is_there = self._last[1]
        is_again = False
        for layer in layers:
            row = self._written[layer]
            is_again = is_again or bool((row & is_there).any())
            row |= is_there
        if is_again:
            raise TransferError("a block was written twice")

    def _places(self, packed: bytes) -> np.ndarray:
        block_ids = unpack_ids(packed)
        is_known = (block_ids >= 0) & (block_ids < self.layout.num_blocks)
        places = self._place[block_ids] if is_known.all() else np.array([-1])
        if (places < 0).any():
            raise TransferError("a block is not part of the epoch")
        is_there = np.zeros(len(self.block_ids), dtype=bool)
        is_there[places] = True
        if np.count_nonzero(is_there) != len(places):
            raise TransferError("a block was written twice")
        return is_there

    @contextmanager
    def landing(self, stop: Callable[[], None] = lambda: None) -> Iterator[bool]:
        """Inside the block bytes may land. Yields: whether the epoch is open; if not, none may.

        Args:
            stop: ends the piece early; called from another thread if a revocation has waited for it for too long.
        """
        with self.lock:
            is_open = self.is_open
            if is_open:
                self._stops[threading.get_ident()] = stop
        try:
            yield is_open
        finally:
            if is_open:
                with self.lock:
                    del self._stops[threading.get_ident()]
                    self.lock.notify_all()

    def close(self) -> None:
        """Let nothing land any more; wait for what is landing."""
        with self.lock:
            self.is_open = False
            if not self.lock.wait_for(lambda: not self._stops, PATIENCE_S):
                for stop in list(self._stops.values()):
                    stop()
                self.lock.wait_for(lambda: not self._stops)

    @property
    def is_complete(self) -> bool:
        """Whether everything that was announced has landed."""
        return self.announced_bytes is not None and self.num_bytes == self.announced_bytes

    @property
    def expected_bytes(self) -> int:
        """Bytes of all its blocks in all layers."""
        return len(self.block_ids) * self.layout.block_bytes * self.layout.num_layers


class EpochBook:
    """All epochs of a receiving end. Thread-safe."""

    def __init__(self, layout: KVLayout) -> None:
        self._layout = layout
        self._lock = threading.Lock()
        self._open: dict[str, Incoming] = {}
        self._parts: dict[str, list[str]] = {}  # names of an epoch's parts that are open
        self._num_sources: dict[str, int] = {}  # whose parts they are; 0: it comes under its own name

    def open(self, epoch: str, block_ids: Sequence[int], nonce: int, parts: int = 1) -> None:
        """Raises: ValueError: the epoch is open already, or blocks can't be cut into so many parts."""
        layout = self._layout.cut(parts)
        with self._lock:
            if epoch in self._open:
                raise ValueError(f"epoch {epoch} was opened before")
            self._open[epoch] = Incoming(epoch, block_ids, nonce, layout)

    def find(self, name: str, nonce: int | None = None) -> Incoming | None:
        """
        Args:
            nonce: of who is about to write under this name: the first one says how the epoch comes, whole or in whose parts, and
                nothing else may write to its blocks in another way; None: only look.
        Returns: the epoch, or part of one, if it is open.
        """
        epoch, num_sources = split_name(name)
        with self._lock:
            whole_one = self._open.get(epoch)
            if nonce is None or whole_one is None or nonce != whole_one.nonce:
                return self._open.get(name)
            if self._num_sources.get(epoch, num_sources) != num_sources:
                return None
            found = self._open.get(name) or self._open_part(name, num_sources, whole_one)
            if found is not None:
                self._num_sources[epoch] = num_sources
            return found

    def _open_part(self, name: str, num_sources: int, whole_one: Incoming) -> Incoming | None:
        """Open what one rank of the sender writes. Only its frames tell how many ranks it has: the decode instance does not know."""
        epoch = whole_one.epoch
        try:
            shares = self._shares_from(num_sources)
            share = next(s for s in shares if name_of_part(epoch, num_sources, s.source_rank, s.target_rank) == name)
            layout = self._layout.cut(share.target_parts)
        except (ValueError, StopIteration):  # its heads are not dealt out so, or it is another rank's
            return None
        self._open[name] = Incoming(name, share.target_ids(whole_one.block_ids), whole_one.nonce, layout)
        self._parts.setdefault(epoch, []).append(name)
        return self._open[name]

    def _shares_from(self, num_sources: int) -> list[Share]:
        """Returns: what comes to this rank from so many others. Raises: ValueError: heads can't be dealt out so."""
        if num_sources == self._layout.num_ranks:
            return []  # whole blocks come, under the epoch's own name
        model, own = whole(self._layout), self._layout
        sources = [shard(model, rank, num_sources) for rank in range(num_sources)]
        targets = [shard(model, rank, own.num_ranks) for rank in range(own.num_ranks)]
        return [s for s in share_heads(sources, targets) if s.target_rank == own.rank]

    def close(self, epoch: str) -> None:
        """Fence an epoch and its parts. Idempotent."""
        with self._lock:
            names = [epoch, *self._parts.pop(epoch, ())]
            self._num_sources.pop(epoch, None)
            closed = [self._open.pop(name) for name in names if name in self._open]
        for incoming in closed:
            incoming.close()

    def carried_by(self, connection: int) -> list[Incoming]:
        """Returns: the unfinished epochs that a connection has carried some of."""
        with self._lock:
            return [i for i in self._open.values() if connection in i.connections and not i.is_complete]
