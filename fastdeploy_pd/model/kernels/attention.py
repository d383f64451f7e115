"""Attention over the blocks of the KV pool: one new token a sequence, with long sequences split, or a prompt's tokens in tiles.

Source: paged attention: Kwon et al., SOSP 2023; tiles with a running softmax: Dao, FlashAttention-2; splits: Dao et al., Flash-Decoding.
Nothing behind a sequence's last token is used: scores are masked, and V is not loaded (0 * NaN would be NaN).
"""

# Triton has no types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, no-any-return, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastdeploy_pd.model.kernels.chain import IS_CHAINED, launch, wait_for_inputs

LOG2_E = 1.4426950408889634
MOST_SPLITS = 64
TILE_ROWS = 64


@triton.jit
def _absorb(scores, values, highest, total, weighted):
    """One more block into a running softmax: scores [rows, places], base 2; values [places, head_dim]."""
    new_highest = tl.maximum(highest, tl.max(scores, axis=1))
    base = tl.where(new_highest > -float("inf"), new_highest, 0.0)  # a row that sees nothing yet must not become NaN
    weights = tl.exp2(scores - base[:, None])
    fade = tl.exp2(highest - base)
    weighted = tl.dot(weights.to(values.dtype), values, weighted * fade[:, None], input_precision="ieee")
    return new_highest, total * fade + tl.sum(weights, axis=1), weighted


@triton.jit
def _decode(
    qkv,
    rows,
    cache,
    tables,
    lengths,
    out,
    partial,
    sums,
    scale,
    table_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
):
    wait_for_inputs()
    sequence, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    length = tl.load(lengths + sequence)
    row = tl.load(rows + sequence).to(tl.int64)
    num_blocks = tl.cdiv(length, BLOCK_SIZE)
    share = tl.cdiv(num_blocks, NUM_SPLITS)
    members, dims, places = tl.arange(0, GROUP_ROWS), tl.arange(0, HEAD_DIM), tl.arange(0, BLOCK_SIZE)
    heads = kv_head * GROUP + members
    is_member = (members < GROUP)[:, None]
    width: tl.constexpr = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
    query = tl.load(qkv + row * width + heads[:, None] * HEAD_DIM + dims[None, :], mask=is_member, other=0.0)
    highest = tl.full([GROUP_ROWS], -float("inf"), tl.float32)
    total = tl.zeros([GROUP_ROWS], tl.float32)
    weighted = tl.zeros([GROUP_ROWS, HEAD_DIM], tl.float32)
    for index in range(split * share, tl.minimum(split * share + share, num_blocks)):
        block = tl.load(tables + sequence * table_stride + index).to(tl.int64)
        base = cache + (block * (2 * NUM_KV_HEADS) + kv_head) * (BLOCK_SIZE * HEAD_DIM)
        keys = tl.load(base + places[None, :] * HEAD_DIM + dims[:, None]).to(query.dtype)
        is_there = index * BLOCK_SIZE + places < length
        scores = tl.where(is_there[None, :], tl.dot(query, keys, input_precision="ieee") * scale, -float("inf"))
        behind = base + NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM
        values = tl.load(behind + places[:, None] * HEAD_DIM + dims[None, :], mask=is_there[:, None], other=0.0)
        highest, total, weighted = _absorb(scores, values.to(query.dtype), highest, total, weighted)
    mean = weighted / tl.where(total > 0, total, 1.0)[:, None]  # a padding row has no blocks at all
    if NUM_SPLITS == 1:
        target = out + row * (NUM_HEADS * HEAD_DIM) + heads[:, None] * HEAD_DIM + dims[None, :]
        tl.store(target, mean, mask=is_member)
    else:
        place = (sequence * NUM_HEADS + heads) * NUM_SPLITS + split
        tl.store(partial + place[:, None] * HEAD_DIM + dims[None, :], mean, mask=is_member)
        tl.store(sums + place, highest + tl.log2(total), mask=members < GROUP)


