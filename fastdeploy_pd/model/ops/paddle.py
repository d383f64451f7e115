"""The operations in PaddlePaddle, on CPU, in float32: its CPU build has no bfloat16 matrix product, and its fused attention is ten
times slower there than two products and a softmax."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

# Paddle warns about thread settings and compilers at import; neither concerns a server.
os.environ.setdefault("GLOG_minloglevel", "2")
# The MKL inside Paddle takes its slowest path on processors that are not Intel's; this names the AVX2 path (measured on an
# EPYC: 1000x256x1280 in 7.9 instead of 17.6 ms).
_CPU = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
if "AuthenticAMD" in _CPU and " avx2" in _CPU:
    os.environ.setdefault("MKL_DEBUG_CPU_TYPE", "5")

import numpy as np
import paddle
import paddle.nn.functional as functional

from fastdeploy_pd.core.layout import KVLayout
from fastdeploy_pd.model.ops.base import AttentionPlan, PromptSpan
from fastdeploy_pd.model.ops.reference import numpy_cache

QUERY_ROWS = 512  # rows of a prompt attended to at once: bounds the score matrix
NEGATIVE = -1e30  # instead of -inf: a fully masked padding row must not become NaN


@dataclass(slots=True)
class _Cache:
    """One layer's blocks. NumPy gathers and scatters them: Paddle's CPU kernels for strided copies are 30 times slower."""

    array: np.ndarray


@dataclass(slots=True)
class _Plan:
    numpy: AttentionPlan
    single_rows: paddle.Tensor
    single_mask: paddle.Tensor


def _wrap(array: np.ndarray) -> paddle.Tensor:
    """Returns: a tensor over the array's memory, copied only where that is not contiguous."""
    return paddle.utils.dlpack.from_dlpack(np.ascontiguousarray(array).__dlpack__())


