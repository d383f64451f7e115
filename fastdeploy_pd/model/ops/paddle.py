"""The operations in PaddlePaddle, on CPU, in float32: its CPU build has no bfloat16 matrix product.

What shapes this file, measured on Paddle 3.3.1: its fused attention is ten times slower on CPU than two products and a softmax;
copying a transposed view costs as much as the products, so K and V are gathered in attention's order; broadcasting over a middle
dimension is 25 times slower than multiplying equal shapes, so masks and rotations are expanded once a step; `to_tensor` takes 11 us and loses
112 bytes a call for ever, a part of a tensor that is there 3 us and none (`_Arrays`). What must be set in the environment before Paddle is
imported: `environment.py`.
"""

# Paddle has few types.
# mypy: disable-error-code="attr-defined, no-any-return, no-untyped-call"

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import paddle
import paddle.nn.functional as functional

from fastdeploy_pd.core.layout import KVLayout
from fastdeploy_pd.model.ops.base import AttentionPlan, DecodeGroup, PromptSpan, head_rows, signed_tables, tile_rows
from fastdeploy_pd.model.ops.composed import ComposedOps, to_float32
from fastdeploy_pd.model.ops.reference import numpy_cache
from fastdeploy_pd.model.weights import DummyTensor, RawTensor

QUERY_ROWS = 128
LEAST_ITEMS, ALIGNMENT = 4096, 16  # of `_Arrays`


@dataclass(slots=True)
class _Cache:
    """One layer's blocks, twice over the same bytes: Paddle reads rows of one head of one block, NumPy writes in place."""

    tensor: paddle.Tensor  #: [num_blocks * 2 * num_kv_heads, block_size * head_dim]; float16 as int16 words
    array: np.ndarray  #: [num_blocks, 2, num_kv_heads, block_size, head_dim]


