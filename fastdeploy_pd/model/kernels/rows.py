"""Kernels over rows of activations: embedding, norm, SwiGLU."""

# Triton has no types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, no-any-return, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastdeploy_pd.model.kernels.chain import IS_CHAINED, launch, wait_for_inputs


@triton.jit
def _embedding(
    table, token_ids, source, sampled, out, SIZE: tl.constexpr, BLOCK: tl.constexpr, HAS_SOURCE: tl.constexpr
):
    wait_for_inputs()
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(token_ids + row).to(tl.int64)
    if HAS_SOURCE:
        place = tl.load(source + row)
        if place >= 0:
            token = tl.maximum(tl.load(sampled + place), 0).to(tl.int64)  # below: its request ends, this step runs
    columns = tl.arange(0, BLOCK)
    values = tl.load(table + token * SIZE + columns, mask=columns < SIZE)
    tl.store(out + row * SIZE + columns, values, mask=columns < SIZE)


def embedding(
    table: torch.Tensor,
    token_ids: torch.Tensor,
    source: torch.Tensor | None = None,
    sampled: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Args:
        table: [vocab, hidden].
        token_ids: [n] int32.
        source: [n] int32, where in `sampled` a row's token is; -1: it is in token_ids.
        sampled: [any] int32 token ids that are on the device alone; one below 0 (choice.NO_TOKEN) reads as 0.
    Returns: [n, hidden].
    """
    out = torch.empty((len(token_ids), table.shape[1]), dtype=table.dtype, device=table.device)
    size = table.shape[1]
    launch(
        _embedding,
        (len(token_ids),),
        table,
        token_ids,
        source,
        sampled,
        out,
        size,
        triton.next_power_of_2(size),
        source is not None,
        launch_pdl=IS_CHAINED,
    )
    return out


@triton.jit
def _rms_norm(x, weight, out, eps, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    wait_for_inputs()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < SIZE
    values = tl.load(x + row * SIZE + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values) / SIZE + eps)
    weights = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * SIZE + columns, values * scale * weights, mask=inside)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """[n, size] normed over the last dimension, times weight [size]."""
    size = x.shape[1]
    out = torch.empty_like(x)
    block = triton.next_power_of_2(size)
    warps = min(16, max(1, block // 512))
    launch(_rms_norm, (len(x),), x, weight, out, eps, size, block, num_warps=warps, launch_pdl=IS_CHAINED)
    return out


@triton.jit
def _swiglu(gate_up, out, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    wait_for_inputs()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < SIZE
    gate = tl.load(gate_up + row * 2 * SIZE + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * SIZE + SIZE + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * SIZE + columns, gate / (1.0 + tl.exp(-gate)) * up, mask=inside)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """[n, 2 * k] -> [n, k]: silu of the first half times the second."""
    size = gate_up.shape[1] // 2
    out = torch.empty((len(gate_up), size), dtype=gate_up.dtype, device=gate_up.device)
    grid = len(gate_up), triton.cdiv(size, 2048)
    launch(_swiglu, grid, gate_up, out, size, 2048, num_warps=4, launch_pdl=IS_CHAINED)
    return out