@triton.jit
def _combine(
    partial,
    sums,
    rows,
    out,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    wait_for_inputs()
    sequence, head = tl.program_id(0), tl.program_id(1)
    row = tl.load(rows + sequence).to(tl.int64)
    splits, dims = tl.arange(0, SPLITS), tl.arange(0, HEAD_DIM)
    place = (sequence * NUM_HEADS + head) * NUM_SPLITS + splits
    logs = tl.load(sums + place, mask=splits < NUM_SPLITS, other=-float("inf"))
    is_used = logs > -float("inf")
    weights = tl.where(is_used, tl.exp2(logs - tl.max(logs)), 0.0)
    means = tl.load(partial + place[:, None] * HEAD_DIM + dims[None, :], mask=is_used[:, None], other=0.0)
    mean = tl.sum(means * weights[:, None], axis=0) / tl.maximum(tl.sum(weights), 1e-38)
    tl.store(out + (row * NUM_HEADS + head) * HEAD_DIM + dims, mean)


def num_splits(num_sequences: int, num_kv_heads: int, max_blocks: int, num_processors: int) -> int:
    """Returns: parts of a sequence that are attended to side by side: enough to fill the GPU, in a power of two."""
    num_programs = num_sequences * num_kv_heads
    rounds = 8 if num_programs <= 32 else 4  # few programs are long ones: more and shorter parts end at the same time
    wanted = max(1, rounds * num_processors // num_programs)
    return min(MOST_SPLITS, triton.next_power_of_2(max_blocks), 1 << (wanted.bit_length() - 1))


def decode(
    qkv: torch.Tensor,
    rows: torch.Tensor,
    cache: torch.Tensor,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    out: torch.Tensor,
    splits: int,
) -> None:
    """Attention of one new token a sequence.

    Args:
        qkv: [n, (num_heads + 2 * num_kv_heads) * head_dim]; Q is read.
        rows: [num_sequences] int32, each sequence's row of qkv and out.
        cache: [num_blocks, 2, num_kv_heads, block_size, head_dim].
        tables: [num_sequences, any] int32 block ids; only those of its length are read.
        lengths: [num_sequences] int32; 0: nothing is attended to, the row becomes 0.
        out: [n, num_heads * head_dim].
        splits: see num_splits.
    """
    _, _, num_kv_heads, block_size, head_dim = cache.shape
    num_heads, num_sequences = out.shape[1] // head_dim, len(rows)
    partial = sums = None
    if splits > 1:
        partial = torch.empty((num_sequences, num_heads, splits, head_dim), dtype=torch.float32, device=out.device)
        sums = torch.empty((num_sequences, num_heads, splits), dtype=torch.float32, device=out.device)
    launch(
        _decode,
        (num_sequences, num_kv_heads, splits),
        qkv,
        rows,
        cache,
        tables,
        lengths,
        out,
        partial,
        sums,
        head_dim**-0.5 * LOG2_E,
        tables.stride(0),
        num_heads,
        num_kv_heads,
        head_dim,
        block_size,
        max(16, triton.next_power_of_2(num_heads // num_kv_heads)),
        splits,
        num_warps=2,
        num_stages=2,
    )  # not chained: launched early, programs gather where there is room, and some processors get twice as many
    if splits > 1:
        sizes = num_heads, head_dim, splits, max(2, splits)
        launch(
            _combine, (num_sequences, num_heads), partial, sums, rows, out, *sizes, num_warps=2, launch_pdl=IS_CHAINED
        )


@triton.jit
def _prompt(
    qkv,
    tiles,
    cache,
    tables,
    out,
    scale,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    wait_for_inputs()
    head, tile = tl.program_id(0), tl.program_id(1)
    first_row = tl.load(tiles + tile * 4).to(tl.int64)
    num_rows = tl.load(tiles + tile * 4 + 1)
    start = tl.load(tiles + tile * 4 + 2)
    table = tables + tl.load(tiles + tile * 4 + 3)
    kv_head = head // (NUM_HEADS // NUM_KV_HEADS)
    members, dims, places = tl.arange(0, TILE_ROWS), tl.arange(0, HEAD_DIM), tl.arange(0, BLOCK_SIZE)
    is_row = (members < num_rows)[:, None]
    width: tl.constexpr = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
    at = (first_row + members)[:, None]
    query = tl.load(qkv + at * width + head * HEAD_DIM + dims[None, :], mask=is_row, other=0.0)
    positions = start + members
    length = start + num_rows
    highest = tl.full([TILE_ROWS], -float("inf"), tl.float32)
    total = tl.zeros([TILE_ROWS], tl.float32)
    weighted = tl.zeros([TILE_ROWS, HEAD_DIM], tl.float32)
    seen_whole = start // BLOCK_SIZE  # blocks that every row sees whole
    for index in range(0, seen_whole):
        block = tl.load(table + index).to(tl.int64)
        base = cache + (block * (2 * NUM_KV_HEADS) + kv_head) * (BLOCK_SIZE * HEAD_DIM)
        keys = tl.load(base + places[None, :] * HEAD_DIM + dims[:, None]).to(query.dtype)
        behind = base + NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM
        values = tl.load(behind + places[:, None] * HEAD_DIM + dims[None, :]).to(query.dtype)
        scores = tl.dot(query, keys, input_precision="ieee") * scale
        highest, total, weighted = _absorb(scores, values, highest, total, weighted)
    for index in range(seen_whole, tl.cdiv(length, BLOCK_SIZE)):
        block = tl.load(table + index).to(tl.int64)
        base = cache + (block * (2 * NUM_KV_HEADS) + kv_head) * (BLOCK_SIZE * HEAD_DIM)
        keys = tl.load(base + places[None, :] * HEAD_DIM + dims[:, None]).to(query.dtype)
        slots = index * BLOCK_SIZE + places
        behind = base + NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM
        values = tl.load(behind + places[:, None] * HEAD_DIM + dims[None, :], mask=(slots < length)[:, None], other=0.0)
        scores = tl.dot(query, keys, input_precision="ieee") * scale
        scores = tl.where(slots[None, :] <= positions[:, None], scores, -float("inf"))
        highest, total, weighted = _absorb(scores, values.to(query.dtype), highest, total, weighted)
    mean = weighted / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out + at * (NUM_HEADS * HEAD_DIM) + head * HEAD_DIM + dims[None, :], mean, mask=is_row)


def prompt(
    qkv: torch.Tensor, tiles: torch.Tensor, cache: torch.Tensor, tables: torch.Tensor, out: torch.Tensor
) -> None:
    """Causal attention of sequences with several new tokens each, whose K and V are in the cache already.

    Args:
        qkv: [n, (num_heads + 2 * num_kv_heads) * head_dim]; Q is read.
        tiles: [num_tiles, 4] int32: first row, rows (at most TILE_ROWS), position of the first, where its table begins in `tables`.
        cache: [num_blocks, 2, num_kv_heads, block_size, head_dim].
        tables: [any] int32, block tables one after the other.
        out: [n, num_heads * head_dim].
    """
    _, _, num_kv_heads, block_size, head_dim = cache.shape
    num_heads = out.shape[1] // head_dim
    launch(
        _prompt,
        (num_heads, len(tiles)),
        qkv,
        tiles,
        cache,
        tables,
        out,
        head_dim**-0.5 * LOG2_E,
        num_heads,
        num_kv_heads,
        head_dim,
        block_size,
        TILE_ROWS,
        num_warps=4,
        num_stages=2,
        launch_pdl=IS_CHAINED,
    )
