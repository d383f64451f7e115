"""Which token is chosen, and that it depends on the logits, the parameters, the seed and the position alone."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from fastdeploy_pd.errors import FastDeployPDError
from fastdeploy_pd.model.sampler import adjust, can_draw, draw, likeliest, sample, token_logprobs, uniform
from fastdeploy_pd.request import Request, SamplingParams

LOGITS = np.log(np.array([0.4, 0.1, 0.3, 0.05, 0.15], np.float32))


def request_with(
    prompt: tuple[int, ...] = (), output: tuple[int, ...] = (), eos: tuple[int, ...] = (), **sampling: Any
) -> Request:
    params = SamplingParams(**{"max_tokens": 100, **sampling})
    return Request("r", list(prompt), params, eos, output_token_ids=list(output))


def drawn(logits: np.ndarray, count: int = 4000, **sampling: Any) -> np.ndarray:
    """Returns: [vocab_size] how often each token was drawn, as a share, over `count` positions."""
    params = SamplingParams(max_tokens=1, **sampling)
    tokens = [draw(logits, params, uniform(5, position)) for position in range(count)]
    return np.bincount(tokens, minlength=len(logits)) / count


def test_random_numbers_are_fixed_for_good() -> None:
    """Two versions of this program, on any machine, must continue each other's requests."""
    assert [uniform(7, 0), uniform(7, 1), uniform(-7, 1), uniform(2**63 - 1, 10**6)] == [
        0.8720734548204873,
        0.0828426870273763,
        0.24365675433256784,
        0.1653810847067234,
    ]


def test_random_numbers_differ_by_seed_and_position_and_are_even() -> None:
    seeds = (-(2**63), -2, -1, 0, 1, 2**32, 2**53 + 1, 2**53, 2**63 - 1)
    numbers = [uniform(seed, position) for seed in seeds for position in range(200)]
    assert len(set(numbers)) == len(numbers)
    assert all(0.0 <= n < 1.0 for n in numbers)
    counts, _ = np.histogram(numbers, bins=10, range=(0, 1))
    assert counts.min() > 130  # 180 expected, standard deviation 13
    assert counts.max() < 230


def test_the_draw_depends_on_seed_and_position_alone() -> None:
    logits = np.random.default_rng(0).normal(size=500).astype(np.float32)
    one = [sample(logits, request_with((1, 2), tuple(range(n)), seed=11)) for n in range(50)]
    other = [sample(logits, request_with((9,), tuple(range(100, 100 + n)), seed=11)) for n in range(50)]
    assert one == other
    assert one != [sample(logits, request_with((1, 2), tuple(range(n)), seed=12)) for n in range(50)]
    assert len(set(one)) > 25


def test_greedy_takes_the_lowest_of_equals() -> None:
    logits = np.array([0.0, 2.0, 1.0, 2.0], np.float32)
    assert sample(logits, request_with(temperature=0.0)) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_an_error(bad: float, temperature: float) -> None:
    logits = LOGITS.copy()
    logits[3] = bad
    with pytest.raises(FastDeployPDError, match="request r: the largest logit is"):
        sample(logits, request_with(temperature=temperature))


def test_no_token_left_is_an_error() -> None:
    with pytest.raises(FastDeployPDError, match="largest logit is -inf"):
        sample(LOGITS, request_with(min_tokens=1, stop_token_ids=(0, 1, 2, 3, 4)))


def test_distribution_is_the_softmax() -> None:
    assert drawn(LOGITS) == pytest.approx(np.exp(LOGITS), abs=0.03)  # standard deviation <= 0.008


