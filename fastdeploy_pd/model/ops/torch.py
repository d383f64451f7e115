"""The operations in PyTorch, on CPU."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as functional

from fastdeploy_pd.core.layout import KVLayout
from fastdeploy_pd.model.ops.base import AttentionPlan, PromptSpan

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
QUERY_ROWS = 512  # rows of a prompt attended to at once: bounds the score matrix


@dataclass(slots=True)
class _Plan:
    block_ids: torch.Tensor
    offsets: torch.Tensor
    spans: list[tuple[PromptSpan, torch.Tensor]]
    single_rows: torch.Tensor
    single_tables: torch.Tensor
    single_mask: torch.Tensor  # [num_single, 1, 1, max_tokens] added to the scores


class TorchOps:
    """See `base.Ops`."""

    name = "torch"

    def __init__(self, dtype: str, num_threads: int | None = None) -> None:
        """Raises: KeyError: dtype is not in DTYPES."""
        self.dtype = DTYPES[dtype]
        self._block_size = 0
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        torch.set_grad_enabled(False)

    def weight(self, array: np.ndarray) -> torch.Tensor:
        """See base."""
        return torch.tensor(array, dtype=self.dtype)

    def cache(self, pool: np.ndarray, layout: KVLayout) -> list[torch.Tensor]:
        """See base."""
        self._block_size = layout.block_size
        shape = (layout.num_layers, layout.num_blocks, 2, layout.num_kv_heads, layout.block_size, layout.head_dim)
        return list(torch.from_numpy(pool).view(DTYPES[layout.dtype]).view(shape))

    def plan(self, plan: AttentionPlan) -> _Plan:
        """See base."""
        tables = torch.from_numpy(plan.single_tables)
        num_slots = tables.shape[1] * self._block_size
        is_past = torch.arange(num_slots)[None, :] >= torch.from_numpy(plan.single_lengths)[:, None]
        mask = torch.zeros(is_past.shape, dtype=self.dtype).masked_fill_(is_past, float("-inf"))
        return _Plan(
            torch.from_numpy(plan.block_ids),
            torch.from_numpy(plan.offsets),
            [(span, torch.from_numpy(span.block_ids)) for span in plan.spans],
            torch.from_numpy(plan.single_rows),
            tables,
            mask[:, None, None, :],
        )

    def embedding(self, table: torch.Tensor, token_ids: np.ndarray) -> torch.Tensor:
        """See base."""
        return table[torch.from_numpy(token_ids)]

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """See base."""
        return functional.linear(x, weight, bias)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """See base."""
        return functional.rms_norm(x, (x.shape[-1],), weight, eps)

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """See base."""
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate) * up

    def split_heads(self, x: torch.Tensor, sizes: tuple[int, ...], head_dim: int) -> list[torch.Tensor]:
        """See base."""
        return list(x.view(x.shape[0], -1, head_dim).split(sizes, dim=1))

    def rotary(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """See base."""
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def rows(self, table: torch.Tensor, indices: np.ndarray) -> torch.Tensor:
        """See base."""
        return table[torch.from_numpy(indices)]

    def write_kv(self, cache: torch.Tensor, plan: _Plan, k: torch.Tensor, v: torch.Tensor) -> None:
        """See base."""
        cache[plan.block_ids, 0, :, plan.offsets] = k.to(cache.dtype)
        cache[plan.block_ids, 1, :, plan.offsets] = v.to(cache.dtype)

    def attention(self, q: torch.Tensor, cache: torch.Tensor, plan: _Plan) -> torch.Tensor:
        """See base."""
        out = torch.empty((q.shape[0], q.shape[1] * q.shape[2]), dtype=q.dtype)
        for span, block_ids in plan.spans:
            self._attend_prompt(q, cache, span, block_ids, out)
        if len(plan.single_rows):
            out[plan.single_rows] = self._attend_singles(q[plan.single_rows], cache, plan)
        return out

    def _attend_prompt(
        self, q: torch.Tensor, cache: torch.Tensor, span: PromptSpan, block_ids: torch.Tensor, out: torch.Tensor
    ) -> None:
        num_kv_heads, head_dim, stop = cache.shape[2], q.shape[2], span.start + span.num_tokens
        blocks = cache[block_ids].to(q.dtype)
        keys, values = (
            blocks[:, i].transpose(0, 1).reshape(num_kv_heads, 1, -1, head_dim)[:, :, :stop] for i in (0, 1)
        )
        for first in range(0, span.num_tokens, QUERY_ROWS):
            last = min(first + QUERY_ROWS, span.num_tokens)
            rows = slice(span.row + first, span.row + last)
            seen = span.start + last  # the causal mask makes everything after it invisible
            grouped = q[rows].view(last - first, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
            visible = torch.arange(seen)[None, :] <= torch.arange(span.start + first, seen)[:, None]
            shape = (num_kv_heads, grouped.shape[1], seen, head_dim)
            attended = functional.scaled_dot_product_attention(
                grouped, keys[:, :, :seen].expand(shape), values[:, :, :seen].expand(shape), attn_mask=visible
            )
            out[rows] = attended.permute(2, 0, 1, 3).reshape(last - first, -1)

    def _attend_singles(self, q: torch.Tensor, cache: torch.Tensor, plan: _Plan) -> torch.Tensor:
        num_single, num_heads, head_dim = q.shape
        num_kv_heads = cache.shape[2]
        blocks = cache[plan.single_tables].to(q.dtype)  # [s, blocks, 2, kv_heads, block_size, head_dim]
        keys, values = (blocks[:, :, i].transpose(1, 2).reshape(num_single, num_kv_heads, -1, head_dim) for i in (0, 1))
        grouped = q.view(num_single, num_kv_heads, num_heads // num_kv_heads, head_dim)
        scores = grouped @ keys.transpose(-1, -2) * head_dim**-0.5 + plan.single_mask
        return (scores.softmax(dim=-1) @ values).reshape(num_single, -1)

    def to_numpy(self, x: torch.Tensor) -> np.ndarray:
        """See base."""
        return x.float().numpy()
