"""Tokens drawn at random, without sorting rows of logits.

What `sampler.draw` finds in a sorted row lies where a sum over all that is at least as likely passes a number: the last key (a logit's
bits, in an order that integers have too) is found by sixteenths, one pass over the row each. Rows are in the L2 cache after the first.
Of few rows, several programs look through one, each through its part, and tell each other their sums.
Weights are float32, their sums float64 in the end: a draw differs from the CPU's where its random number falls within about 1e-6 of
the border between two tokens. Source: Salmon et al., SC 2011 (Philox).
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
# Above, the difference of equal logits would become no number; whatever is not likeliest has no weight long before.
STEEPEST = 1e30
# Of a logit in float32, that tell it from any other.
KEY_BITS = {torch.float32: 32, torch.float16: 32, torch.bfloat16: 16}

_LOG2_E, _STEEPEST = tl.constexpr(LOG2_E), tl.constexpr(STEEPEST)
_FIRST_FACTOR, _SECOND_FACTOR = tl.constexpr(0xD2E7470EE14C6C93), tl.constexpr(0xCA5A826395121157)
_KEY_STEP, _OTHER_KEY_STEP = tl.constexpr(0x9E3779B97F4A7C15), tl.constexpr(0xBB67AE8584CAA73B)


@triton.jit
def _uniform(seed, position):
    """See `sampler.uniform`: the first word of Philox 4x64 with ten rounds, of which NumPy counts up before."""
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
    """The sums of what a row's programs have, [16] float64 each. All of them ask in the same order, and run at the same time.

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
        seen = tl.atomic_add(count, 1, sem="release", scope="gpu") + 1
        while seen < (turn + 1) * number:
            seen = tl.atomic_add(count, 0, sem="acquire", scope="gpu")
        tl.debug_barrier()
        parts = tl.arange(0, MOST_PARTS)[:, None]
        theirs = tl.load(places + parts * 16 + columns[None, :], mask=parts < number, other=0.0, cache_modifier=".cg")
        own = tl.sum(theirs, axis=0)  # in the same order in every program
    return own, turn + 1


@triton.jit
def _total(row, least, first_key, turn, SIZE, KEY_BITS, BLOCK, MOST_PARTS):
    """Weights of at least `least`, of keys from first_key on."""
    logits, largest, slope, board = row
    total = tl.zeros([BLOCK], tl.float32)
    begin, end = _span(SIZE, BLOCK)
    for first in range(begin, end, BLOCK):
        values = _values(logits, first, SIZE, BLOCK)
        weights = _weight(values, largest, slope)
        total += tl.where((weights >= least) & (_key(values, KEY_BITS) >= first_key), weights, 0.0)
    own = tl.where(tl.arange(0, 16) == 0, tl.sum(total.to(tl.float64)), 0.0)
    totals, turn = _of_all(own, board, turn, MOST_PARTS)
    return tl.sum(totals), turn


