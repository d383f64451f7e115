"""Where each KV byte of a pool lies; shared by the model, which fills blocks, and the transfer, which moves them.

Per layer the pool is `[num_blocks, 2, num_kv_heads, block_size, head_dim]`: K and V of one block in one layer are one contiguous
piece, and heads are outermost inside it, so that a tensor-parallel slice of K or of V is contiguous too.

Tensor parallel: each rank's pool has a shard of the KV heads. Prefill and decode may have different numbers of ranks: `share_heads` says
which rank sends which parts of its blocks to which, each byte once; a transfer then moves parts instead of blocks (`KVLayout.cut`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import gcd
from typing import Any

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3": 1}


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Shape and element type of one instance's KV pool, or of one of its ranks'."""

    num_layers: int
    num_blocks: int
    num_kv_heads: int  #: in this pool
    block_size: int
    head_dim: int
    dtype: str
    first_kv_head: int = 0  #: of the model's, where this pool is one rank's
    total_kv_heads: int = 0  #: of the model; 0: all are in this pool
    parts: int = 1  #: equal pieces that each block is cut into; num_blocks counts them
    rank: int = 0  #: whose pool it is ...
    num_ranks: int = 1  #: ... of how many

    @property
    def block_bytes(self) -> int:
        """Bytes of one block (or part of one) in one layer, K and V."""
        return 2 * self.num_kv_heads * self.block_size * self.head_dim * ITEM_BYTES[self.dtype] // self.parts

    @property
    def model_kv_heads(self) -> int:
        """KV heads of the model in all ranks' pools."""
        return self.total_kv_heads or self.num_kv_heads

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer's blocks."""
        return self.num_blocks * self.block_bytes

    @property
    def pool_bytes(self) -> int:
        """Bytes of the whole pool."""
        return self.num_layers * self.layer_bytes

    def offset(self, layer: int, block_id: int) -> int:
        """Returns: byte offset of a block in a layer from the pool's start.

        Raises: IndexError: no such layer or block.
        """
        if not (0 <= layer < self.num_layers and 0 <= block_id < self.num_blocks):
            raise IndexError(
                f"layer {layer}, block {block_id} is outside {self.num_layers} layers of {self.num_blocks} blocks"
            )
        return layer * self.layer_bytes + block_id * self.block_bytes

    def cut(self, parts: int) -> KVLayout:
        """Returns: the same pool with each block cut into equal parts: part p of block b has the number b * parts + p.

        Raises: ValueError: they would not be equal.
        """
        if parts < 1 or self.block_bytes % parts:
            raise ValueError(f"a block of {self.block_bytes} bytes cannot be cut into {parts} parts")
        return replace(self, num_blocks=self.num_blocks * parts, parts=self.parts * parts)

    def to_wire(self) -> dict[str, Any]:
        """Returns: plain values for a descriptor or a member record."""
        return asdict(self)

    def differences(self, other: KVLayout) -> list[str]:
        """What keeps two pools from exchanging blocks; num_blocks may differ.

        Returns: one "field: ours != theirs" a difference; empty when they fit.
        """
        names = ("num_layers", "model_kv_heads", "block_size", "head_dim", "dtype")
        found = [
            f"{n}: {getattr(self, n)} != {getattr(other, n)}" for n in names if getattr(self, n) != getattr(other, n)
        ]
        if not found and not _common_heads(self, other):
            found = [f"first_kv_head: {self.first_kv_head} != {other.first_kv_head}, and no head is in both pools"]
        return found


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank sends to another: these parts of each of its blocks to those of the other's."""

    source_rank: int
    target_rank: int
    source_parts: int  #: that a block of the source is cut into; equal in bytes to ...
    target_parts: int  #: ... those of the target
    source_index: tuple[int, ...]  #: which of the source's go ...
    target_index: tuple[int, ...]  #: ... where in the target's

    def source_ids(self, block_ids: Sequence[int]) -> list[int]:
        """Returns: [n * len(source_index)] numbers of parts."""
        return [block_id * self.source_parts + part for block_id in block_ids for part in self.source_index]

    def target_ids(self, block_ids: Sequence[int]) -> list[int]:
        """Returns: [n * len(target_index)] numbers of parts."""
        return [block_id * self.target_parts + part for block_id in block_ids for part in self.target_index]


def shard(layout: KVLayout, rank: int, num_ranks: int) -> KVLayout:
    """Returns: one rank's part of a whole model's layout; where there are more ranks than heads, several have the same head.

    Raises: ValueError: the heads cannot be dealt out evenly.
    """
    heads = layout.num_kv_heads
    if heads % num_ranks and num_ranks % heads:
        raise ValueError(f"{heads} KV heads cannot be dealt out to {num_ranks} ranks")
    count = max(1, heads // num_ranks)
    first = rank * heads // num_ranks
    return replace(
        layout, num_kv_heads=count, first_kv_head=first, total_kv_heads=heads, rank=rank, num_ranks=num_ranks
    )


def share_heads(sources: Sequence[KVLayout], targets: Sequence[KVLayout]) -> list[Share]:
    """Who sends what between ranks of two instances: every head of every target once, from a source that has it.

    Args:
        sources, targets: each rank's layout.
    Raises: ValueError: a target's head is in no source.
    """
    shares = []
    for target_rank, target in enumerate(targets):
        first, stop = target.first_kv_head, target.first_kv_head + target.num_kv_heads
        while first < stop:
            holders = [
                rank
                for rank, source in enumerate(sources)
                if source.first_kv_head <= first < source.first_kv_head + source.num_kv_heads
            ]
            if not holders:
                raise ValueError(f"KV head {first} of target rank {target_rank} is in no source rank's pool")
            rank = holders[target_rank % len(holders)]  # ranks that have the same heads take turns
            source = sources[rank]
            end = min(stop, source.first_kv_head + source.num_kv_heads)
            shares.append(_share(rank, source, target_rank, target, range(first, end)))
            first = end
    return shares


def whole(layout: KVLayout) -> KVLayout:
    """Returns: the layout of a pool that holds all of the model's heads, where this one may be a rank's."""
    return replace(layout, num_kv_heads=layout.model_kv_heads, first_kv_head=0, total_kv_heads=0, rank=0, num_ranks=1)


def _common_heads(one: KVLayout, other: KVLayout) -> range:
    first = max(one.first_kv_head, other.first_kv_head)
    return range(first, min(one.first_kv_head + one.num_kv_heads, other.first_kv_head + other.num_kv_heads))


def _share(source_rank: int, source: KVLayout, target_rank: int, target: KVLayout, heads: range) -> Share:
    """A part is as many heads of K, or of V, as fit evenly into both pools and into what is sent; whole blocks where nothing is cut."""
    starts = heads[0] - source.first_kv_head, heads[0] - target.first_kv_head
    if len(heads) == source.num_kv_heads == target.num_kv_heads:
        return Share(source_rank, target_rank, 1, 1, (0,), (0,))
    size = gcd(source.num_kv_heads, target.num_kv_heads, len(heads), *starts)

    def index(start: int, num_heads: int) -> tuple[int, ...]:
        each = num_heads // size
        return tuple(k_or_v * each + start // size + i for k_or_v in (0, 1) for i in range(len(heads) // size))

    return Share(
        source_rank,
        target_rank,
        2 * source.num_kv_heads // size,
        2 * target.num_kv_heads // size,
        index(starts[0], source.num_kv_heads),
        index(starts[1], target.num_kv_heads),
    )
