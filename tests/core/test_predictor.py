from __future__ import annotations

import random

import pytest

from fastdeploy_pd.core.predictor import Predictor, fit
from fastdeploy_pd.errors import ConfigError

TRUE = Predictor((1.45e-9, 1.01e-4, 0.02), (2.5e-8, 3e-5, 0.011))


def samples(noise: float, rng: random.Random) -> tuple[list[tuple[int, float]], list[tuple[int, int, float]]]:
    lengths = [rng.randrange(16, 100_000) for _ in range(200)]
    batches = [(b, b * rng.randrange(100, 30_000)) for b in (rng.randrange(1, 200) for _ in range(200))]
    return (
        [(n, TRUE.prefill_s(n) * rng.uniform(1 - noise, 1 + noise)) for n in lengths],
        [(b, kv, TRUE.decode_s(b, kv) * rng.uniform(1 - noise, 1 + noise)) for b, kv in batches],
    )


def test_exact_samples_give_the_coefficients_back() -> None:
    found = fit(*samples(0.0, random.Random(1)))
    assert found.prefill == pytest.approx(TRUE.prefill, rel=1e-6)
    assert found.decode == pytest.approx(TRUE.decode, rel=1e-6)


def test_noisy_samples_predict_within_the_noise() -> None:
    found = fit(*samples(0.1, random.Random(2)))
    for n in (64, 2_000, 30_000, 120_000):
        assert found.prefill_s(n) == pytest.approx(TRUE.prefill_s(n), rel=0.05)
    assert found.decode_s(64, 250_000) == pytest.approx(TRUE.decode_s(64, 250_000), rel=0.05)


def test_chunks_add_up_but_for_what_each_costs_by_itself() -> None:
    whole = TRUE.prefill_s(10_000)
    parts = TRUE.prefill_s(4_000) + TRUE.prefill_s(10_000, 4_000)
    assert parts == pytest.approx(whole + TRUE.prefill[2])


@pytest.mark.parametrize("prefills", [[], [(5, 1.0), (9, 2.0)], [(5, 1.0)] * 9])
def test_too_few_samples_are_an_error(prefills: list[tuple[int, float]]) -> None:
    with pytest.raises(ConfigError, match="prefill samples"):
        fit(prefills, [(1, 10, 1.0), (2, 30, 1.0), (5, 9, 2.0)])


def test_later_parts_of_prompts_count() -> None:
    rng = random.Random(3)
    parts = [(m + 2_000, m) for m in (rng.randrange(1, 60_000) for _ in range(40))]
    chunks = [(n, m, TRUE.prefill_s(n, m)) for n, m in parts]
    found = fit([(100, TRUE.prefill_s(100))], samples(0.0, rng)[1], chunks)
    assert found.prefill == pytest.approx(TRUE.prefill, rel=1e-5)


def test_no_coefficient_is_negative() -> None:
    falling = [(n, 1.0 / n) for n in (10, 20, 40, 80)]
    assert min(fit(falling, [(1, 10, 1.0), (2, 30, 0.5), (5, 9, 0.2)]).prefill) == 0
    slower_than_its_square = [(n, 1e-3 * n - 2e-9 * n * n + 0.1) for n in (100, 1_000, 10_000, 50_000)]
    found = fit(slower_than_its_square, samples(0.0, random.Random(4))[1])
    assert found.prefill[0] == 0
    for n, seconds in slower_than_its_square:
        assert found.prefill_s(n) == pytest.approx(seconds, rel=0.1)


@pytest.mark.parametrize("prefill", [TRUE.prefill, (0, 1e-4, 0.02), (1e-9, 0, 0.02), (1e-9, 0, 0)])
def test_the_tokens_of_a_time_take_this_time(prefill: tuple[float, float, float]) -> None:
    predictor = Predictor(prefill, TRUE.decode)
    for num_computed in (0, 5_000):
        num = predictor.tokens_within(1.5, num_computed)
        assert num > 0
        assert predictor.prefill_s(num_computed + num, num_computed) == pytest.approx(1.5, rel=1e-3)
    assert Predictor((0, 0, 0.02), TRUE.decode).tokens_within(1.5, 0) > 10**9
    assert predictor.tokens_within(0.0, 0) == 0