@triton.jit
def _search(
    row, target, turn, IS_COUNT: tl.constexpr, IS_STRICT: tl.constexpr, SIZE, KEY_BITS: tl.constexpr, BLOCK, MOST_PARTS
):
    """The last key such that it and those above hold the target, or, strict, more. Returns: it, what those above it hold, the turn.

    IS_COUNT: they hold their number, else their weights.
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
            amounts = tl.full([BLOCK], 1.0, tl.float32) if IS_COUNT else _weight(values, largest, slope)
            sums += tl.where(_key(values, KEY_BITS)[None, :] >= borders[:, None], amounts[None, :], 0.0)
        totals, turn = _of_all(tl.sum(sums, axis=1).to(tl.float64), board, turn, MOST_PARTS)
        is_met = totals > target if IS_STRICT else totals >= target
        number = tl.sum(((steps > 0) & is_met).to(tl.int32))
        above = tl.where(number < 15, tl.sum(tl.where(steps == number + 1, totals, 0.0)), above)
        low += number << shift
    return low, above, turn


@triton.jit
def _amounts(row, first, least, key, IS_TIE: tl.constexpr, SIZE, KEY_BITS, BLOCK):
    logits, largest, slope, _ = row
    values = _values(logits, first, SIZE, BLOCK)
    if IS_TIE:
        return (_key(values, KEY_BITS) == key).to(tl.float64)
    weights = _weight(values, largest, slope)
    return tl.where(weights >= least, weights, 0.0).to(tl.float64)


@triton.jit
def _locate(row, least, key, target, place, turn, IS_TIE: tl.constexpr, SIZE, KEY_BITS, BLOCK, MOST_PARTS):
    """Store at `place` the first column whose amount takes the sum of those up to it above the target; the last one that has any, if
    rounding leaves none; nothing, if none has.

    IS_TIE: columns of the key have 1, others nothing; else they have their weights, of at least `least`.
    """
    parts = tl.arange(0, 16)
    total = tl.full([], 0.0, tl.float64)
    begin, end = _span(SIZE, BLOCK)
    for first in range(begin, end, BLOCK):
        total += tl.sum(_amounts(row, first, least, key, IS_TIE, SIZE, KEY_BITS, BLOCK))
    totals, turn = _of_all(tl.where(parts == tl.program_id(1), total, 0.0), row[3], turn, MOST_PARTS)
    is_past_it = (tl.cumsum(totals) > target) & (totals > 0.0)
    last_part = tl.max(tl.where(totals > 0.0, parts, -1))
    if tl.program_id(1) == tl.minimum(tl.min(tl.where(is_past_it, parts, 16)), last_part):
        running = tl.sum(tl.where(parts < tl.program_id(1), totals, 0.0))
        before, found = running, begin
        for first in range(begin, end, BLOCK):
            total = tl.sum(_amounts(row, first, least, key, IS_TIE, SIZE, KEY_BITS, BLOCK))
            is_it = (running <= target) & (total > 0.0)
            found, before = tl.where(is_it, first, found), tl.where(is_it, running, before)
            running += total
        amounts = _amounts(row, found, least, key, IS_TIE, SIZE, KEY_BITS, BLOCK)
        columns = found + tl.arange(0, BLOCK)
        is_past = (before + tl.cumsum(amounts) > target) & (amounts > 0.0)
        last = tl.max(tl.where(amounts > 0.0, columns, -1))
        tl.store(place, tl.minimum(tl.min(tl.where(is_past, columns, 2147483647)), last))


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
    lowest = tl.full([], -(1 << (KEY_BITS - 1)), tl.int32)
    turn = tl.full([], 0, tl.int32)
    if (top_k < SIZE) | (top_p < 1.0):
        total, turn = _total(row, 0.0, lowest, turn, SIZE, KEY_BITS, BLOCK, MOST_PARTS)
        if top_k < SIZE:
            key, count, turn = _search(row, top_k, turn, True, False, SIZE, KEY_BITS, BLOCK, MOST_PARTS)
            each = _weight(_value(key, KEY_BITS), largest, slope)
            total, turn = _total(row, 0.0, key + 1, turn, SIZE, KEY_BITS, BLOCK, MOST_PARTS)
            total += (top_k - count) * each
        end = total
        if top_p < 1.0:
            wanted = top_p * total
            key, above, turn = _search(row, wanted, turn, False, False, SIZE, KEY_BITS, BLOCK, MOST_PARTS)
            each = _weight(_value(key, KEY_BITS), largest, slope).to(tl.float64)
            nucleus = above + tl.maximum(tl.ceil((wanted - above) / each), 1.0) * each
            end = tl.where(nucleus < total, nucleus, total)
        if min_p > 0.0:
            likely, turn = _total(row, least, lowest, turn, SIZE, KEY_BITS, BLOCK, MOST_PARTS)
            end = tl.minimum(end, likely)
        target = number * end
        key, above, turn = _search(row, target, turn, False, True, SIZE, KEY_BITS, BLOCK, MOST_PARTS)
        each = _weight(_value(key, KEY_BITS), largest, slope).to(tl.float64)
        nth = tl.floor((target - above) / each)
        _locate(row, 0.0, key, nth, place, turn, True, SIZE, KEY_BITS, BLOCK, MOST_PARTS)
    else:
        total, turn = _total(row, least, lowest, turn, SIZE, KEY_BITS, BLOCK, MOST_PARTS)
        _locate(row, least, lowest, number * total, place, turn, False, SIZE, KEY_BITS, BLOCK, MOST_PARTS)


def num_parts(num_rows: int, device: torch.device) -> int:
    """Returns: programs that look through a row; all rows' run at the same time, as they wait for each other."""
    if device.type != "cuda":
        return 1
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(MOST_PARTS, 1 << (processors // num_rows).bit_length() - 1)) if num_rows <= processors else 1


def draw(logits: torch.Tensor, rows: torch.Tensor, parameters: torch.Tensor, chosen: torch.Tensor) -> None:
    """Replace likeliest tokens by drawn ones.

    Args:
        logits: [any, vocab_size].
        rows: [m] int32, of logits, one a draw.
        parameters: [m, NUM_PARAMETERS] int64: PLACE in `chosen`, SEED and POSITION (see `sampler.uniform`), TOP_K (from vocab_size on
            all), and, as bits of float64, TEMPERATURE (> 0), TOP_P (from 1 on all) and MIN_P.
        chosen: [any] int32, the likeliest of each row; below 0 it stays, as there is none.
    """
    boards = torch.zeros((len(rows), 1 + 2 * MOST_PARTS, 16), dtype=torch.float64, device=logits.device)
    sizes = logits.shape[1], KEY_BITS[logits.dtype], BLOCK, NUM_PARAMETERS, MOST_PARTS
    grid = len(rows), num_parts(len(rows), logits.device)
    launch(_draw, grid, logits, rows, parameters, chosen, boards, *sizes, num_warps=NUM_WARPS, launch_pdl=IS_CHAINED)
