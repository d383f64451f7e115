"""The operations a decoder is written in. Each backend implements this small set; tensors are the backend's own."""

from __future__ import annotations

from dataclasses import dataclass, field
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
class AttentionPlan:
    """Where the K and V of a step's tokens go, and what each token attends to."""

    block_ids: np.ndarray  #: [num_tokens] int64, block of each new token
    offsets: np.ndarray  #: [num_tokens] int64, its place in the block
    positions: np.ndarray  #: [num_tokens] int64
    spans: list[PromptSpan] = field(default_factory=list)
    single_rows: np.ndarray = field(
        default_factory=lambda: np.zeros(0, np.int64)
    )  #: [num_single] rows of one-token sequences
    single_tables: np.ndarray = field(
        default_factory=lambda: np.zeros((0, 0), np.int64)
    )  #: [num_single, max_blocks] padded with 0
    single_lengths: np.ndarray = field(
        default_factory=lambda: np.zeros(0, np.int64)
    )  #: [num_single] tokens to attend to


class Ops(Protocol):
    """What a backend offers. Shapes in brackets; `n` is the number of packed tokens of a step."""

    name: str

    def weight(self, array: np.ndarray) -> Tensor:
        """Returns: a float32 array in the compute type."""
        ...

    def cache(self, pool: np.ndarray, layout: KVLayout) -> list[Tensor]:
        """Returns: a layer's blocks each, [num_blocks, 2, num_kv_heads, block_size, head_dim], as views of the pool's bytes."""
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
        """Root-mean-square norm over the last dimension."""
        ...

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """[n, 2 * k] -> [n, k]: silu of the first half times the second."""
        ...

    def split_heads(self, x: Tensor, sizes: tuple[int, ...], head_dim: int) -> list[Tensor]:
        """[n, sum(sizes) * head_dim] -> one [n, size, head_dim] each."""
        ...

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate [n, heads, head_dim] by cos, sin [n, 1, head_dim / 2]; halves convention of the Hugging Face checkpoints."""
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
