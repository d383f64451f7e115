"""The GPU's kernels against plain formulas in float64, with NaN wherever nothing may be read.

On a GPU as they are; elsewhere by Triton's interpreter where Triton is installed (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import os

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU here, and TRITON_INTERPRET is not 1", allow_module_level=True)
pytest.importorskip("triton")

from fastdeploy_pd.core.layout import KVLayout  # noqa: E402
from fastdeploy_pd.errors import ConfigError  # noqa: E402
from fastdeploy_pd.model.kernels import attention, choice, heads, linear, rows  # noqa: E402
from fastdeploy_pd.model.ops.cuda import CudaOps, row_counts, usual_rows  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TYPES = [torch.float32, torch.bfloat16, torch.float16] if DEVICE == "cuda" else [torch.float32]
FP8 = torch.float8_e4m3fn
CACHES = [(dtype, kind) for dtype in TYPES for kind in (dtype, FP8)]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}
EPS = 1e-5


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def check(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Relative to the largest value; every element was written."""
    assert not got.isnan().any()
    error = (got.double() - wanted).abs().max() / wanted.abs().max()
    assert error <= TOLERANCE[got.dtype], float(error)


def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    x = x.double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight.double()


@pytest.mark.parametrize("most", [1, 17, 600, 8448])
def test_every_step_has_a_number_of_rows_that_is_prepared_for(most: int) -> None:
    counts = row_counts(most)
    assert counts == sorted(set(counts), reverse=True) and len(counts) <= 32 + most // 128
    for num_rows in range(1, most + 1):
        usual = usual_rows(num_rows)
        assert usual in counts
        assert num_rows <= usual < 1.25 * num_rows + 16


@pytest.mark.parametrize("dtype", TYPES)
def test_rows(dtype: torch.dtype) -> None:
    x, weight = random(5, 96, dtype=dtype), random(96, dtype=dtype)
    check(rows.rms_norm(x, weight, EPS), normed(x, weight))
    gate, up = x.double().chunk(2, dim=-1)
    check(rows.swiglu(x), torch.nn.functional.silu(gate) * up)
    table, ids = random(50, 96, dtype=dtype), torch.tensor([3, 0, 49, 7], dtype=torch.int32, device=DEVICE)
    assert rows.embedding(table, ids).equal(table[ids.long()])
    source = torch.tensor([-1, 1, -1, 0], dtype=torch.int32, device=DEVICE)
    sampled = torch.tensor([11, 12], dtype=torch.int32, device=DEVICE)
    assert rows.embedding(table, ids, source, sampled).equal(table[[3, 12, 49, 11]])
    sampled[1] = choice.NO_TOKEN  # the step before had no token for a sequence, and this one is queued already
    assert rows.embedding(table[1:], 0 * ids, source, sampled).equal(table[[1, 1, 1, 12]])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("num_rows", [1, 2, 16])
@pytest.mark.parametrize("num_in", [96, 512])
@pytest.mark.parametrize("is_swiglu", [False, True])
@pytest.mark.parametrize("has_extras", [False, True])
def test_products_of_few_rows(
    dtype: torch.dtype, num_rows: int, num_in: int, is_swiglu: bool, has_extras: bool
) -> None:
    num_out = 40
    x, weight = random(num_rows, num_in, dtype=dtype), random(num_out * (1 + is_swiglu), num_in, dtype=dtype)
    norm, bias = random(num_in, dtype=dtype), random(num_out, dtype=dtype)
    residual = random(num_rows, num_out, dtype=dtype)
    wanted = (normed(x, norm) if has_extras else x.double()) @ weight.double().T
    if is_swiglu:
        gate, up = wanted.chunk(2, dim=-1)
        wanted = torch.nn.functional.silu(gate) * up
    if has_extras:
        wanted = wanted + bias.double() + residual.double()
        got = linear.few_rows(x, weight, bias, norm, EPS, residual, is_swiglu)
    else:
        got = linear.few_rows(x, weight, is_swiglu=is_swiglu)
    check(got, wanted)


