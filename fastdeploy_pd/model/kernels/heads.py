"""One kernel for what happens to Q, K and V between their projection and attention: norm, rotation, and K and V into their blocks."""

# Triton has no types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, no-any-return, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastdeploy_pd.model.kernels.chain import IS_CHAINED, launch, wait_for_inputs

HEADS = 8  # of a program


@triton.jit
def _rounded(x, kind, LIMIT: tl.constexpr):
    """What a cache of this type keeps of x; NaN stays NaN."""
    least = tl.full(x.shape, -LIMIT, tl.float32)
    most = tl.full(x.shape, LIMIT, tl.float32)
    inside = tl.minimum(tl.maximum(x, least, tl.PropagateNan.ALL), most, tl.PropagateNan.ALL)
    return inside.to(kind).to(tl.float32)


@triton.jit
def _rotate_and_store(
    qkv,
    norm,
    eps,
    positions,
    slots,
    rotation,
    cache,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    LIMIT: tl.constexpr,
    HEADS: tl.constexpr,
):
    wait_for_inputs()
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    halves = tl.arange(0, HALF)
    all_heads: tl.constexpr = NUM_HEADS + 2 * NUM_KV_HEADS
    is_head = (heads < all_heads)[:, None]
    is_turned = (heads < NUM_HEADS + NUM_KV_HEADS)[:, None]
    inside = heads[:, None] * (2 * HALF) + halves[None, :]
    at = qkv + token * (all_heads * 2 * HALF) + inside
    first = tl.load(at, mask=is_head, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=is_head, other=0.0).to(tl.float32)
    if HAS_NORM:
        squares = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
        scale = tl.rsqrt(squares / (2 * HALF) + eps)[:, None]
        first = tl.where(is_turned, first * scale * tl.load(norm + inside, mask=is_turned, other=0.0), first)
        second = tl.where(is_turned, second * scale * tl.load(norm + inside + HALF, mask=is_turned, other=0.0), second)
    angles = rotation + tl.load(positions + token).to(tl.int64) * (2 * HALF) + halves
    cos, sin = tl.load(angles)[None, :], tl.load(angles + HALF)[None, :]
    turned_first = tl.where(is_turned, first * cos - second * sin, first)
    turned_second = tl.where(is_turned, second * cos + first * sin, second)
    is_changed = is_turned
    if LIMIT > 0:  # attention to whole prompts reads qkv, and is to see what later steps see in the cache
        is_kv = (heads >= NUM_HEADS)[:, None]
        turned_first = tl.where(is_kv, _rounded(turned_first, cache.dtype.element_ty, LIMIT), turned_first)
        turned_second = tl.where(is_kv, _rounded(turned_second, cache.dtype.element_ty, LIMIT), turned_second)
        is_changed = is_head
    tl.store(at, turned_first, mask=is_changed)
    tl.store(at + HALF, turned_second, mask=is_changed)
    slot = tl.load(slots + token).to(tl.int64)
    # A block holds the heads of K and then those of V, as qkv does behind the heads of Q.
    head_of_block = slot // BLOCK_SIZE * (2 * NUM_KV_HEADS) + (heads - NUM_HEADS)
    place = (head_of_block * BLOCK_SIZE + slot % BLOCK_SIZE)[:, None] * (2 * HALF) + halves[None, :]
    is_stored = is_head & (heads >= NUM_HEADS)[:, None] & (slot >= 0)
    tl.store(cache + place, turned_first, mask=is_stored)
    tl.store(cache + place + HALF, turned_second, mask=is_stored)


def rotate_and_store(
    qkv: torch.Tensor,
    norm: torch.Tensor | None,
    eps: float,
    positions: torch.Tensor,
    slots: torch.Tensor,
    rotation: torch.Tensor,
    cache: torch.Tensor,
) -> None:
    """Norm and turn Q and K in place, and write K and V.

    Args:
        qkv: [n, (num_heads + 2 * num_kv_heads) * head_dim].
        norm: [num_heads + num_kv_heads, head_dim] weights, or None for no norm.
        positions: [n] int32.
        slots: [n] int32, block * block_size + offset; -1: nowhere.
        rotation: [max_positions, head_dim] float32, cosines and then sines.
        cache: [num_blocks, 2, num_kv_heads, block_size, head_dim]; in fp8 K and V are rounded in qkv, too.
    Source: the rotation is RoFormer's (Su et al.), pairs (i, i + head_dim / 2).
    """
    _, _, num_kv_heads, block_size, head_dim = cache.shape
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    launch(
        _rotate_and_store,
        (len(qkv), triton.cdiv(num_heads + 2 * num_kv_heads, HEADS)),
        qkv,
        norm,
        eps,
        positions,
        slots,
        rotation,
        cache,
        num_heads,
        num_kv_heads,
        head_dim // 2,
        block_size,
        norm is not None,
        torch.finfo(cache.dtype).max if cache.dtype.itemsize == 1 else 0.0,
        HEADS,
        num_warps=2,
        launch_pdl=IS_CHAINED,
    )
