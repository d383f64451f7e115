"""The likeliest token of each row of logits, chosen on the device."""

# Triton has no types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, no-any-return, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastdeploy_pd.model.kernels.chain import IS_CHAINED, launch, wait_for_inputs

PARTS = 64  # of a row, looked through side by side
BLOCK = 1024
NO_TOKEN = -1  # what is chosen from a row whose largest value is no number


@triton.jit
def _largest_of_part(logits, values, places, SIZE: tl.constexpr, SHARE: tl.constexpr, BLOCK: tl.constexpr):
    wait_for_inputs()
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], -float("inf"), tl.float32)
    best_place = tl.full([BLOCK], 2147483647, tl.int32)
    for begin in range(part * SHARE, part * SHARE + SHARE, BLOCK):
        inside = begin + columns < SIZE
        value = tl.load(logits + row * SIZE + begin + columns, mask=inside, other=-float("inf")).to(tl.float32)
        value = tl.where(value != value, float("inf"), value)  # NaN counts as largest, and infinity is refused
        is_better = value > best
        best_place = tl.where(is_better, begin + columns, best_place)
        best = tl.where(is_better, value, best)
    largest = tl.max(best)
    place = tl.min(tl.where(best == largest, best_place, 2147483647))
    tl.store(values + row * tl.num_programs(1) + part, largest)
    tl.store(places + row * tl.num_programs(1) + part, place)


@triton.jit
def _largest_of_row(values, places, chosen, PARTS: tl.constexpr):
    wait_for_inputs()
    row = tl.program_id(0)
    parts = row * PARTS + tl.arange(0, PARTS)
    value, place = tl.load(values + parts), tl.load(places + parts)
    largest = tl.max(value)
    first = tl.min(tl.where(value == largest, place, 2147483647))
    is_number = (largest < float("inf")) & (largest > -float("inf"))
    tl.store(chosen + row, tl.where(is_number, first, -1))


def likeliest(logits: torch.Tensor, chosen: torch.Tensor) -> None:
    """
    Args:
        logits: [m, vocab].
        chosen: [>= m] int32: becomes the index of each row's largest value, the lowest of equal ones; NO_TOKEN where that is not finite.
    """
    num_rows, size = logits.shape
    values = torch.empty((num_rows, PARTS), dtype=torch.float32, device=logits.device)
    places = torch.empty((num_rows, PARTS), dtype=torch.int32, device=logits.device)
    share = triton.cdiv(size, PARTS * BLOCK) * BLOCK
    grid = num_rows, PARTS
    launch(_largest_of_part, grid, logits, values, places, size, share, BLOCK, num_warps=4, launch_pdl=IS_CHAINED)
    launch(_largest_of_row, (num_rows,), values, places, chosen, PARTS, num_warps=1, launch_pdl=IS_CHAINED)