@pytest.mark.parametrize(("dtype", "kind"), CACHES)
@pytest.mark.parametrize("has_norm", [False, True])
def test_rotation_and_the_cache(dtype: torch.dtype, kind: torch.dtype, has_norm: bool) -> None:
    num_tokens, num_heads, num_kv_heads, head_dim, block_size = 6, 6, 2, 32, 16
    qkv = random(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
    norm = random(num_heads + num_kv_heads, head_dim, dtype=dtype) if has_norm else None
    cache = random(5, 2, num_kv_heads, block_size, head_dim, dtype=dtype).to(kind)
    if kind is FP8:
        qkv[1, -1] = 1000.0
        qkv[2, -1] = 0.0 if DEVICE == "cpu" else torch.nan  # which Triton's interpreter makes a number
    before, given = cache.clone(), qkv.double().view(num_tokens, -1, head_dim)
    positions = torch.tensor([0, 1, 2, 40, 7, 9], dtype=torch.int32, device=DEVICE)
    slots = torch.tensor([32, 33, 34, 0, -1, 79], dtype=torch.int32, device=DEVICE)
    angles = torch.rand(64, head_dim // 2, device=DEVICE, dtype=torch.float64) * 6
    rotation = torch.cat([angles.cos(), angles.sin()], dim=1).float()
    heads.rotate_and_store(qkv, norm, EPS, positions, slots, rotation, cache)
    turned = num_heads + num_kv_heads
    wanted = given.clone()
    if norm is not None:
        wanted[:, :turned] = normed(given[:, :turned], norm)
    first, second = wanted[:, :turned].chunk(2, dim=-1)
    cos, sin = (t[positions.long()][:, None, :] for t in (angles.cos(), angles.sin()))
    wanted[:, :turned] = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    got = qkv.view(num_tokens, -1, head_dim)
    if kind is FP8:
        assert got[1, -1, -1] == 448 and (DEVICE == "cpu" or got[2, -1, -1].isnan())
        got[2, -1, -1], wanted[2, -1, -1] = 0.0, 0.0
        exact = wanted[:, num_heads:]
        if DEVICE == "cuda":  # the interpreter loses a carry out of the mantissa
            # Half a unit in the last of 3 bits, and of the smallest numbers; what is exact differs in its last bits.
            error = (got[:, num_heads:].double() - exact.clamp(-448, 448)).abs()
            assert (error <= exact.abs().clamp(max=448) * 2**-4 * 1.02 + 2**-10).all()
        wanted[:, num_heads:] = got[:, num_heads:]
    check(qkv, wanted.flatten(1))
    written = before.float()
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            kv = got[token, num_heads:].view(2, num_kv_heads, head_dim)
            written[slot // block_size, :, :, slot % block_size] = kv
    stored = cache.float()
    if kind is FP8:
        assert DEVICE == "cpu" or stored[2, 1, -1, 2, -1].isnan()
        stored[2, 1, -1, 2, -1] = 0.0
    assert stored.equal(written)


def attended(q: torch.Tensor, cache: torch.Tensor, table: list[int], first: int) -> torch.Tensor:
    """Of q [n, heads, head_dim] at positions from `first` on, in float64."""
    keys, values = (cache.double()[table, i].transpose(0, 1).flatten(1, 2)[:, : first + len(q)] for i in (0, 1))
    group = q.shape[1] // keys.shape[0]
    scores = torch.einsum("nhd,htd->hnt", q.double(), keys.repeat_interleave(group, 0)) * q.shape[2] ** -0.5
    seen = torch.arange(scores.shape[2], device=q.device) <= first + torch.arange(len(q), device=q.device)[:, None]
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hnt,htd->nhd", weights, values.repeat_interleave(group, 0)).flatten(1)


def paged(
    lengths: list[int], num_kv_heads: int, head_dim: int, kind: torch.dtype
) -> tuple[torch.Tensor, list[list[int]]]:
    """Returns: a cache that is NaN wherever no sequence has a token, and the tables."""
    block_size = 16
    counts = [-(-length // block_size) for length in lengths]
    order = torch.randperm(sum(counts) + 3).tolist()
    cache = torch.full((len(order), 2, num_kv_heads, block_size, head_dim), torch.nan, device=DEVICE)
    tables = []
    for length, count in zip(lengths, counts, strict=True):
        table, order = order[:count], order[count:]
        tables.append(table)
        for place in range(length):
            cache[table[place // block_size], :, :, place % block_size] = torch.randn(2, num_kv_heads, head_dim)
    return cache.to(kind), tables


@pytest.mark.parametrize(("dtype", "kind"), CACHES)
@pytest.mark.parametrize("shape", [(8, 2, 32), (4, 4, 64), (3, 1, 16)])
@pytest.mark.parametrize("splits", [1, 2, 8])
def test_one_new_token_a_sequence(
    dtype: torch.dtype, kind: torch.dtype, shape: tuple[int, int, int], splits: int
) -> None:
    num_heads, num_kv_heads, head_dim = shape
    lengths = [1, 16, 17, 100, 0]
    cache, tables = paged(lengths, num_kv_heads, head_dim, kind)
    qkv = random(7, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
    padded = torch.tensor([t + [-(10**6)] * (9 - len(t)) for t in tables], dtype=torch.int32, device=DEVICE)
    order = torch.tensor([2, 0, 6, 5, 1], dtype=torch.int32, device=DEVICE)
    out = torch.full((7, num_heads * head_dim), torch.nan, device=DEVICE).to(dtype)
    on_device = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    attention.decode(qkv, order, cache, padded, on_device, out, splits)
    for row, table, length in zip(order.tolist(), tables, lengths, strict=True):
        q = qkv[row, : num_heads * head_dim].view(1, num_heads, head_dim)
        if length:
            check(out[row : row + 1], attended(q, cache, table, length - 1))
        else:
            assert not out[row].any()
    assert out[[3, 4]].isnan().all()


@pytest.mark.parametrize(("dtype", "kind"), CACHES)
@pytest.mark.parametrize("shape", [(4, 2, 32), (2, 2, 64)])
def test_prompts(dtype: torch.dtype, kind: torch.dtype, shape: tuple[int, int, int]) -> None:
    num_heads, num_kv_heads, head_dim = shape
    spans = [(0, 5), (0, 150), (30, 2), (17, 140), (64, 16)]  # position of the first new token, new tokens
    cache, tables = paged([sum(s) for s in spans], num_kv_heads, head_dim, kind)
    num_rows = sum(count for _, count in spans)
    qkv = random(num_rows, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
    tiles, row, begin = [], 0, 0
    for (start, count), table in zip(spans, tables, strict=True):
        for first in range(0, count, attention.TILE_ROWS):
            tiles.append([row + first, min(attention.TILE_ROWS, count - first), start + first, begin])
        row, begin = row + count, begin + len(table)
    flat = torch.tensor([b for t in tables for b in t], dtype=torch.int32, device=DEVICE)
    out = torch.full((num_rows, num_heads * head_dim), torch.nan, device=DEVICE).to(dtype)
    attention.prompt(qkv, torch.tensor(tiles, dtype=torch.int32, device=DEVICE), cache, flat, out)
    row = 0
    for (start, count), table in zip(spans, tables, strict=True):
        q = qkv[row : row + count, : num_heads * head_dim].view(count, num_heads, head_dim)
        check(out[row : row + count], attended(q, cache, table, start))
        row += count


@pytest.mark.parametrize("dtype", TYPES)
def test_the_likeliest(dtype: torch.dtype) -> None:
    logits = random(6, 70_000, dtype=dtype)
    logits[0, [5, 69_999]] = 100.0
    logits[1, 69_999] = 100.0
    logits[2, 7] = torch.nan
    logits[3, 8] = torch.inf
    logits[4] = -torch.inf
    chosen = torch.full((8,), 77, dtype=torch.int32, device=DEVICE)
    choice.likeliest(logits, chosen)
    assert chosen.tolist() == [5, 69_999, -1, -1, -1, int(logits[5].argmax()), 77, 77]


@pytest.mark.parametrize(
    ("block_size", "head_dim", "dtype", "allowed"),
    [
        (8, 64, "bfloat16", "a power of two of at least 16"),
        (512, 128, "bfloat16", "at most 256"),
        (256, 256, "bfloat16", "at most 128"),
        (256, 128, "float32", "at most 128"),
    ],
)
def test_a_block_that_attention_cannot_hold_is_refused(
    block_size: int, head_dim: int, dtype: str, allowed: str
) -> None:
    layout = KVLayout(1, 2, 1, block_size, head_dim, dtype)
    with pytest.raises(ConfigError, match=f"--block-size is {block_size}; on a GPU.* it must be {allowed}"):
        CudaOps.cache(CudaOps.__new__(CudaOps), None, layout)
