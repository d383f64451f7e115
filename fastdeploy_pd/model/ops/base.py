"""The operations a decoder is written in. Each backend implements this small set; tensors are the backend's own.

A sequence never reads another's bytes, not even masked ones (0 * NaN is NaN): tables are padded with the sequence's own first
block, and a block is cleared before its first tokens are written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from fastdeploy_pd.core.layout import KVLayout

Tensor = Any


@dataclass(frozen=True, slots=True)
class PromptSpan:
    """A sequence with several new tokens in this step."""

    row: int  #: its first row among the packed tokens
    num_tokens: int
    start: int  #: position of its first new token
    block_ids: np.ndarray  #: [ceil((start + num_tokens) / block_size)] int64


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Sequences of similar length with one new token each, attended to together."""

    rows: np.ndarray  #: [num_sequences] int64, rising rows among the packed tokens
    tables: np.ndarray  #: [num_sequences, max_blocks] int64, padded with the sequence's own first block
    lengths: np.ndarray  #: [num_sequences] int64, tokens to attend to


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Where the K and V of a step's tokens go, and what each token attends to."""

    block_ids: np.ndarray  #: [num_tokens] int64, block of each new token
    offsets: np.ndarray  #: [num_tokens] int64, its place in the block
    fresh_blocks: np.ndarray  #: int64, blocks begun but not filled by this step: cleared first
    spans: list[PromptSpan]
    groups: list[DecodeGroup]


def head_rows(block_ids: np.ndarray, num_kv_heads: int) -> tuple[np.ndarray, np.ndarray]:
    """Where blocks' K and V lie in a layer seen as [num_blocks * 2 * num_kv_heads, block_size * head_dim].

    Gathering such rows, a head of a block each, yields K and V in attention's order without a transposition.

    Args:
        block_ids: [..., num_blocks_of_sequence] int64.
    Returns: rows of K, rows of V, [..., num_kv_heads, num_blocks_of_sequence] int64 each.
    """
    keys = block_ids[..., None, :] * (2 * num_kv_heads) + np.arange(num_kv_heads)[:, None]
    return keys, keys + num_kv_heads


class Ops(Protocol):
    """What a backend offers. Shapes in brackets; `n` is the number of packed tokens of a step.

    One object serves one KV pool: `cache` is called before any `plan`.
    """

    name: str

    def weight(self, array: np.ndarray) -> Tensor:
        """Returns: a float32 array in the compute type."""
        ...

    def cache(self, pool: Any, layout: KVLayout) -> list[Tensor]:
        """
        Args:
            pool: [layout.pool_bytes] uint8, where this backend computes: an array, or a GPU's memory with a CUDA array interface.
        Returns: one object a layer over its blocks, [num_blocks, 2, num_kv_heads, block_size, head_dim]: views of the pool's bytes.

        Raises: ConfigError: the backend cannot keep K and V in layout.dtype.
        """
        ...

    def mark(self) -> Any:
        """Returns: the present end of what is queued, for `wait`; None: nothing is ever queued, it is done already."""
        ...

    def wait(self, mark: Any) -> None:
        """Return when everything before the mark is done."""
        ...

    def plan(self, plan: AttentionPlan) -> Any:
        """Returns: the plan in whatever form this backend's `write_kv` and `attention` like; made once a step."""
        ...

    def embedding(self, table: Tensor, token_ids: np.ndarray) -> Tensor:
        """[n] ids -> [n, hidden]."""
        ...

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [n, in] times weight [out, in] transposed, plus bias [out]."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Root-mean-square norm over the last dimension, times weight (of x's last dimension, or of its last two)."""
        ...

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """[n, 2 * k] -> [n, k]: silu of the first half times the second."""
        ...

    def heads(self, x: Tensor, head_dim: int) -> Tensor:
        """[n, heads * head_dim] -> [n, heads, head_dim]."""
        ...

    def split_heads(self, x: Tensor, sizes: tuple[int, ...]) -> list[Tensor]:
        """[n, sum(sizes), head_dim] -> one [n, size, head_dim] each."""
        ...

    def rotation(self, angles: np.ndarray, num_heads: int) -> Any:
        """What `rotary` needs for num_heads heads at angles [n, head_dim / 2] float64; made once a step."""
        ...

    def rotary(self, x: Tensor, rotation: Any) -> Tensor:
        """Rotate [n, heads, head_dim]; pairs are (i, i + head_dim / 2), the convention of Hugging Face's checkpoints."""
        ...

    def rows(self, table: Tensor, indices: np.ndarray) -> Tensor:
        """table[indices]."""
        ...

    def write_kv(self, cache: Tensor, plan: Any, k: Tensor, v: Tensor) -> None:
        """Put K and V [n, num_kv_heads, head_dim] into their blocks; visible in the pool's bytes on return."""
        ...

    def attention(self, q: Tensor, cache: Tensor, plan: Any) -> Tensor:
        """Causal attention of [n, heads, head_dim] over the blocks -> [n, heads * head_dim]."""
        ...

    def to_numpy(self, x: Tensor) -> np.ndarray:
        """Returns: float32 values."""
        ...


def signed_tables(angles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tables with which a rotation is x * cos + (x with its halves swapped) * sin.

    Args:
        angles: [n, head_dim / 2].
    Returns: cos, sin, [n, head_dim] each; sin is negative in the first half.
    """
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([cos, cos], axis=-1), np.concatenate([-sin, sin], axis=-1)


def tile_rows(num_heads: int, num_keys: int, most: int) -> int:
    """Query rows to attend to at once, so that the scores stay within a few megabytes whatever the context.

    Returns: between 16 and `most`.
    """
    return max(16, min(most, 2**21 // (num_heads * num_keys)))
