"""The device's sampler against the CPU's, token by token.

On a GPU; elsewhere by Triton's interpreter where Triton is installed (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import os

import numpy as np
import pytest

from fastdeploy_pd.model.sampler import draw as draw_one
from fastdeploy_pd.model.sampler import uniform
from fastdeploy_pd.request import Request, SamplingParams

torch = pytest.importorskip("torch")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU here, and TRITON_INTERPRET is not 1", allow_module_level=True)
pytest.importorskip("triton")

from fastdeploy_pd.model.device_sampler import Draw, can_draw  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SETTINGS = [
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
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.2, 1.0, 2.0])
@pytest.mark.parametrize("is_coarse", [False, True], ids=["distinct", "many equal"])
def test_tokens_are_those_of_the_cpu(dtype: torch.dtype, temperature: float, is_coarse: bool) -> None:
    values = np.random.default_rng(1).normal(0, 3, (40, 3000)).astype(np.float32)
    values[20:30] -= 40  # all below zero
    logits = torch.from_numpy(values.round() if is_coarse else values).to(dtype)
    logits[:, 7::9] = -torch.inf
    requests = []
    for row in range(len(logits)):
        sampling = SamplingParams(temperature=temperature, seed=row, **SETTINGS[row % len(SETTINGS)])  # type: ignore[arg-type]
        request = Request(str(row), [1, 2, 3], sampling, output_token_ids=[7] * (row % 5))
        request.local.num_pending_tokens = row % 2
        assert can_draw(sampling)
        requests.append(request)
    requests[9].sampling = SamplingParams(temperature=0.0)
    chosen = torch.cat([logits.float().argmax(-1).int(), torch.tensor([5, 5], dtype=torch.int32)])
    likeliest = chosen.clone()
    chosen[17] = -1
    step = Draw(requests, logits.shape[1], DEVICE)
    for request in requests:
        request.local.num_pending_tokens += 1  # as the engine does before the logits are there
    order = np.random.default_rng(2).permutation(len(requests))
    on_device = chosen.to(DEVICE)
    step.apply(logits[torch.from_numpy(np.argsort(order))].to(DEVICE), on_device, order)
    chosen = on_device.cpu()
    for row, request in enumerate(requests):
        position = len(request.output_token_ids) + request.local.num_pending_tokens - 1
        wanted = (
            draw_one(logits[row].float().numpy(), request.sampling, uniform(request.sampling.seed, position))
            if row != 9
            else likeliest[9]
        )
        assert chosen[row] == (-1 if row == 17 else wanted), request.sampling
    assert chosen[40:].tolist() == [5, 5]
    assert (chosen[:40] != likeliest[:40]).sum() > (3 if temperature < 1 else 10)


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
    drawn = chosen.cpu().numpy()
    for token, share in zip((2400, 3, 1200, 77), (0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0.0), strict=True):
        assert abs((drawn == token).mean() - share) <= 4 * (share * (1 - share) / count) ** 0.5


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(logprobs=0),
        SamplingParams(prompt_logprobs=1),
        SamplingParams(repetition_penalty=1.1),
        SamplingParams(presence_penalty=0.1),
        SamplingParams(frequency_penalty=0.1),
        SamplingParams(logit_bias={1: 2.0}),
        SamplingParams(min_tokens=1),
    ],
)
def test_what_needs_the_cpu(sampling: SamplingParams) -> None:
    assert not can_draw(sampling)
