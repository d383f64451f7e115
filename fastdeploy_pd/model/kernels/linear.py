"""Products of a few rows with a weight matrix: bound by reading the weights once, with norm, SwiGLU, bias and residual in the same pass.

A norm needs no pass of its own: rows times the norm's weights are multiplied while their squares are summed, and divided at the end.
"""

# Triton has no types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, no-any-return, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastdeploy_pd.model.kernels.chain import IS_CHAINED, launch, wait_for_inputs

MOST_ROWS = 16
_ROWS = tl.constexpr(MOST_ROWS)


@triton.jit(do_not_specialize=["num_rows"])
def _few_rows(
    x,
    weight,
    bias,
    norm,
    residual,
    out,
    num_rows,
    eps,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    IS_SWIGLU: tl.constexpr,
):
    outs = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    rows, columns = tl.arange(0, _ROWS), tl.arange(0, BLOCK_IN)
    is_out, is_row = outs < OUT, rows < num_rows
    product = tl.zeros([BLOCK_OUT, _ROWS], tl.float32)
    second = tl.zeros([BLOCK_OUT, _ROWS], tl.float32)  # of SwiGLU's other half
    squares = tl.zeros([_ROWS], tl.float32)
    at = weight + outs[:, None].to(tl.int64) * IN + columns[None, :]
    wait_for_inputs()
    for begin in range(0, IN, BLOCK_IN):
        inside = begin + columns < IN
        weights = tl.load(at + begin, mask=is_out[:, None] & inside[None, :], other=0.0)
        mask = inside[:, None] & is_row[None, :]
        values = tl.load(x + rows[None, :] * IN + (begin + columns)[:, None], mask=mask, other=0.0)
        if HAS_NORM:
            wide = values.to(tl.float32)
            squares += tl.sum(wide * wide, axis=0)
            values = (wide * tl.load(norm + begin + columns, mask=inside, other=0.0)[:, None]).to(values.dtype)
        product = tl.dot(weights, values, product, input_precision="ieee")
        if IS_SWIGLU:
            others = tl.load(at + OUT * IN + begin, mask=is_out[:, None] & inside[None, :], other=0.0)
            second = tl.dot(others, values, second, input_precision="ieee")
    if HAS_NORM:
        scale = tl.rsqrt(squares / IN + eps)[None, :]
        product *= scale
        second *= scale
    if IS_SWIGLU:
        product = product / (1.0 + tl.exp(-product)) * second
    if HAS_BIAS:
        product += tl.load(bias + outs, mask=is_out, other=0.0).to(tl.float32)[:, None]
    place = rows[None, :] * OUT + outs[:, None]
    mask = is_out[:, None] & is_row[None, :]
    if HAS_RESIDUAL:
        product += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + place, product, mask=mask)


@triton.jit
def _one_row(
    x,
    weight,
    bias,
    norm,
    residual,
    out,
    num_rows,
    eps,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    IS_SWIGLU: tl.constexpr,
):
    outs = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    columns = tl.arange(0, BLOCK_IN)
    is_out = outs < OUT
    product = tl.zeros([BLOCK_OUT, BLOCK_IN], tl.float32)
    second = tl.zeros([BLOCK_OUT, BLOCK_IN], tl.float32)  # of SwiGLU's other half
    squares = tl.zeros([BLOCK_IN], tl.float32)
    at = weight + outs[:, None].to(tl.int64) * IN + columns[None, :]
    mask = is_out[:, None] & (columns < IN)[None, :]
    weights = tl.load(at, mask=mask, other=0.0)  # on their way while the kernel before this one ends
    others = tl.load(at + OUT * IN, mask=mask, other=0.0) if IS_SWIGLU else weights
    wait_for_inputs()
    for begin in tl.static_range(0, IN, BLOCK_IN):
        inside = begin + columns < IN
        if begin > 0:
            mask = is_out[:, None] & inside[None, :]
            weights = tl.load(at + begin, mask=mask, other=0.0)
            others = tl.load(at + OUT * IN + begin, mask=mask, other=0.0) if IS_SWIGLU else weights
        values = tl.load(x + begin + columns, mask=inside, other=0.0).to(tl.float32)
        if HAS_NORM:
            squares += values * values
            values *= tl.load(norm + begin + columns, mask=inside, other=0.0).to(tl.float32)
        product += weights.to(tl.float32) * values[None, :]
        if IS_SWIGLU:
            second += others.to(tl.float32) * values[None, :]
    scale = tl.rsqrt(tl.sum(squares) / IN + eps) if HAS_NORM else 1.0
    result = tl.sum(product, axis=1) * scale
    if IS_SWIGLU:
        result = result / (1.0 + tl.exp(-result)) * (tl.sum(second, axis=1) * scale)
    if HAS_BIAS:
        result += tl.load(bias + outs, mask=is_out, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        result += tl.load(residual + outs, mask=is_out, other=0.0).to(tl.float32)
    tl.store(out + outs, result, mask=is_out)


def tuning_of(
    num_rows: int, num_out: int, num_in: int, is_swiglu: bool, has_norm: bool, item_bytes: int
) -> tuple[int, int, int, int]:
    """Returns: block of outputs, block of inputs, warps, stages that were fastest on an H200.

    Tried: the shapes of Llama-3-8B, of a half of it (tensor parallel), and of Qwen3-0.6B.
    """
    if num_rows == 1 and is_swiglu:
        return (1 if num_out >= 8192 else 4), 1024, 4, 1
    if num_rows == 1:
        return (4 if num_out > 4096 or num_in <= 2048 else 2), min(2048, triton.next_power_of_2(num_in)), 4, 1
    if item_bytes == 4:
        return 32, 128, 4, 2
    if is_swiglu and num_out >= 4096:
        return (64, 128, 8, 3) if num_out >= 8192 else (128, 128, 8, 3)
    if is_swiglu:
        return 32, 256, 4, 4
    return (64, 256, 4, 4) if num_out > 4096 or (has_norm and num_out < num_in) else (32, 512, 4, 4)


def few_rows(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    residual: torch.Tensor | None = None,
    is_swiglu: bool = False,
    tuning: tuple[int, int, int, int] | None = None,
) -> torch.Tensor:
    """A product of at most MOST_ROWS rows.

    Args:
        x: [n, in].
        weight: [out, in]; with is_swiglu [2 * out, in], whose halves' products become silu(first) * second.
        bias: [out] added.
        norm: [in]: x is normed (root mean square, eps) and multiplied by it before.
        residual: [n, out] added.
        tuning: see tuning_of; chosen by shape when None.
    Returns: [n, out].
    """
    num_rows, num_in = x.shape
    num_out = weight.shape[0] // (2 if is_swiglu else 1)
    out = torch.empty((num_rows, num_out), dtype=x.dtype, device=x.device)
    flags = (bias is not None, norm is not None, residual is not None, is_swiglu)
    block_out, block_in, warps, stages = tuning or tuning_of(
        num_rows, num_out, num_in, is_swiglu, norm is not None, x.element_size()
    )
    launch(
        _one_row if num_rows == 1 else _few_rows,
        (triton.cdiv(num_out, block_out),),
        x,
        weight,
        bias,
        norm,
        residual,
        out,
        num_rows,
        eps,
        num_out,
        num_in,
        block_out,
        block_in,
        *flags,
        num_warps=warps,
        num_stages=stages,
        launch_pdl=IS_CHAINED,
    )
    return out
