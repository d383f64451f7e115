"""Where each KV byte of a pool lies; shared by the model, which fills blocks, and the transfer, which moves them.

Per layer the pool is `[num_blocks, 2, num_kv_heads, block_size, head_dim]`: K and V of one block in one layer are one contiguous
piece, and heads are outermost inside it, so that a tensor-parallel slice of a block is contiguous too.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Shape and element type of one instance's KV pool."""

    num_layers: int
    num_blocks: int
    num_kv_heads: int
    block_size: int
    head_dim: int
    dtype: str

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in one layer, K and V."""
        return 2 * self.num_kv_heads * self.block_size * self.head_dim * ITEM_BYTES[self.dtype]

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

    def to_wire(self) -> dict[str, Any]:
        """Returns: plain values for a descriptor or a member record."""
        return asdict(self)

    def differences(self, other: KVLayout) -> list[str]:
        """What keeps two pools from exchanging blocks; num_blocks may differ.

        Returns: one "field: ours != theirs" a difference; empty when they fit.
        """
        names = ("num_layers", "num_kv_heads", "block_size", "head_dim", "dtype")
        return [
            f"{n}: {getattr(self, n)} != {getattr(other, n)}" for n in names if getattr(self, n) != getattr(other, n)
        ]
