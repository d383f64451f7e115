"""The device's sampler against the CPU's, token by token; torch's CPU stands in for a GPU."""

from __future__ import annotations

import numpy as np
import pytest

from fastdeploy_pd.model.sampler import draw as draw_one
from fastdeploy_pd.model.sampler import uniform
from fastdeploy_pd.request import Request, SamplingParams

torch = pytest.importorskip("torch")
from fastdeploy_pd.model.device_sampler import Draw, can_draw  # noqa: E402

SETTINGS = [
    {},
    {"top_k": 1},
    {"top_k": 20},
    {"top_k": 5000},
    {"top_p": 0.9},
    {"top_p": 0.01},
    {"min_p": 0.3},
    {"top_k": 50, "top_p": 0.7, "min_p": 0.05},
]


@pytest.mark.parametrize("temperature", [0.2, 1.0, 2.0])
@pytest.mark.parametrize("is_coarse", [False, True], ids=["distinct", "many equal"])
def test_tokens_are_those_of_the_cpu(temperature: float, is_coarse: bool) -> None:
    logits = torch.from_numpy(np.random.default_rng(1).normal(0, 3, (40, 3000)).astype(np.float32))
    logits = logits.round() if is_coarse else logits
    requests = []
    for row in range(len(logits)):
        sampling = SamplingParams(temperature=temperature, seed=row, **SETTINGS[row % len(SETTINGS)])  # type: ignore[arg-type]
        request = Request(str(row), [1, 2, 3], sampling, output_token_ids=[7] * (row % 5))
        request.local.num_pending_tokens = row % 2
        assert can_draw(sampling)
        requests.append(request)
    requests[9].sampling = SamplingParams(temperature=0.0)
    chosen = torch.cat([logits.argmax(-1).int(), torch.tensor([5, 5], dtype=torch.int32)])
    likeliest = chosen.clone()
    chosen[17] = -1
    step = Draw(requests, logits.shape[1], logits.device)
    for request in requests:
        request.local.num_pending_tokens += 1  # as the engine does before the logits are there
    order = np.random.default_rng(2).permutation(len(requests))
    step.apply(logits[torch.from_numpy(np.argsort(order))], chosen, order)
    for row, request in enumerate(requests):
        position = len(request.output_token_ids) + request.local.num_pending_tokens - 1
        wanted = (
            draw_one(logits[row].numpy(), request.sampling, uniform(request.sampling.seed, position))
            if row != 9
            else likeliest[9]
        )
        assert chosen[row] == (-1 if row == 17 else wanted), request.sampling
    assert chosen[40:].tolist() == [5, 5]
    assert (chosen[:40] != likeliest[:40]).sum() > (3 if temperature < 1 else 10)


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
