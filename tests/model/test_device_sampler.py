"""The device's sampler against the CPU's, token by token.

On a GPU; elsewhere by Triton's interpreter where Triton is installed (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

from fastdeploy_pd.model.sampler import can_draw, uniform
from fastdeploy_pd.model.sampler import draw as draw_one
from fastdeploy_pd.request import Request, SamplingParams

torch = pytest.importorskip("torch")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU here, and TRITON_INTERPRET is not 1", allow_module_level=True)
pytest.importorskip("triton")

from fastdeploy_pd.model.device_sampler import Draw  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SETTINGS: list[dict[str, Any]] = [
    {},
    {"top_k": 1},
    {"top_k": 20},
    {"top_k": 5000},
    {"top_p": 0.9},
    {"top_p": 0.01},
    {"min_p": 0.3},
    {"top_k": 50, "top_p": 0.7, "min_p": 0.05},
    {"top_p": 0.999999999},
    {"top_k": 700, "min_p": 1.0},
    {"top_p": 0.0},
    {"top_p": 1e-12, "min_p": 0.001},
    {"top_k": 2**31 - 1},
]


def wanted_token(logits: torch.Tensor, request: Request, likeliest: int) -> int:
    """What the CPU draws."""
    if request.sampling.temperature == 0.0:
        return likeliest
    position = len(request.output_token_ids) + request.local.num_pending_tokens - 1
    return draw_one(logits.float().numpy(), request.sampling, uniform(request.sampling.seed, position))


def drawn(logits: torch.Tensor, requests: list[Request], chosen: torch.Tensor, order: np.ndarray) -> torch.Tensor:
    """What the device makes of `chosen`, of logits whose rows are in some other order."""
    step = Draw(requests, logits.shape[1], DEVICE)
    for request in requests:
        request.local.num_pending_tokens += 1  # as the engine does before the logits are there
    on_device = chosen.to(DEVICE)
    step.apply(logits[torch.from_numpy(np.argsort(order))].to(DEVICE), on_device, order)
    return on_device.cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1e-30, 0.2, 1.0, 2.0])
@pytest.mark.parametrize("kind", ["distinct", "many equal", "large", "zeros"])
def test_tokens_are_those_of_the_cpu(dtype: torch.dtype, temperature: float, kind: str) -> None:
    values = np.random.default_rng(1).normal(0, 3, (40, 3000)).astype(np.float32)
    values[20:30] -= 40  # all below zero
    if kind == "large":
        values *= 1000
    if kind == "zeros":
        values = np.copysign(np.where(np.abs(values) < 4, 0, 1), values)
    logits = torch.from_numpy(values.round() if kind == "many equal" else values).to(dtype)
    logits[:, 7::9] = -torch.inf
    requests = []
    for row in range(len(logits)):
        sampling = SamplingParams(temperature=temperature, seed=row, **SETTINGS[row % len(SETTINGS)])
        request = Request(str(row), [1, 2, 3], sampling, output_token_ids=[7] * (row % 5))
        request.local.num_pending_tokens = row % 2
        assert can_draw(sampling)
        requests.append(request)
    requests[9].sampling = SamplingParams(temperature=0.0)
    likeliest = logits.float().argmax(-1).int()
    chosen = torch.cat([likeliest, torch.tensor([5, 5], dtype=torch.int32)])
    chosen[17] = -1
    chosen = drawn(logits, requests, chosen, np.random.default_rng(2).permutation(len(requests)))
    for row, request in enumerate(requests):
        wanted = -1 if row == 17 else wanted_token(logits[row], request, int(likeliest[row]))
        assert chosen[row] == wanted, request.sampling
    assert chosen[40:].tolist() == [5, 5]
    if kind == "distinct" and temperature >= 0.2:
        assert (chosen[:40] != likeliest).sum() > (3 if temperature < 1 else 10)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="no GPU here: elsewhere one program looks through a row")
@pytest.mark.parametrize("num_rows", [1, 7, 9, 30, 70, 140, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_programs_that_share_a_row(num_rows: int, dtype: torch.dtype) -> None:
    """Up to 16 of them, in any number, with pieces of which some have nothing; then one for each row."""
    rng, size = np.random.default_rng(num_rows), 151_936
    num_other = num_drawn = 0
    for turn in range(4 * len(SETTINGS) // num_rows + 1):
        logits = torch.from_numpy(rng.normal(0, 2.5, (num_rows, size)).astype(np.float32)).to(dtype)
        logits[:, turn * 20_000 : turn * 30_000] = -torch.inf
        requests = []
        for row in range(num_rows):
            settings = SETTINGS[(turn * num_rows + row) % len(SETTINGS)]
            sampling = SamplingParams(temperature=0.9, seed=turn * 1000 + row, **settings)
            requests.append(Request(str(row), [1], sampling))
        likeliest = logits.float().argmax(-1).int()
        tokens = drawn(logits, requests, likeliest.clone(), np.arange(num_rows))
        for row in range(min(num_rows, 30)):
            num_other += int(tokens[row]) != wanted_token(logits[row], requests[row], int(likeliest[row]))
            num_drawn += 1
    assert num_other <= 1 + num_drawn // 100  # by rounding


def test_random_numbers_are_those_of_the_cpu() -> None:
    seeds = [0, 1, 12345, 2**31, 2**63 - 1, -1, -(2**63)]
    positions = [0, 1, 1000, 2**31]
    sampling = [SamplingParams(seed=seed) for seed in seeds]
    size = 1 << 16  # of equal logits: a draw has 16 bits of its number
    requests = [Request(str(i), [1], one) for i, one in enumerate(sampling)]
    for position in positions:
        for request in requests:
            request.local.num_pending_tokens = position
        chosen = torch.zeros(len(requests), dtype=torch.int32, device=DEVICE)
        logits = torch.zeros((1, size), device=DEVICE)
        Draw(requests, size, DEVICE).apply(logits, chosen, np.zeros(len(requests), int))
        assert chosen.tolist() == [int(uniform(seed, position) * size) for seed in seeds]


def test_draws_are_distributed_as_the_logits_say() -> None:
    shares = np.array([0.5, 0.25, 0.15, 0.1])
    logits = torch.full((1, 2500), -torch.inf)
    logits[0, [2400, 3, 1200, 77]] = torch.from_numpy(np.log(shares)).float()
    count = 4000 if DEVICE.type == "cuda" else 400
    requests = [Request("", [1], SamplingParams(seed=seed, top_p=0.85)) for seed in range(count)]
    chosen = torch.full((count,), 2400, dtype=torch.int32, device=DEVICE)
    Draw(requests, logits.shape[1], DEVICE).apply(logits.to(DEVICE), chosen, np.zeros(count, int))
    tokens = chosen.cpu().numpy()
    for token, share in zip((2400, 3, 1200, 77), (0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0.0), strict=True):
        assert abs((tokens == token).mean() - share) <= 4 * (share * (1 - share) / count) ** 0.5
