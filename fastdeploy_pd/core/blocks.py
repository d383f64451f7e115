"""The KV blocks of one instance: who holds which, which full ones can be found again by their content, which go first.

A block is free (nobody holds it; its content may still be findable), or held `ref_count` times: by requests that share it as a
prefix and by transfers that still read or may write it. Free blocks are reused in the order in which they became free, so
findable content stays as long as possible. A full block's hash covers the hash of the block before it, so equal hashes mean equal
whole prefixes; the chain starts with the salt, so requests with different salts never share blocks.
Source: Kwon et al., SOSP 2023, PagedAttention; chained hashes as in vLLM's automatic prefix caching.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Any, Protocol

from fastdeploy_pd.core.prefix_index import HeldBlocks
from fastdeploy_pd.errors import OutOfBlocks

HASH_BYTES = 16  # 128 bits: no two prefixes of a cluster's life collide (birthday bound 2^64)


def root_hash(salt: str) -> bytes:
    """Returns: [HASH_BYTES] the hash every chain of this salt starts from."""
    return blake2b(salt.encode(), digest_size=HASH_BYTES, person=b"fd-prefix").digest()


def chain_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Returns: [HASH_BYTES] hash of a full block with these tokens after the prefix whose hash is `parent`."""
    return blake2b(parent + array("I", token_ids).tobytes(), digest_size=HASH_BYTES).digest()


def extend_hashes(hashes: list[bytes], token_ids: Sequence[int], block_size: int, salt: str) -> None:
    """Append the hashes of the full blocks that `hashes` lacks.

    Args:
        hashes: hashes of the first len(hashes) blocks; extended in place.
        token_ids: the request's tokens behind these blocks.
        block_size: tokens a block.
        salt: start of the chain.
    """
    parent = hashes[-1] if hashes else root_hash(salt)
    tokens = array("I", token_ids)
    for start in range(0, len(tokens) - block_size + 1, block_size):
        parent = chain_hash(parent, tokens[start : start + block_size])
        hashes.append(parent)


@lru_cache(maxsize=1)
def _numbers(num_blocks: int) -> tuple[int, ...]:
    """Returns: the block ids, the last first; pools of one size share them, which keeps thousands of simulated ones small."""
    return tuple(range(num_blocks - 1, -1, -1))


@dataclass(frozen=True, slots=True)
class BlockCounts:
    """How many blocks are in which state; free + held is always the pool's size."""

    free: int  #: nobody holds them (cached ones included)
    held: int  #: held by a request or a transfer
    cached: int  #: findable by hash, free or held


class LowerTier(Protocol):
    """Slower memory behind a pool. A findable block is in one of the two: it goes down when the pool reuses it, and up when it is found."""

    def save(self, block_ids: Sequence[int], hashes: Sequence[bytes]) -> list[bytes]:
        """Copy blocks out of the pool. Returns: hashes of these and of earlier blocks that can't be found here (any more)."""
        ...

    def take(self, hashes: Sequence[bytes]) -> Sequence[Any]:
        """Returns: the longest run of these blocks from the first on, taken out: `load` gets them next."""
        ...

    def load(self, taken: Sequence[Any], block_ids: Sequence[int]) -> int:
        """Copy what was taken into the pool. Returns: how many of the first ones came back as they were."""
        ...

    def drop(self, block_hash: bytes) -> None:
        """Forget a block. Does nothing if it is not here."""
        ...

    def hashes(self) -> list[bytes]:
        """Returns: of all blocks that are here."""
        ...


