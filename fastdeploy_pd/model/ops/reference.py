"""The oracle: every operation in NumPy float64, sequence by sequence, written for reading rather than for speed."""

# NumPy's operators on arrays of any type.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import numpy as np

from fastdeploy_pd.core.layout import KVLayout
from fastdeploy_pd.errors import ConfigError
from fastdeploy_pd.model.ops.base import AttentionPlan
from fastdeploy_pd.model.ops.composed import ComposedOps, to_float32
from fastdeploy_pd.model.weights import DummyTensor, RawTensor

KV_TYPES = ("float32", "float16")


def numpy_cache(pool: np.ndarray, layout: KVLayout) -> list[np.ndarray]:
    """Returns: the pool's layers as [num_blocks, 2, num_kv_heads, block_size, head_dim] views of its bytes.

    Raises: ConfigError: the layout's dtype is not one NumPy has.
    """
    if layout.dtype not in KV_TYPES:
        raise ConfigError(f"KV dtype is {layout.dtype!r}; without --ops torch it must be one of {', '.join(KV_TYPES)}")
    shape = (layout.num_layers, layout.num_blocks, 2, layout.num_kv_heads, layout.block_size, layout.head_dim)
    return list(pool.view(layout.dtype).reshape(shape))


class ReferenceOps(ComposedOps):
    """See `base.Ops`."""

    name = "reference"

    def weight(self, *parts: RawTensor | DummyTensor | np.ndarray) -> np.ndarray:
        """See base."""
        return to_float32(*parts).astype(np.float64)

    def cache(self, pool: np.ndarray, layout: KVLayout) -> list[np.ndarray]:
        """See base."""
        self._layout = layout
        return numpy_cache(pool, layout)

    def plan(self, plan: AttentionPlan) -> AttentionPlan:
        """See composed."""
        return plan

    def linear(self, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
        """See composed."""
        y = x @ weight.T
        return y if bias is None else y + bias

    def rms_norm(self, x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
        """See composed."""
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight

    def swiglu(self, gate_up: np.ndarray) -> np.ndarray:
        """See composed."""
        gate, up = np.split(gate_up, 2, axis=-1)
        return gate / (1.0 + np.exp(-gate)) * up

    def heads(self, x: np.ndarray, head_dim: int) -> np.ndarray:
        """See composed."""
        return x.reshape(x.shape[0], -1, head_dim)

    def split_heads(self, x: np.ndarray, sizes: tuple[int, ...]) -> list[np.ndarray]:
        """See composed."""
        return np.split(x, np.cumsum(sizes)[:-1], axis=1)

    def rotation(self, angles: np.ndarray) -> np.ndarray:
        """See composed."""
        return np.exp(1j * angles)[:, None, :]

    def rotary(self, x: np.ndarray, rotation: np.ndarray) -> np.ndarray:
        """See composed. A pair of dimensions is a complex number; turning it is multiplying it."""
        first, second = np.split(x, 2, axis=-1)
        turned = (first + 1j * second) * rotation
        return np.concatenate([turned.real, turned.imag], axis=-1)

    def rows(self, table: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """See composed."""
        return table[indices]

    def write_kv(self, cache: np.ndarray, plan: AttentionPlan, k: np.ndarray, v: np.ndarray) -> None:
        """See composed."""
        cache[plan.fresh_blocks] = 0
        cache[plan.block_ids, 0, :, plan.offsets] = k
        cache[plan.block_ids, 1, :, plan.offsets] = v

    def attend(self, q: np.ndarray, cache: np.ndarray, plan: AttentionPlan) -> np.ndarray:
        """See composed."""
        out = np.empty((q.shape[0], q.shape[1] * q.shape[2]))
        for span in plan.spans:
            rows = slice(span.row, span.row + span.num_tokens)
            out[rows] = self._attend(q[rows], cache, span.block_ids, span.start)
        for group in plan.groups:
            for row, table, length in zip(group.rows, group.tables, group.lengths, strict=True):
                out[row] = self._attend(q[row : row + 1], cache, table, int(length) - 1)[0]
        return out

    def _attend(self, q: np.ndarray, cache: np.ndarray, block_ids: np.ndarray, start: int) -> np.ndarray:
        num_tokens, num_heads, head_dim = q.shape
        stop, num_kv_heads = start + num_tokens, cache.shape[2]
        blocks = cache[block_ids].astype(np.float64)  # [blocks, 2, kv_heads, block_size, head_dim]
        keys, values = (
            blocks[:, i].transpose(1, 0, 2, 3).reshape(num_kv_heads, -1, head_dim)[:, :stop] for i in (0, 1)
        )
        grouped = q.reshape(num_tokens, num_kv_heads, num_heads // num_kv_heads, head_dim)
        scores = np.einsum("nkgd,ktd->kgnt", grouped, keys) / np.sqrt(head_dim)
        is_future = np.arange(stop)[None, :] > np.arange(start, stop)[:, None]
        scores = np.where(is_future, -np.inf, scores)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        return np.einsum("kgnt,ktd->nkgd", weights, values).reshape(num_tokens, -1)

    def to_numpy(self, x: np.ndarray) -> np.ndarray:
        """See base."""
        return x.astype(np.float32)
