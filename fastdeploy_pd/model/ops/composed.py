"""The decoder's operations out of smaller ones, for backends without kernels of their own for them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastdeploy_pd.core.layout import KVLayout
from fastdeploy_pd.model.ops.base import AttentionPlan, StepInputs, Tensor
from fastdeploy_pd.model.weights import DummyTensor, RawTensor


@dataclass(slots=True)
class Step:
    """What `prepare` gives."""

    inputs: StepInputs
    plan: Any
    rotation: Any


def to_float32(*parts: RawTensor | DummyTensor | np.ndarray) -> np.ndarray:
    """Returns: parts of a weight, one below the other."""
    arrays = [part if isinstance(part, np.ndarray) else part.to_float32() for part in parts]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


class ComposedOps(ABC):
    """See `base.Ops` for what is not abstract here. `plan` is in whatever form the backend's `plan` gives it."""

    num_loaders = 1
    _layout: KVLayout

    @abstractmethod
    def plan(self, plan: AttentionPlan) -> Any:
        """Returns: the plan in whatever form this backend's `write_kv` and `attend` like; made once a step."""

    @abstractmethod
    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [n, in] times weight [out, in] transposed, plus bias [out]."""

    @abstractmethod
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Root-mean-square norm over the last dimension, times weight (of x's last dimension, or of its last two)."""

    @abstractmethod
    def swiglu(self, gate_up: Tensor) -> Tensor:
        """[n, 2 * k] -> [n, k]: silu of the first half times the second."""

    @abstractmethod
    def heads(self, x: Tensor, head_dim: int) -> Tensor:
        """[n, heads * head_dim] -> [n, heads, head_dim]."""

    @abstractmethod
    def split_heads(self, x: Tensor, sizes: tuple[int, ...]) -> list[Tensor]:
        """[n, sum(sizes), head_dim] -> one [n, size, head_dim] each."""

    @abstractmethod
    def rotation(self, angles: np.ndarray) -> Any:
        """What `rotary` needs at angles [n, head_dim / 2] float64; made once a step."""

    @abstractmethod
    def rotary(self, x: Tensor, rotation: Any) -> Tensor:
        """Rotate [n, heads, head_dim]; pairs are (i, i + head_dim / 2)."""

    @abstractmethod
    def rows(self, table: Tensor, indices: np.ndarray) -> Tensor:
        """table[indices]."""

    @abstractmethod
    def write_kv(self, cache: Tensor, plan: Any, k: Tensor, v: Tensor) -> None:
        """Put K and V [n, num_kv_heads, head_dim] into their blocks; visible in the pool's bytes on return."""

    @abstractmethod
    def attend(self, q: Tensor, cache: Tensor, plan: Any) -> Tensor:
        """Causal attention of [n, heads, head_dim] over the blocks -> [n, heads * head_dim]."""

    def rope(self, frequencies: np.ndarray, max_positions: int) -> None:
        """See base."""
        self._frequencies = frequencies

    def prepare(self, inputs: StepInputs) -> Any:
        """See base."""
        if inputs.sources is not None:
            raise ValueError("this backend's tokens are known to the CPU at once; sources must be None")
        angles = np.outer(inputs.positions, self._frequencies)
        return Step(inputs, self.plan(inputs.plan), self.rotation(angles))

    def embedding(self, table: Tensor, step: Any) -> Tensor:
        """See base."""
        return self.rows(table, step.inputs.token_ids)

    def norm_linear(self, x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """See base."""
        return self.linear(self.rms_norm(x, norm, eps), weight, bias)

    def norm_swiglu(self, x: Tensor, norm: Tensor, eps: float, gate_up: Tensor) -> Tensor:
        """See base."""
        return self.swiglu(self.norm_linear(x, norm, eps, gate_up))

    def linear_add(self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        """See base."""
        product = self.linear(x, weight, bias)
        return product if residual is None else residual + product

    def all_reduce(self, x: Tensor) -> Tensor:
        """See base: one rank, unless a backend says otherwise."""
        return x

    def rotate_and_store(self, qkv: Tensor, norm: Tensor | None, eps: float, cache: Tensor, step: Any) -> Tensor:
        """See base. Q and K are normed and turned together."""
        num_kv_heads = self._layout.num_kv_heads
        heads = self.heads(qkv, self._layout.head_dim)
        num_heads = heads.shape[1] - 2 * num_kv_heads
        qk, v = self.split_heads(heads, (num_heads + num_kv_heads, num_kv_heads))
        if norm is not None:
            qk = self.rms_norm(qk, norm, eps)
        q, k = self.split_heads(self.rotary(qk, step.rotation), (num_heads, num_kv_heads))
        self.write_kv(cache, step.plan, k, v)
        return q

    def attention(self, q: Tensor, cache: Tensor, step: Any) -> Tensor:
        """See base."""
        return self.attend(q, cache, step.plan)

    def logits(self, x: Tensor, norm: Tensor, eps: float, head: Tensor, step: Any) -> Tensor:
        """See base."""
        return self.norm_linear(self.rows(x, step.inputs.logit_rows), norm, eps, head)