class BlockPool:
    """Allocates, shares, finds and evicts the blocks of one pool."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        """Raises: ValueError: a size is not positive."""
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks={num_blocks} and block_size={block_size} must be positive")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._ref_counts = [0] * num_blocks
        # Free blocks are in one of two: content nobody can ask for is given up first, the rest in the order of becoming free.
        self._unused = list(_numbers(num_blocks))  # the next to take last
        self._kept: deque[int] = deque()  # the next to take first; also where blocks were that are held again since
        self._outdated: dict[
            int, int
        ] = {}  # block id -> how many of its entries in _kept, the first ones, count no more
        self._num_outdated = 0  # in sum
        self._hash_of: list[bytes | None] = [None] * num_blocks  # of the findable ones
        self._block_of: dict[bytes, int] = {}
        self.listener: HeldBlocks | None = None  #: is told what can be found
        self.lower: LowerTier | None = None  #: where findable blocks go that are reused

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` could hand out now."""
        return len(self._unused) + len(self._kept) - self._num_outdated

    def counts(self) -> BlockCounts:
        """Returns: the numbers behind the metrics and the leak tests."""
        return BlockCounts(free=self.num_free, held=self.num_blocks - self.num_free, cached=len(self._block_of))

    def num_blocks_for(self, num_tokens: int) -> int:
        """Returns: blocks that num_tokens take."""
        return -(-num_tokens // self.block_size)

    def allocate(self, num_blocks: int) -> list[int]:
        """Take free blocks, the longest unused first; what they held can't be found any more.

        Returns: [num_blocks] block ids, each held once.
        Raises: OutOfBlocks: fewer are free; nothing has changed then.
        """
        if num_blocks > self.num_free:
            raise OutOfBlocks(f"{num_blocks} KV blocks are needed, {self.num_free} of {self.num_blocks} are free")
        unused, ref_counts = self._unused, self._ref_counts
        taken = unused[-num_blocks:][::-1] if num_blocks > 0 else []
        del unused[len(unused) - len(taken) :]
        if len(taken) < num_blocks:
            kept = self._take_kept(num_blocks - len(taken))
            if self.lower is not None:
                self._move_down(kept, self.lower)
            self.forget(kept)
            taken += kept
        for block_id in taken:
            ref_counts[block_id] = 1
        return taken

    def _take_kept(self, num_blocks: int) -> list[int]:
        """Returns: [num_blocks] free blocks taken out of _kept, which has as many."""
        take_oldest, outdated = self._kept.popleft, self._outdated
        taken: list[int] = []
        while len(taken) < num_blocks:
            block_id = take_oldest()
            count = outdated.get(block_id)
            if count is None:
                taken.append(block_id)
                continue
            self._num_outdated -= 1
            if count > 1:
                outdated[block_id] = count - 1
            else:
                del outdated[block_id]
        return taken

    def allocate_filled(self, num_blocks: int, hashes: Sequence[bytes]) -> tuple[list[int], int]:
        """As `allocate`, and bring back from the lower tier what it has of these blocks.

        Args:
            hashes: [at most num_blocks] of the first of them.
        Returns: block ids, and how many of the first hold their content and are findable. Raises: OutOfBlocks: as `allocate`.
        """
        if self.lower is None or num_blocks > self.num_free:
            return self.allocate(num_blocks), 0
        saved = self.lower.take(hashes)  # before `allocate` pushes them out
        taken = self.allocate(num_blocks)
        if not saved:
            return taken, 0
        num_filled = self.lower.load(saved, taken[: len(saved)])
        self.make_findable(taken[:num_filled], hashes[:num_filled])
        self._tell_gone(hashes[num_filled : len(saved)])
        return taken, num_filled

    def _move_down(self, block_ids: Iterable[int], lower: LowerTier) -> None:
        hash_of, block_of = self._hash_of, self._block_of
        moved = [(block_id, block_hash) for block_id in block_ids if (block_hash := hash_of[block_id]) is not None]
        if moved:
            for block_id, block_hash in moved:
                del block_of[block_hash]
                hash_of[block_id] = None
            self._tell_gone(lower.save(*map(list, zip(*moved, strict=True))))

    def _tell_gone(self, hashes: Iterable[bytes]) -> None:
        if self.listener is not None:
            for block_hash in hashes:
                self.listener.gone(block_hash)

    def hold(self, block_ids: Iterable[int]) -> None:
        """Hold blocks once more: a further request shares them, or a transfer reads them.

        Raises: ValueError: one of them is free and its content not findable, so nobody can know what it holds.
        """
        ref_counts, outdated = self._ref_counts, self._outdated
        for block_id in block_ids:
            count = ref_counts[block_id]
            if count == 0:
                if self._hash_of[block_id] is None:
                    raise ValueError(f"block {block_id} is free")
                outdated[block_id] = outdated.get(block_id, 0) + 1
                self._num_outdated += 1
            ref_counts[block_id] = count + 1
        if self._num_outdated > self.num_blocks:
            self._kept = deque(self._take_kept(self.num_free - len(self._unused)))
            outdated.clear()
            self._num_outdated = 0

    def release(self, block_ids: Sequence[int]) -> None:
        """Give up one hold of each block. The last of a table becomes reusable first: prefixes outlive their continuations.

        Raises: ValueError: a block was not held.
        """
        ref_counts, hash_of, forgo, keep = self._ref_counts, self._hash_of, self._unused.append, self._kept.append
        for block_id in reversed(block_ids):
            count = ref_counts[block_id]
            if count == 1:
                ref_counts[block_id] = 0
                if hash_of[block_id] is None:
                    forgo(block_id)
                else:
                    keep(block_id)
            elif count == 0:
                raise ValueError(f"block {block_id} was released more often than held")
            else:
                ref_counts[block_id] = count - 1

    def find_prefix(self, hashes: Sequence[bytes]) -> list[int]:
        """Returns: block ids of the longest findable run of `hashes` from the first on. Holds nothing: see `hold`."""
        block_of, found = self._block_of, []
        for block_hash in hashes:
            if block_hash not in block_of:
                break
            found.append(block_of[block_hash])
        return found

    def num_findable(self, hashes: Sequence[bytes]) -> int:
        """Returns: how many blocks `find_prefix` would find."""
        block_of, count = self._block_of, 0
        for block_hash in hashes:
            if block_hash not in block_of:
                break
            count += 1
        return count

    def num_free_among(self, block_ids: Iterable[int]) -> int:
        """Returns: how many of these blocks are free, i.e. how many free ones `hold` would take."""
        ref_counts = self._ref_counts
        return [ref_counts[block_id] for block_id in block_ids].count(0)

    def make_findable(self, block_ids: Sequence[int], hashes: Sequence[bytes]) -> None:
        """Let full, computed (and, if they were received, verified) blocks be found. The first block with a hash keeps it.

        Raises: ValueError: nobody holds one of them.
        """
        ref_counts, hash_of, block_of = self._ref_counts, self._hash_of, self._block_of
        is_told = self.lower is not None or self.listener is not None
        for block_id, block_hash in zip(block_ids, hashes, strict=True):
            if ref_counts[block_id] == 0:
                raise ValueError(f"block {block_id} is free")
            if hash_of[block_id] is None and block_of.setdefault(block_hash, block_id) == block_id:
                hash_of[block_id] = block_hash
                if is_told:
                    self._tell_found(block_hash)

    def _tell_found(self, block_hash: bytes) -> None:
        if self.lower is not None:
            self.lower.drop(block_hash)
        if self.listener is not None:
            self.listener.found(block_hash)

    def forget(self, block_ids: Iterable[int]) -> None:
        """Make the content of these blocks findable no more; whoever holds them keeps them."""
        hash_of, block_of, is_told = self._hash_of, self._block_of, self.listener is not None
        for block_id in block_ids:
            block_hash = hash_of[block_id]
            if block_hash is not None:
                del block_of[block_hash]
                hash_of[block_id] = None
                if is_told:
                    self._tell_gone([block_hash])

    def forget_all(self) -> None:
        """Make no block findable any more."""
        self.forget(list(self._block_of.values()))
        for block_hash in self.lower.hashes() if self.lower is not None else ():
            self.lower.drop(block_hash)  # type: ignore[union-attr]
            self._tell_gone([block_hash])