class PaddleOps:
    """See `base.Ops`."""

    name = "paddle"

    def __init__(self, num_threads: int | None = None) -> None:
        paddle.set_device("cpu")
        paddle.set_grad_enabled(False)
        self._block_size = 0
        if num_threads is not None:
            paddle.core.set_num_threads(num_threads)

    def weight(self, array: np.ndarray) -> paddle.Tensor:
        """See base. Matrices are transposed once: that is the layout Paddle's product likes."""
        return paddle.to_tensor(np.ascontiguousarray(array, dtype=np.float32))

    def cache(self, pool: np.ndarray, layout: KVLayout) -> list[_Cache]:
        """See base."""
        self._block_size = layout.block_size
        return [_Cache(array) for array in numpy_cache(pool, layout)]

    def plan(self, plan: AttentionPlan) -> _Plan:
        """See base."""
        num_slots = plan.single_tables.shape[1] * self._block_size
        is_past = np.arange(num_slots)[None, :] >= plan.single_lengths[:, None]
        mask = np.where(is_past, np.float32(NEGATIVE), np.float32(0))[:, None, :]
        return _Plan(
            plan,
            paddle.to_tensor(plan.single_rows),
            paddle.to_tensor(mask),
        )

    def embedding(self, table: paddle.Tensor, token_ids: np.ndarray) -> paddle.Tensor:
        """See base."""
        return paddle.gather(table, paddle.to_tensor(token_ids))

    def linear(self, x: paddle.Tensor, weight: paddle.Tensor, bias: paddle.Tensor | None = None) -> paddle.Tensor:
        """See base."""
        y = paddle.matmul(x, weight, transpose_y=True)
        return y if bias is None else y + bias

    def rms_norm(self, x: paddle.Tensor, weight: paddle.Tensor, eps: float) -> paddle.Tensor:
        """See base."""
        return x * paddle.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weight

    def swiglu(self, gate_up: paddle.Tensor) -> paddle.Tensor:
        """See base."""
        gate, up = paddle.chunk(gate_up, 2, axis=-1)
        return functional.silu(gate) * up

    def split_heads(self, x: paddle.Tensor, sizes: tuple[int, ...], head_dim: int) -> list[paddle.Tensor]:
        """See base."""
        return paddle.split(x.reshape([x.shape[0], -1, head_dim]), list(sizes), axis=1)

    def rotary(self, x: paddle.Tensor, cos: paddle.Tensor, sin: paddle.Tensor) -> paddle.Tensor:
        """See base."""
        first, second = paddle.chunk(x, 2, axis=-1)
        return paddle.concat([first * cos - second * sin, second * cos + first * sin], axis=-1)

    def rows(self, table: paddle.Tensor, indices: np.ndarray) -> paddle.Tensor:
        """See base."""
        return paddle.gather(table, paddle.to_tensor(indices))

    def write_kv(self, cache: _Cache, plan: _Plan, k: paddle.Tensor, v: paddle.Tensor) -> None:
        """See base."""
        numpy_plan = plan.numpy
        cache.array[numpy_plan.block_ids, 0, :, numpy_plan.offsets] = k.numpy()
        cache.array[numpy_plan.block_ids, 1, :, numpy_plan.offsets] = v.numpy()

    def attention(self, q: paddle.Tensor, cache: _Cache, plan: _Plan) -> paddle.Tensor:
        """See base."""
        spans = plan.numpy.spans
        if not spans:
            return self._attend_singles(q, cache, plan)
        pieces = [(span.row, self._attend_prompt(q, cache, span)) for span in spans]
        if len(plan.numpy.single_rows) == 0 and len(pieces) == 1:
            return pieces[0][1]
        out = np.empty((q.shape[0], q.shape[1] * q.shape[2]), np.float32)
        for row, piece in pieces:
            out[row : row + piece.shape[0]] = piece.numpy()
        if len(plan.numpy.single_rows):
            singles = self._attend_singles(paddle.gather(q, plan.single_rows), cache, plan)
            out[plan.numpy.single_rows] = singles.numpy()
        return paddle.to_tensor(out)

    def _attend_prompt(self, q: paddle.Tensor, cache: _Cache, span: PromptSpan) -> paddle.Tensor:
        num_heads, head_dim = q.shape[1], q.shape[2]
        num_kv_heads = cache.array.shape[2]
        blocks = cache.array[span.block_ids]  # [blocks, 2, kv_heads, block_size, head_dim]
        keys, values = (blocks[:, i].transpose(1, 0, 2, 3).reshape(num_kv_heads, -1, head_dim) for i in (0, 1))
        pieces = []
        for first in range(0, span.num_tokens, QUERY_ROWS):
            last = min(first + QUERY_ROWS, span.num_tokens)
            num_rows, seen = last - first, span.start + last  # the causal mask makes everything after `seen` invisible
            rows = q[span.row + first : span.row + last].reshape([num_rows, num_kv_heads, -1, head_dim])
            grouped = (rows.transpose([1, 2, 0, 3]) * head_dim**-0.5).reshape([num_kv_heads, -1, head_dim])
            scores = paddle.matmul(grouped, _wrap(keys[:, :seen]), transpose_y=True)
            is_future = np.arange(seen)[None, :] > np.arange(span.start + first, seen)[:, None]
            mask = _wrap(np.where(is_future, np.float32(NEGATIVE), np.float32(0)))
            weights = functional.softmax(scores.reshape([num_heads, num_rows, seen]) + mask, axis=-1)
            attended = paddle.matmul(weights.reshape([num_kv_heads, -1, seen]), _wrap(values[:, :seen]))
            pieces.append(
                attended.reshape([num_heads, num_rows, head_dim]).transpose([1, 0, 2]).reshape([num_rows, -1])
            )
        return pieces[0] if len(pieces) == 1 else paddle.concat(pieces, axis=0)

    def _attend_singles(self, q: paddle.Tensor, cache: _Cache, plan: _Plan) -> paddle.Tensor:
        num_single, num_heads, head_dim = q.shape
        num_kv_heads = cache.array.shape[2]
        blocks = cache.array[plan.numpy.single_tables]  # [single, blocks, 2, kv_heads, block_size, head_dim]
        keys, values = (
            _wrap(blocks[:, :, i].transpose(0, 2, 1, 3, 4).reshape(num_single * num_kv_heads, -1, head_dim))
            for i in (0, 1)
        )
        grouped = q.reshape([num_single * num_kv_heads, num_heads // num_kv_heads, head_dim]) * head_dim**-0.5
        scores = paddle.matmul(grouped, keys, transpose_y=True).reshape([num_single, num_heads, -1])
        weights = functional.softmax(scores + plan.single_mask, axis=-1)
        attended = paddle.matmul(weights.reshape([num_single * num_kv_heads, num_heads // num_kv_heads, -1]), values)
        return attended.reshape([num_single, -1])

    def to_numpy(self, x: paddle.Tensor) -> np.ndarray:
        """See base."""
        return x.numpy()
