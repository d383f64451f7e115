"""The sum of all ranks' tensors by one launch: each rank writes its own into the others' inboxes, says so, and adds up what came into its.

For small tensors alone: each crosses every pair of GPUs once, where NCCL's rings share them out but take 16 us or more.
A program waits for its like on the other ranks. Of large sums not all have a place at once: GPUs begin programs by rising number, so that
the first one that has not ended is there on every rank.
"""

# Triton has no types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, no-any-return, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastdeploy_pd.model.kernels.chain import IS_CHAINED, launch, wait_for_inputs

PIECE = 2048  # elements that a program sums


@triton.jit
def _place(inboxes, owner, sender, half, CAPACITY: tl.constexpr, NUM_RANKS: tl.constexpr, TYPE: tl.constexpr):
    """Where a rank's inbox has what a sender writes."""
    inbox = tl.load(inboxes + owner)
    return inbox.to(tl.pointer_type(TYPE)) + (half * NUM_RANKS + sender) * CAPACITY


@triton.jit
def _flag(
    inboxes, owner, sender, CAPACITY: tl.constexpr, NUM_RANKS: tl.constexpr, TYPE: tl.constexpr, PIECE: tl.constexpr
):
    """Where a sender says how many times this program has written there."""
    behind = _place(inboxes, owner, 0, 2, CAPACITY, NUM_RANKS, TYPE).to(tl.pointer_type(tl.int32), bitcast=True)
    return behind + sender * (CAPACITY // PIECE) + tl.program_id(0)


@triton.jit
def _sum(
    x,
    inboxes,
    counts,
    size,
    RANK: tl.constexpr,
    NUM_RANKS: tl.constexpr,
    CAPACITY: tl.constexpr,
    PIECE: tl.constexpr,
):
    wait_for_inputs()
    TYPE: tl.constexpr = x.dtype.element_ty
    program = tl.program_id(0)
    count = tl.load(counts + program) + 1
    # Who writes a half again has heard that all others are one call further, so that they have read it.
    half = count % 2
    places = program * PIECE + tl.arange(0, PIECE)
    is_there = places < size
    own = tl.load(x + places, mask=is_there, other=0.0)
    for step in tl.static_range(1, NUM_RANKS):
        theirs = _place(inboxes, (RANK + step) % NUM_RANKS, RANK, half, CAPACITY, NUM_RANKS, TYPE)
        tl.store(theirs + places, own, mask=is_there)
    tl.debug_barrier()  # all threads' values are written before one of them says so
    for step in tl.static_range(1, NUM_RANKS):
        flag = _flag(inboxes, (RANK + step) % NUM_RANKS, RANK, CAPACITY, NUM_RANKS, TYPE, PIECE)
        tl.atomic_xchg(flag, count, sem="release", scope="sys")
    total = tl.zeros([PIECE], tl.float32)
    for sender in tl.static_range(NUM_RANKS):  # in the same order on every rank
        if sender == RANK:
            total += own.to(tl.float32)
        else:
            flag = _flag(inboxes, RANK, sender, CAPACITY, NUM_RANKS, TYPE, PIECE)
            seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
            while seen - count < 0:
                seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
            ours = _place(inboxes, RANK, sender, half, CAPACITY, NUM_RANKS, TYPE)
            total += tl.load(ours + places, mask=is_there, other=0.0, cache_modifier=".cg").to(tl.float32)
    tl.store(x + places, total, mask=is_there)
    tl.store(counts + program, count)


def inbox_bytes(capacity: int, num_ranks: int, item_bytes: int) -> int:
    """Returns: how large an inbox is: two halves with a place for every rank each, and a flag for each piece of each rank."""
    return 2 * num_ranks * capacity * item_bytes + num_ranks * (capacity // PIECE) * 4


def all_reduce(x: torch.Tensor, inboxes: torch.Tensor, counts: torch.Tensor, rank: int, capacity: int) -> None:
    """x becomes the sum of all ranks' x. Every rank launches the same sums in the same order.

    Args:
        x: [any], at most `capacity` elements, contiguous.
        inboxes: [num_ranks] int64 addresses of inbox_bytes each, zeroed at first, which this GPU can write.
        counts: [capacity / PIECE] int32, zeroed at first, this rank's own.
        capacity: a multiple of PIECE.
    """
    grid, sizes = (triton.cdiv(x.numel(), PIECE),), (x.numel(), rank, len(inboxes), capacity, PIECE)
    launch(_sum, grid, x, inboxes, counts, *sizes, num_warps=4, launch_pdl=IS_CHAINED)
