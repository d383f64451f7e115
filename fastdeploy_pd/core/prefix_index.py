"""Which blocks each instance can find by their content: what an instance says of them, and what a front end makes of it.

A block is named by the first KEY_BYTES of its chain hash (core/blocks.py). The index is a hint: a stale or colliding entry costs time, never a wrong
token, because the instance itself looks blocks up by their whole hashes. Increments are numbered; whoever has missed one takes a snapshot.

Free blocks are reused in the order in which they became free, the last of a table first, so a chain loses its tail first and the number of its blocks that
are held is found by binary search. Seldom there is a gap: of two requests that computed the same prefix at the same time only one's blocks are
findable, and they may go before the other one's continuation. What is found then is too much, and the instance computes it again.
"""

from __future__ import annotations

import sys
from array import array
from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Collection, Sequence
from functools import partial

KEY_BYTES = 8  # among a million blocks a foreign one is taken for ours once in 10^13 look-ups
MAX_BLOCKS = (
    131_072  # an instance tells of, the newest ones; about 90 bytes each in every front end (docs/prefix_cache.md)
)


def key_of(block_hash: bytes) -> int:
    """Returns: what the index knows a block by."""
    return int.from_bytes(block_hash[:KEY_BYTES], sys.byteorder)


class HeldBlocks:
    """An instance's side: told by the pool, in the engine's thread, what can be found; read by the thread that publishes it."""

    def __init__(self, max_blocks: int = MAX_BLOCKS) -> None:
        self._max_blocks = max_blocks
        self._events: deque[tuple[bytes, bool]] = deque()
        self._held: OrderedDict[bytes, None] = OrderedDict()  # keys, oldest first

    def found(self, block_hash: bytes) -> None:
        """A block can be found from now on."""
        self._events.append((block_hash, True))

    def gone(self, block_hash: bytes) -> None:
        """A block can't be found any more."""
        self._events.append((block_hash, False))

    def take_changes(self) -> tuple[bytes, bytes]:
        """Returns: keys that came and keys that went since the last call, KEY_BYTES each; none is in both."""
        changed: dict[bytes, bool] = {}  # key -> whether it was held before
        held = self._held
        for _ in range(len(self._events)):
            block_hash, is_found = self._events.popleft()
            key = block_hash[:KEY_BYTES]
            changed.setdefault(key, key in held)
            if is_found:
                held[key] = None
            else:
                held.pop(key, None)
        while len(held) > self._max_blocks:
            key, _ = held.popitem(last=False)
            changed.setdefault(key, True)
        came = b"".join(key for key, was_held in changed.items() if not was_held and key in held)
        return came, b"".join(key for key, was_held in changed.items() if was_held and key not in held)

    def snapshot(self) -> bytes:
        """Returns: the keys of all that is held, changes that were not taken left out."""
        return b"".join(self._held)


class PrefixIndex:
    """A front end's side: what every instance holds. One thread changes it, others may match meanwhile."""

    def __init__(self, max_blocks: int = MAX_BLOCKS) -> None:
        """
        Args:
            max_blocks: kept of an instance; more are not taken in.
        """
        self._max_blocks = max_blocks
        self._held: dict[str, set[int]] = {}
        self._sequence: dict[str, int] = {}

    def sequence(self, instance_id: str) -> int | None:
        """Returns: the number of the newest increment taken in; None: a snapshot is needed."""
        return self._sequence.get(instance_id)

    def num_blocks(self, instance_id: str) -> int:
        """Returns: how many blocks of an instance are known."""
        return len(self._held.get(instance_id, ()))

    def instance_ids(self) -> list[str]:
        """Returns: whose blocks are known."""
        return list(self._held)

    def reset(self, instance_id: str, sequence: int, keys: bytes) -> None:
        """Take a snapshot, as of increment `sequence`. Raises: ValueError: `keys` is no whole number of keys."""
        self._held[instance_id] = set(array("Q", keys)[: self._max_blocks])
        self._sequence[instance_id] = sequence

    def apply(self, instance_id: str, sequence: int, came: bytes, went: bytes) -> bool:
        """Take an increment; one that is known already changes nothing.

        Returns: False: some before it were lost; a snapshot is needed, and what is known stays until then.
        Raises: ValueError: not a whole number of keys.
        """
        newest = self._sequence.get(instance_id)
        if newest is None or sequence > newest + 1:
            self._sequence.pop(instance_id, None)
            return False
        if sequence <= newest:
            return True
        held = self._held[instance_id]
        held.difference_update(array("Q", went))
        held.update(array("Q", came)[: max(0, self._max_blocks - len(held))])
        self._sequence[instance_id] = sequence
        return True

    def forget(self, instance_id: str) -> None:
        """Drop what is known of an instance. Does nothing if nothing is."""
        self._held.pop(instance_id, None)
        self._sequence.pop(instance_id, None)

    def match(self, block_hashes: Sequence[bytes], instance_ids: Collection[str]) -> dict[str, int]:
        """Returns: for each of these instances that holds a prefix, how many of the first blocks; log2 of their number are looked up."""
        matches: dict[str, int] = {}
        for instance_id in instance_ids if block_hashes else ():
            held = self._held.get(instance_id)
            if held is not None and key_of(block_hashes[0]) in held:
                is_missing = partial(_is_missing, held)
                matches[instance_id] = bisect_left(block_hashes, True, lo=1, key=is_missing)
        return matches


def _is_missing(held: set[int], block_hash: bytes) -> bool:
    return key_of(block_hash) not in held
