"""Tokens drawn at random, without sorting rows of logits.

What `sampler.draw` finds in a sorted row lies where a sum over all that is at least as likely passes a number: the last key (a logit's
bits, in an order that integers have too) is found by sixteenths, one pass over the row each. Rows are in the L2 cache after the first.
Of few rows, several programs look through one, each through its part, and tell each other their sums.
Weights are float32, and so are most sums: a draw differs from the CPU's where its random number falls within about 1e-6 of the border
between two tokens, or where so little decides what top_p or min_p keep. Source: Salmon et al., SC 2011 (Philox).
"""

# Triton has no types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, no-any-return, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastdeploy_pd.model.kernels.chain import IS_CHAINED, launch, wait_for_inputs

BLOCK = 2048
NUM_WARPS = 16
MOST_PARTS = 16  # of a row
PLACE, SEED, POSITION, TOP_K, TEMPERATURE, TOP_P, MIN_P = range(7)  # of a draw's parameters
NUM_PARAMETERS = 8
LOG2_E = 1.4426950408889634
STEEPEST = 1e30  # an infinite slope times no difference would be no number; whatever is not likeliest has no weight long before
LEAST_TOP_P = 1e-300  # of 0 too the likeliest token is left
MOST_NUMBER = 1 - 1e-6  # sums' rounding must not lead past the last token that is kept
# Leading bits, as float32, in which all numbers of a type differ.
KEY_BITS = {torch.float32: 32, torch.float16: 20, torch.bfloat16: 16}

_LOG2_E, _STEEPEST = tl.constexpr(LOG2_E), tl.constexpr(STEEPEST)
_LEAST_TOP_P, _MOST_NUMBER = tl.constexpr(LEAST_TOP_P), tl.constexpr(MOST_NUMBER)
_FIRST_FACTOR, _SECOND_FACTOR = tl.constexpr(0xD2E7470EE14C6C93), tl.constexpr(0xCA5A826395121157)
_KEY_STEP, _OTHER_KEY_STEP = tl.constexpr(0x9E3779B97F4A7C15), tl.constexpr(0xBB67AE8584CAA73B)


@triton.jit
def _uniform(seed, position):
    """See `sampler.uniform`: the first word of Philox 4x64 with ten rounds. NumPy increments its counter before the first one."""
    c0 = (position + 1).to(tl.uint64)
    key = seed.to(tl.uint64)
    zero = c0 ^ c0
    c1, c2, c3, other_key = zero, zero, zero, zero
    for _ in tl.static_range(10):
        first, second = zero + _FIRST_FACTOR, zero + _SECOND_FACTOR
        high0, low0 = tl.umulhi(first, c0), first * c0
        high1, low1 = tl.umulhi(second, c2), second * c2
        c0, c1, c2, c3 = high1 ^ c1 ^ key, low1, high0 ^ c3 ^ other_key, low0
        key += zero + _KEY_STEP
        other_key += zero + _OTHER_KEY_STEP
    return (c0 >> 11).to(tl.float64) * (1.0 / 9007199254740992.0)


@triton.jit
def _values(logits, begin, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    columns = begin + tl.arange(0, BLOCK)
    return tl.load(logits + columns, mask=columns < SIZE, other=-float("inf")).to(tl.float32)


@triton.jit
def _key(values, KEY_BITS: tl.constexpr):
    """float32 -> int32 that rises with it."""
    bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True)  # one zero
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> (32 - KEY_BITS)