class _Arrays:
    """Tensors from NumPy's arrays that are over soon, all of them at once: parts of memory that both know."""

    def __init__(self) -> None:
        self._rooms: dict[np.dtype, tuple[np.ndarray, paddle.Tensor]] = {}
        self._num_used: dict[np.dtype, int] = {}

    def clear(self) -> None:
        """Those that were put here before are over: their memory is for others."""
        self._num_used.clear()

    def put(self, values: np.ndarray, shape: tuple[int, ...] | None = None) -> paddle.Tensor:
        """Returns: values, expanded to `shape` where one is given."""
        shape, dtype = shape or values.shape, values.dtype
        size, begin = math.prod(shape), self._num_used.get(dtype, 0)
        room = self._rooms.get(dtype)
        if room is None or begin + size > len(room[0]):  # who has a part of the old one keeps it
            array = np.empty(max(LEAST_ITEMS, 2 * (begin + size)), dtype)
            room = self._rooms[dtype] = array, paddle.utils.dlpack.from_dlpack(array.__dlpack__())
            begin = 0
        self._num_used[dtype] = begin + -(-size // ALIGNMENT) * ALIGNMENT
        array, tensor = room
        array[begin : begin + size].reshape(shape)[...] = values
        return tensor[begin : begin + size].reshape(shape)


@dataclass(slots=True)
class _Rows:
    keys: paddle.Tensor  #: rows of a _Cache's tensor, in attention's order
    values: paddle.Tensor


@dataclass(slots=True)
class _Group:
    q_rows: paddle.Tensor | None  #: None: all rows
    mask: paddle.Tensor  #: [num_sequences, num_kv_heads, heads / num_kv_heads, num_slots] added to the scores
    rows: _Rows


@dataclass(slots=True)
class _Plan:
    numpy: AttentionPlan
    spans: list[tuple[PromptSpan, _Rows]]
    groups: list[_Group]


class PaddleOps(ComposedOps):
    """See `base.Ops`."""

    name = "paddle"

    def __init__(self, num_heads: int, num_threads: int) -> None:
        paddle.set_device("cpu")
        paddle.set_grad_enabled(False)
        paddle.core.set_num_threads(num_threads)
        self._num_heads = num_heads
        self._of_step, self._of_call, self._of_tile = _Arrays(), _Arrays(), _Arrays()

    def weight(self, *parts: RawTensor | DummyTensor | np.ndarray) -> paddle.Tensor:
        """See base."""
        return paddle.to_tensor(np.ascontiguousarray(to_float32(*parts), dtype=np.float32))

    def cache(self, pool: np.ndarray, layout: KVLayout) -> list[_Cache]:
        """See base."""
        self._layout = layout
        caches = []
        for array in numpy_cache(pool, layout):
            rows = array.reshape(-1, layout.block_size * layout.head_dim)
            if layout.dtype == "float16":
                rows = rows.view(np.int16)  # Paddle's CPU build cannot gather float16
            caches.append(_Cache(paddle.utils.dlpack.from_dlpack(rows.__dlpack__()), array))
        return caches

    def plan(self, plan: AttentionPlan) -> _Plan:
        """See composed. A step's plan is made first, and it is over when the next one is made."""
        self._of_step.clear()
        spans = [(span, self._rows(span.block_ids)) for span in plan.spans]
        return _Plan(plan, spans, [self._group(plan, group) for group in plan.groups])

    def _rows(self, block_ids: np.ndarray) -> _Rows:
        keys, values = head_rows(block_ids, self._layout.num_kv_heads)
        return _Rows(self._of_step.put(keys.reshape(-1)), self._of_step.put(values.reshape(-1)))

    def _group(self, plan: AttentionPlan, group: DecodeGroup) -> _Group:
        num_slots = group.tables.shape[1] * self._layout.block_size
        is_past = np.arange(num_slots)[None, :] >= group.lengths[:, None]
        mask = np.where(is_past, np.float32(-np.inf), np.float32(0))[:, None, None, :]
        num_kv_heads = self._layout.num_kv_heads
        shape = (len(group.rows), num_kv_heads, self._num_heads // num_kv_heads, num_slots)
        is_all = len(group.rows) == len(plan.block_ids)
        return _Group(
            None if is_all else self._of_step.put(group.rows),
            self._of_step.put(mask, shape),
            self._rows(group.tables),
        )

    def linear(self, x: paddle.Tensor, weight: paddle.Tensor, bias: paddle.Tensor | None = None) -> paddle.Tensor:
        """See composed."""
        y = paddle.matmul(x, weight, transpose_y=True)
        return y if bias is None else y + bias

    def rms_norm(self, x: paddle.Tensor, weight: paddle.Tensor, eps: float) -> paddle.Tensor:
        """See composed."""
        return x * paddle.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weight

    def swiglu(self, gate_up: paddle.Tensor) -> paddle.Tensor:
        """See composed."""
        gate, up = paddle.chunk(gate_up, 2, axis=-1)
        return functional.silu(gate) * up

    def heads(self, x: paddle.Tensor, head_dim: int) -> paddle.Tensor:
        """See composed."""
        return x.reshape([x.shape[0], -1, head_dim])

    def split_heads(self, x: paddle.Tensor, sizes: tuple[int, ...]) -> list[paddle.Tensor]:
        """See composed."""
        return paddle.split(x, list(sizes), axis=1)

    def rotation(self, angles: np.ndarray) -> tuple[paddle.Tensor, paddle.Tensor]:
        """See composed."""
        num_heads = self._num_heads + self._layout.num_kv_heads
        cos, sin = (np.repeat(t[:, None], num_heads, axis=1).astype(np.float32) for t in signed_tables(angles))
        return self._of_step.put(cos), self._of_step.put(sin)

    def rotary(self, x: paddle.Tensor, rotation: tuple[paddle.Tensor, paddle.Tensor]) -> paddle.Tensor:
        """See composed."""
        cos, sin = rotation
        return x * cos + paddle.roll(x, x.shape[-1] // 2, axis=-1) * sin

    def rows(self, table: paddle.Tensor, indices: np.ndarray) -> paddle.Tensor:
        """See composed."""
        self._of_call.clear()
        return paddle.gather(table, self._of_call.put(indices))

    def write_kv(self, cache: _Cache, plan: _Plan, k: paddle.Tensor, v: paddle.Tensor) -> None:
        """See composed."""
        where = plan.numpy
        cache.array[where.fresh_blocks] = 0
        cache.array[where.block_ids, 0, :, where.offsets] = k.numpy()
        cache.array[where.block_ids, 1, :, where.offsets] = v.numpy()

    def attend(self, q: paddle.Tensor, cache: _Cache, plan: _Plan) -> paddle.Tensor:
        """See composed."""
        if not plan.spans and len(plan.groups) == 1:
            return self._attend_group(q, cache, plan.groups[0])
        if len(plan.spans) == 1 and not plan.groups:
            return self._attend_prompt(q, cache, *plan.spans[0])
        out = np.empty((q.shape[0], q.shape[1] * q.shape[2]), np.float32)
        for span, rows in plan.spans:
            out[span.row : span.row + span.num_tokens] = self._attend_prompt(q, cache, span, rows).numpy()
        for where, group in zip(plan.numpy.groups, plan.groups, strict=True):
            picked = q if group.q_rows is None else paddle.gather(q, group.q_rows)
            out[where.rows] = self._attend_group(picked, cache, group).numpy()
        self._of_call.clear()
        return self._of_call.put(out)

    def _keys_values(self, cache: _Cache, rows: _Rows, shape: list[int]) -> tuple[paddle.Tensor, paddle.Tensor]:
        keys, values = (paddle.gather(cache.tensor, index).reshape(shape) for index in (rows.keys, rows.values))
        if self._layout.dtype == "float16":
            keys, values = (paddle.view(words, "float16").astype("float32") for words in (keys, values))
        return keys, values

    def _attend_prompt(self, q: paddle.Tensor, cache: _Cache, span: PromptSpan, rows: _Rows) -> paddle.Tensor:
        num_kv_heads, head_dim, num_heads = self._layout.num_kv_heads, q.shape[2], q.shape[1]
        keys, values = self._keys_values(cache, rows, [num_kv_heads, 1, -1, head_dim])
        step = tile_rows(num_heads, span.start + span.num_tokens, QUERY_ROWS)
        pieces = []
        for first in range(0, span.num_tokens, step):
            last = min(first + step, span.num_tokens)
            seen = span.start + last  # the causal mask makes everything after it invisible
            tile = q[span.row + first : span.row + last].reshape([last - first, num_kv_heads, -1, head_dim])
            grouped = tile.transpose([1, 2, 0, 3]) * head_dim**-0.5
            is_future = np.arange(seen)[None, :] > np.arange(span.start + first, seen)[:, None]
            self._of_tile.clear()
            mask = self._of_tile.put(np.where(is_future, np.float32(-np.inf), np.float32(0)))
            scores = paddle.matmul(grouped, keys[:, :, :seen], transpose_y=True) + mask
            attended = paddle.matmul(functional.softmax(scores, axis=-1), values[:, :, :seen])
            pieces.append(attended.transpose([2, 0, 1, 3]).reshape([last - first, -1]))
        return pieces[0] if len(pieces) == 1 else paddle.concat(pieces, axis=0)

    def _attend_group(self, q: paddle.Tensor, cache: _Cache, group: _Group) -> paddle.Tensor:
        num_sequences, num_heads, head_dim = q.shape
        num_kv_heads = self._layout.num_kv_heads
        keys, values = self._keys_values(cache, group.rows, [num_sequences, num_kv_heads, -1, head_dim])
        grouped = (q * head_dim**-0.5).reshape([num_sequences, num_kv_heads, num_heads // num_kv_heads, head_dim])
        scores = paddle.matmul(grouped, keys, transpose_y=True) + group.mask
        return paddle.matmul(functional.softmax(scores, axis=-1), values).reshape([num_sequences, -1])

    def to_numpy(self, x: paddle.Tensor) -> np.ndarray:
        """See base."""
        return x.numpy()
