"""The operations a decoder is written in. Each backend implements this small set; tensors are the backend's own.

A sequence never reads another's bytes, not even masked ones (0 * NaN is NaN): tables are padded with the sequence's own first
block, and a block is cleared before its first tokens are written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from fastdeploy_pd.core.layout import KVLayout
from fastdeploy_pd.model.weights import DummyTensor, RawTensor

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


@dataclass(frozen=True, slots=True)
class StepInputs:
    """All that a step's computation depends on besides weights and the pool."""

    token_ids: np.ndarray  #: [n] int64, all sequences' new tokens one after the other
    positions: np.ndarray  #: [n] int64, each token's place in its sequence
    logit_rows: np.ndarray  #: [m] int64, the rows whose logits are wanted
    plan: AttentionPlan
    sources: np.ndarray | None = None
    """[n] int64, rows of the last step's logits: the token chosen there takes this row's place, as only the device knows it yet;
    -1: token_ids has it. None: they are all known."""


class Ops(Protocol):
    """What a backend offers. Shapes in brackets; `n` is the number of packed tokens of a step.

    One object serves one KV pool: `cache` and `rope` are called before any `prepare`.
    """

    name: str
    num_loaders: int  #: threads that make weights at once

    def weight(self, *parts: RawTensor | DummyTensor | np.ndarray) -> Tensor:
        """Returns: parts [rows, ...] one below the other, in the compute type."""
        ...

    def cache(self, pool: Any, layout: KVLayout) -> list[Tensor]:
        """
        Args:
            pool: [layout.pool_bytes] uint8, where this backend computes: an array, or a GPU's memory with a CUDA array interface.
        Returns: one object a layer over its blocks, [num_blocks, 2, num_kv_heads, block_size, head_dim]: views of the pool's bytes.

        Raises: ConfigError: the backend cannot keep K and V in layout.dtype.
        """
        ...

    def rope(self, frequencies: np.ndarray, max_positions: int) -> None:
        """Say how Q and K are turned: frequencies [head_dim / 2] float64 times a token's position, below max_positions."""
        ...

    def prepare(self, inputs: StepInputs) -> Any:
        """Returns: a step in whatever form this backend's operations like; made once a step."""
        ...

    def embedding(self, table: Tensor, step: Any) -> Tensor:
        """-> [n, hidden]."""
        ...

    def norm_linear(self, x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Root-mean-square norm of x [n, in] times norm [in], times weight [out, in] transposed, plus bias [out]."""
        ...

    def norm_swiglu(self, x: Tensor, norm: Tensor, eps: float, gate_up: Tensor) -> Tensor:
        """norm_linear with gate_up [2 * k, in], then silu of the first half times the second: [n, k]."""
        ...

    def linear_add(self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        """residual [n, out] + x [n, in] times weight [out, in] transposed, plus bias [out]. The residual's memory may be reused.

        Args:
            residual: None: nothing is added, because another rank adds it.
        """
        ...

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x, in x's memory; x itself where there is one rank. Queued like the rest: nothing waits in it."""
        ...

    def rotate_and_store(self, qkv: Tensor, norm: Tensor | None, eps: float, cache: Tensor, step: Any) -> Tensor:
        """Norm and turn Q and K, put K and V into their blocks; they are in the pool's bytes when all that is queued is done.

        Args:
            qkv: [n, (num_heads + 2 * num_kv_heads) * head_dim].
            norm: [num_heads + num_kv_heads, head_dim] weights of Q's and K's norm, or None.
        Returns: Q, in whatever form `attention` takes it. Pairs that are turned are (i, i + head_dim / 2), as in Hugging Face's checkpoints.
        """
        ...

    def attention(self, q: Tensor, cache: Tensor, step: Any) -> Tensor:
        """Causal attention of `rotate_and_store`'s Q over the blocks -> [n, num_heads * head_dim]."""
        ...

    def logits(self, x: Tensor, norm: Tensor, eps: float, head: Tensor, step: Any) -> Tensor:
        """norm_linear of the rows whose logits are wanted: [m, vocab_size]."""
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