@triton.jit
def _value(key, KEY_BITS: tl.constexpr):
    """The float32 of a key."""
    rest: tl.constexpr = (1 << (32 - KEY_BITS)) - 1
    whole = (key << (32 - KEY_BITS)) | tl.where(key < 0, rest, 0)
    return (whole ^ ((whole >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _weight(values, largest, slope):
    """The likeliest's is 1."""
    return tl.exp2((values - largest) * slope)


@triton.jit
def _span(SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Returns: where this program's part of a row begins and ends."""
    share = tl.cdiv(SIZE, BLOCK * tl.num_programs(1)) * BLOCK
    begin = tl.program_id(1) * share
    return begin, tl.minimum(begin + share, SIZE)


@triton.jit
def _of_all(own, board, turn, MOST_PARTS: tl.constexpr):
    """The sums of what a row's programs have, [16] float64 each. All of them ask in the same order.

    They wait for each other, so all of a launch must have a place at the same time: `num_parts` makes no more than there are processors,
    and nothing else that waits for other programs may run beside it (two instances' draws at once, on one GPU under MPS).
    Args:
        board: the row's [1 + 2 * MOST_PARTS, 16] float64: a count of who has written, and what, in turns.
        turn: how often it was asked before.
    """
    number, columns = tl.num_programs(1), tl.arange(0, 16)
    if number > 1:
        # Who writes a half again has heard that all others are one turn further, so that they have read it.
        places = board + (1 + turn % 2 * MOST_PARTS) * 16
        tl.store(places + tl.program_id(1) * 16 + columns, own)
        tl.debug_barrier()  # all threads' values are written before one of them says so
        count = board.to(tl.pointer_type(tl.int32), bitcast=True)
        seen = tl.atomic_add(count, 1, sem="acq_rel", scope="gpu") + 1
        while seen < (turn + 1) * number:
            seen = tl.atomic_add(count, 0, sem="acquire", scope="gpu")
        tl.debug_barrier()
        parts = tl.arange(0, MOST_PARTS)[:, None]
        theirs = tl.load(places + parts * 16 + columns[None, :], mask=parts < number, other=0.0, cache_modifier=".cg")
        own = tl.sum(theirs, axis=0)  # in the same order in every program
    return own, turn + 1


@triton.jit
def _totals(row, first_key, least, turn, SIZE, KEY_BITS, BLOCK, MOST_PARTS):
    """Returns: the weights of keys from first_key on, those of at least `least`, the turn."""
    logits, largest, slope, board = row
    held, likely = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    begin, end = _span(SIZE, BLOCK)
    for first in range(begin, end, BLOCK):
        values = _values(logits, first, SIZE, BLOCK)
        weights = _weight(values, largest, slope)
        held += tl.where(_key(values, KEY_BITS) >= first_key, weights, 0.0)
        likely += tl.where(weights >= least, weights, 0.0)
    columns = tl.arange(0, 16)
    sums = tl.where(columns == 0, tl.sum(held.to(tl.float64)), tl.sum(likely.to(tl.float64)))
    sums, turn = _of_all(sums, board, turn, MOST_PARTS)
    return tl.sum(tl.where(columns == 0, sums, 0.0)), tl.sum(tl.where(columns == 1, sums, 0.0)), turn


@triton.jit
def _search(row, target, is_count, is_strict, turn, SIZE, KEY_BITS: tl.constexpr, BLOCK, MOST_PARTS):
    """The last key such that it and those above hold the target, or, strict, more; by number, if is_count, else by weight.

    Returns: it, what those above it hold, the turn.
    """
    logits, largest, slope, board = row
    steps = tl.arange(0, 16)
    low = tl.full([], -(1 << (KEY_BITS - 1)), tl.int32)
    above = tl.full([], 0.0, tl.float64)
    begin, end = _span(SIZE, BLOCK)
    for level in range(KEY_BITS // 4):
        shift = KEY_BITS - 4 - 4 * level
        borders = low + (steps << shift)
        sums = tl.zeros([16, BLOCK], tl.float32)
        for first in range(begin, end, BLOCK):
            values = _values(logits, first, SIZE, BLOCK)
            amounts = tl.where(is_count, 1.0, _weight(values, largest, slope))
            sums += tl.where(_key(values, KEY_BITS)[None, :] >= borders[:, None], amounts[None, :], 0.0)
        totals, turn = _of_all(tl.sum(sums, axis=1).to(tl.float64), board, turn, MOST_PARTS)
        is_met = (totals > target) | ((totals == target) & (is_strict == 0))
        number = tl.sum(((steps > 0) & is_met).to(tl.int32))
        above = tl.where(number < 15, tl.sum(tl.where(steps == number + 1, totals, 0.0)), above)
        low += number << shift
    return low, above, turn


@triton.jit
def _amounts(row, first, least, key, is_tie, SIZE, KEY_BITS, BLOCK):
    logits, largest, slope, _ = row
    values = _values(logits, first, SIZE, BLOCK)
    weights = _weight(values, largest, slope)
    amounts = tl.where(weights >= least, weights, 0.0)
    return tl.where(is_tie, (_key(values, KEY_BITS) == key).to(tl.float32), amounts).to(tl.float64)


@triton.jit
def _locate(row, least, key, is_tie, target, place, turn, SIZE, KEY_BITS, BLOCK, MOST_PARTS):
    """Store at `place` the first column whose amount takes the sum of those up to it above the target; the last one that has any, if
    rounding leaves none; nothing, if none has.

    is_tie: columns of the key have 1, others nothing; else they have their weights, of at least `least`.
    """
    tl.static_assert(MOST_PARTS == 16, "each part has a place among what is summed")
    parts = tl.arange(0, MOST_PARTS)
    total = tl.full([], 0.0, tl.float64)
    begin, end = _span(SIZE, BLOCK)
    for first in range(begin, end, BLOCK):
        total += tl.sum(_amounts(row, first, least, key, is_tie, SIZE, KEY_BITS, BLOCK))
    totals, turn = _of_all(tl.where(parts == tl.program_id(1), total, 0.0), row[3], turn, MOST_PARTS)
    is_past_it = (tl.cumsum(totals) > target) & (totals > 0.0)
    last_part = tl.max(tl.where(totals > 0.0, parts, -1))
    if tl.program_id(1) == tl.minimum(tl.min(tl.where(is_past_it, parts, MOST_PARTS)), last_part):
        running = tl.sum(tl.where(parts < tl.program_id(1), totals, 0.0))
        before, found = running, begin
        for first in range(begin, end, BLOCK):
            total = tl.sum(_amounts(row, first, least, key, is_tie, SIZE, KEY_BITS, BLOCK))
            is_it = (running <= target) & (total > 0.0)
            found, before = tl.where(is_it, first, found), tl.where(is_it, running, before)
            running += total
        amounts = _amounts(row, found, least, key, is_tie, SIZE, KEY_BITS, BLOCK)
        columns = found + tl.arange(0, BLOCK)
        is_past = (before + tl.cumsum(amounts) > target) & (amounts > 0.0)
        last = tl.max(tl.where(amounts > 0.0, columns, -1))
        tl.store(place, tl.minimum(tl.min(tl.where(is_past, columns, 2147483647)), last), mask=last >= 0)


@triton.jit
def _draw(
    logits,
    rows,
    numbers,
    chosen,
    boards,
    SIZE: tl.constexpr,
    KEY_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_PARAMETERS: tl.constexpr,
    MOST_PARTS: tl.constexpr,
):
    wait_for_inputs()
    program = tl.program_id(0)
    numbers += program * NUM_PARAMETERS
    others = numbers.to(tl.pointer_type(tl.float64), bitcast=True)
    place = chosen + tl.load(numbers)
    seed, position, top_k = tl.load(numbers + 1), tl.load(numbers + 2), tl.load(numbers + 3)
    temperature, top_p, min_p = tl.load(others + 4), tl.load(others + 5), tl.load(others + 6)
    likeliest = tl.load(place)
    if likeliest < 0:
        return
    logits += tl.load(rows + program).to(tl.int64) * SIZE
    largest = tl.load(logits + likeliest).to(tl.float32)
    slope = tl.minimum(_LOG2_E / temperature, _STEEPEST).to(tl.float32)
    row = (logits, largest, slope, boards + program * (1 + 2 * MOST_PARTS) * 16)
    number, least = _uniform(seed, position), min_p.to(tl.float32)
    is_ranked = (top_k < SIZE) | (top_p < 1.0)
    key = tl.full([], -(1 << (KEY_BITS - 1)), tl.int32)
    above, kept, target = tl.full([], 0.0, tl.float64), tl.full([], 0.0, tl.float64), top_k.to(tl.float64)
    likely, turn = kept, tl.full([], 0, tl.int32)
    for stage in range(3):  # how much top_k keeps; how much top_p and min_p keep of it; the token
        is_asked = ((stage == 0) & (top_k < SIZE)) | ((stage == 1) & (top_p < 1.0)) | ((stage == 2) & is_ranked)
        if is_asked:
            key, above, turn = _search(row, target, stage == 0, stage == 2, turn, SIZE, KEY_BITS, BLOCK, MOST_PARTS)
        each = _weight(_value(key, KEY_BITS), largest, slope).to(tl.float64)
        if stage == 0:
            first_key = tl.where(is_asked, key + 1, key)
            kept, likely, turn = _totals(row, first_key, least, turn, SIZE, KEY_BITS, BLOCK, MOST_PARTS)
            kept += tl.where(is_asked, (target - above) * each, 0.0)
            target = tl.maximum(top_p, _LEAST_TOP_P) * kept
        elif stage == 1:
            nucleus = above + tl.maximum(tl.ceil((target - above) / each), 1.0) * each
            kept = tl.where(is_asked & (nucleus < kept), nucleus, kept)
            kept = tl.minimum(kept, likely)
            target = tl.where(is_ranked, tl.minimum(number, _MOST_NUMBER), number) * kept
        elif is_ranked:
            target = tl.floor((target - above) / each)
    _locate(row, least, key, is_ranked, target, place, turn, SIZE, KEY_BITS, BLOCK, MOST_PARTS)


def num_parts(num_rows: int, device: torch.device) -> int:
    """Returns: programs that look through a row; where there are several, all rows' have a processor each."""
    if device.type != "cuda":
        return 1
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return min(max(processors // num_rows, 1), MOST_PARTS)


def draw(logits: torch.Tensor, rows: torch.Tensor, parameters: torch.Tensor, chosen: torch.Tensor) -> None:
    """Replace likeliest tokens by drawn ones.

    Args:
        logits: [any, vocab_size].
        rows: [m] int32, of logits, one a draw.
        parameters: [m, NUM_PARAMETERS] int64: PLACE in `chosen`, SEED and POSITION (see `sampler.uniform`), TOP_K (from vocab_size on
            all), and, as bits of float64, TEMPERATURE (> 0), TOP_P (from 1 on all) and MIN_P.
        chosen: [any] int32, the likeliest of each row; below 0 it stays, as there is none.
    """
    grid = len(rows), num_parts(len(rows), logits.device)
    num_boards = len(rows) if grid[1] > 1 else 0
    boards = torch.zeros((num_boards, 1 + 2 * MOST_PARTS, 16), dtype=torch.float64, device=logits.device)
    sizes = logits.shape[1], KEY_BITS[logits.dtype], BLOCK, NUM_PARAMETERS, MOST_PARTS
    launch(_draw, grid, logits, rows, parameters, chosen, boards, *sizes, num_warps=NUM_WARPS, launch_pdl=IS_CHAINED)