def test_temperature() -> None:
    expected = np.exp(LOGITS) ** 2 / (np.exp(LOGITS) ** 2).sum()
    assert drawn(LOGITS, temperature=0.5) == pytest.approx(expected, abs=0.03)
    assert drawn(LOGITS, temperature=1e-6)[0] == 1.0


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        ({"top_k": 1}, {0}),
        ({"top_k": 3}, {0, 2, 4}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.0}, {0}),
        ({"top_p": 0.39}, {0}),
        ({"top_p": 0.41}, {0, 2}),
        ({"top_p": 0.84}, {0, 2, 4}),
        ({"min_p": 0.7}, {0, 2}),
        ({"min_p": 1.0}, {0}),
        ({"min_p": 0.2}, {0, 1, 2, 4}),
        ({"top_k": 2, "top_p": 0.5}, {0}),  # 0.4 of the 0.7 that top_k leaves is enough
        ({"top_p": 0.84, "min_p": 0.7}, {0, 2}),
    ],
)
def test_kept_sets(sampling: dict[str, Any], kept: set[int]) -> None:
    shares = drawn(LOGITS, 1000, **sampling)
    assert set(np.flatnonzero(shares).tolist()) == kept
    expected = np.where([i in kept for i in range(5)], np.exp(LOGITS), 0)
    assert shares == pytest.approx(expected / expected.sum(), abs=0.06)


def test_equal_logits_at_the_edge_are_taken_by_rising_id() -> None:
    logits = np.zeros(5000, np.float32)
    logits[4000] = 1.0
    assert likeliest(logits, 4).tolist() == [4000, 0, 1, 2]
    assert set(np.flatnonzero(drawn(logits, 300, top_k=3)).tolist()) == {4000, 0, 1}
    # More than the likeliest 1,024 are needed to hold half of this distribution.
    assert np.flatnonzero(drawn(logits, 2000, top_p=0.5)).max() == 4000
    others = np.flatnonzero(drawn(logits, 2000, top_p=0.5))[:-1]
    assert 2300 < others.max() <= 2500


def test_repetition_penalty_covers_prompt_and_output() -> None:
    logits = np.array([2.0, -2.0, 2.0, -2.0, 1.0], np.float32)
    changed = adjust(logits, request_with((0, 0), (1,), repetition_penalty=2.0))
    assert changed.tolist() == [1.0, -4.0, 2.0, -2.0, 1.0]
    assert logits.tolist() == [2.0, -2.0, 2.0, -2.0, 1.0]


def test_presence_and_frequency_penalties_cover_the_output() -> None:
    request = request_with((4,), (1, 1, 2), presence_penalty=0.5, frequency_penalty=0.25)
    assert adjust(np.zeros(5, np.float32), request).tolist() == [0.0, -1.0, -0.75, 0.0, 0.0]


def test_logit_bias() -> None:
    assert sample(LOGITS, request_with(temperature=0.0, logit_bias={3: 100.0})) == 3
    assert sample(LOGITS, request_with(temperature=0.0, logit_bias={0: -100.0})) == 2


def test_min_tokens_bans_every_end() -> None:
    params = {"temperature": 0.0, "min_tokens": 2, "stop_token_ids": (2,), "eos": (0,)}
    assert sample(LOGITS, request_with(output=(1,), **params)) == 4
    assert sample(LOGITS, request_with(output=(1, 1), **params)) == 0


def test_logprobs_are_of_the_raw_distribution() -> None:
    found = token_logprobs(LOGITS, 1, 3)
    assert found.token_id == 1
    assert found.logprob == pytest.approx(np.log(0.1), abs=1e-5)
    assert [i for i, _ in found.top] == [0, 2, 4]
    assert [p for _, p in found.top] == pytest.approx(np.log([0.4, 0.3, 0.15]), abs=1e-5)
    assert token_logprobs(LOGITS, 1, 0).top == ()
    assert len(token_logprobs(LOGITS, 1, 20).top) == 5


def test_greedy_is_cheap_on_a_large_vocabulary() -> None:
    logits = np.random.default_rng(0).normal(size=150_000).astype(np.float32)
    request = request_with(temperature=0.0)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        sample(logits, request)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.3e-3


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
def test_what_a_device_cannot_draw(sampling: SamplingParams) -> None:
    assert not can_draw(sampling)
