"""What is learned of step times: from nothing, from a profile, with noise, stalls and a machine that becomes slower."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from fastdeploy_pd.core.batch import ScheduledSequence
from fastdeploy_pd.core.online import LEAST_STEPS, OnlinePredictor, _nonnegative
from fastdeploy_pd.core.placement import Load
from fastdeploy_pd.core.predictor import Predictor
from fastdeploy_pd.request import Request

TRUE = Predictor((1.45e-9, 1.01e-4, 0.02), (2.5e-8, 3e-5, 0.011))
REQUEST = Request("r", [])
Work = tuple[list[tuple[int, int]], list[int]]  # prompts' parts (start, stop); lengths of streams
PREFILL, DECODE = "prefill", "decode"


def sequences(work: Work) -> list[ScheduledSequence]:
    parts, lengths = work
    return [ScheduledSequence(REQUEST, *part) for part in (*parts, *((n - 1, n) for n in lengths))]


def step_s(predictor: Predictor, work: Work) -> float:
    """What a step takes; a prompt's part costs its c once, however many there are."""
    parts, lengths = work
    a, b, c = predictor.prefill
    seconds = sum((a * (n + m) + b) * (n - m) for m, n in parts) + (c if parts else 0.0)
    return seconds + (predictor.decode_s(len(lengths), sum(lengths)) if lengths else 0.0)


def some_work(rng: random.Random, kind: str) -> Work:
    starts = [rng.choice([0, 0, rng.randrange(1, 30_000)]) for _ in range(rng.randint(1, 3))]
    parts = [(m, m + rng.randrange(16, 4096)) for m in starts]
    lengths = [rng.randrange(100, 8000) for _ in range(rng.randrange(1, 128))]
    return (parts if kind != DECODE else [], lengths if kind != PREFILL else [])


def errors(
    online: OnlinePredictor, rng: random.Random, kinds: Sequence[str], num: int, factor: float = 1.0, noise: float = 0.0
) -> float:
    """Let it see `num` steps that take `factor` times TRUE. Returns: its mean relative error over the next ones, unseen."""
    for _ in range(num):
        work = some_work(rng, rng.choice(kinds))
        online.observe(sequences(work), factor * step_s(TRUE, work) * rng.uniform(1 - noise, 1 + noise))
    found = []
    for _ in range(100):
        work = some_work(rng, rng.choice(kinds))
        true_s = factor * step_s(TRUE, work)
        found.append(abs(step_s(online.current or Predictor((0, 0, 0), (0, 0, 0)), work) / true_s - 1))
    return sum(found) / len(found)


@pytest.mark.parametrize("kinds", [[PREFILL], [DECODE], [PREFILL, DECODE, "both"]], ids=str)
@pytest.mark.parametrize(("noise", "bound"), [(0.0, 0.01), (0.1, 0.03), (0.3, 0.09)])
@pytest.mark.parametrize("seed", range(3))
def test_it_learns_from_nothing(kinds: list[str], noise: float, bound: float, seed: int) -> None:
    rng = random.Random(seed)
    assert errors(OnlinePredictor(), rng, kinds, 200, noise=noise) < bound


@pytest.mark.parametrize("factor", [2.0, 0.5])
@pytest.mark.parametrize("kind", [PREFILL, DECODE])
@pytest.mark.parametrize("start", [None, TRUE], ids=["nothing", "profile"])
def test_a_speed_that_changes_is_followed_within_50_steps(factor: float, kind: str, start: Predictor | None) -> None:
    rng, online = random.Random(7), OnlinePredictor(start)
    assert errors(online, rng, [kind], 300, noise=0.1) < 0.03
    assert errors(online, rng, [kind], 50, factor, 0.1) < 0.05


def test_a_change_is_followed_where_steps_do_both() -> None:
    rng, online = random.Random(7), OnlinePredictor()
    errors(online, rng, [PREFILL, DECODE, "both"], 300, noise=0.1)
    assert errors(online, rng, [PREFILL, DECODE, "both"], 150, 2.0, 0.1) < 0.05


def test_stalls_move_little() -> None:
    rng, online = random.Random(3), OnlinePredictor()
    errors(online, rng, [DECODE], 200, noise=0.05)
    for _ in range(200):
        work = some_work(rng, DECODE)
        online.observe(sequences(work), step_s(TRUE, work) * (100 if rng.random() < 0.05 else 1))
    assert errors(online, rng, [DECODE], 0) < 0.12


def test_what_is_not_seen_any_more_is_not_forgotten() -> None:
    rng, online = random.Random(5), OnlinePredictor()
    errors(online, rng, [PREFILL, DECODE], 300)
    alike: Work = ([], [500])
    for _ in range(20_000):
        online.observe(sequences(alike), step_s(TRUE, alike) * rng.uniform(0.9, 1.1))
    assert errors(online, rng, [PREFILL], 0) < 0.02
    assert errors(online, rng, [DECODE], 0) < 0.25
    assert errors(online, rng, [DECODE], 60) < 0.03


def test_one_half_alone_is_known_alone() -> None:
    rng, online = random.Random(1), OnlinePredictor()
    for number in range(LEAST_STEPS):
        assert online.current is None
        work = some_work(rng, DECODE)
        observed = online.observe(sequences(work), step_s(TRUE, work))
        assert observed is None, number
    current = online.current
    assert current is not None and current.knows_decode and not current.knows_prefill
    work = some_work(rng, PREFILL)
    assert online.observe(sequences(work), step_s(TRUE, work)) is None
    work = some_work(rng, DECODE)
    observed = online.observe(sequences(work), 2 * step_s(current, work))
    assert observed is not None and (observed.kind, observed.relative_error) == (DECODE, pytest.approx(0.5))


def test_the_smaller_part_is_taken_off() -> None:
    online = OnlinePredictor(TRUE)
    mostly_prompt: Work = ([(0, 4096)], [100])
    for _ in range(50):
        observed = online.observe(sequences(mostly_prompt), 1.2 * step_s(TRUE, mostly_prompt))
    assert observed is not None and observed.kind == PREFILL and observed.relative_error < 0.03
    assert online.current is not None and online.current.decode == TRUE.decode
    mostly_streams: Work = ([(0, 16)], [8000] * 400)
    before = online.current.prefill
    assert online.observe(sequences(mostly_streams), 0.15) is not None
    assert online.current.prefill == before and online.current.decode != TRUE.decode


parts = st.lists(st.tuples(st.integers(0, 2**20), st.integers(2, 2**20)).map(lambda x: (x[0], x[0] + x[1])), max_size=3)
lengths = st.lists(st.integers(1, 2**20), max_size=5)
seconds = st.floats() | st.floats(1e-7, 1e4) | st.sampled_from([0.0, -1.0, 1e-6, 1e-5, 1e3, 5e-324])
predictors = st.none() | st.builds(
    Predictor, *[st.tuples(*[st.floats(0, 1e3) | st.just(0.0) for _ in range(3)]) for _ in range(2)]
)


@given(predictors, st.lists(st.tuples(st.tuples(parts, lengths), seconds, st.integers(1, 30)), max_size=25))
@example(TRUE, [(([], [1]), 1e-5, 400), (([], [2**20] * 5), 999.0, 400), (([], [1]), 1e-5, 400)])
@settings(max_examples=300, deadline=None)
def test_predictions_are_finite_and_not_negative(start: Predictor | None, steps: list[tuple[Work, float, int]]) -> None:
    online = OnlinePredictor(start)
    for work, duration_s, repeats in steps:
        for _ in range(repeats):
            observed = online.observe(sequences(work), duration_s)
            assert observed is None or 0 <= observed.relative_error < float("inf")
        current = online.current
        if current is None:
            continue
        assert all(0 <= c < float("inf") for c in (*current.prefill, *current.decode)), current
        for n in (1, 1000, 2**20):
            assert 0 <= current.prefill_s(n) < float("inf") and 0 <= current.decode_s(8, n) < float("inf")
            assert current.prefill_s(n, n - 1) <= current.prefill_s(2 * n, n - 1)


@given(predictors.filter(lambda p: p is not None))
def test_a_report_with_what_is_no_time_is_not_believed(predictor: Predictor) -> None:
    assert Load(predictor).is_sane
    numbers = [*predictor.prefill, *predictor.decode]
    for place in range(6):
        for value in (float("nan"), float("inf"), -1e-9):
            a, b, c, d, e, f = (value if i == place else x for i, x in enumerate(numbers))
            assert not Load(Predictor((a, b, c), (d, e, f))).is_sane


def test_a_step_costs_little() -> None:
    online, batch = OnlinePredictor(TRUE), sequences(([(0, 100)], list(range(1000, 1064))))
    best_s = float("inf")
    for _ in range(20):
        start_s = time.thread_time()
        for _ in range(500):
            online.observe(batch, 0.05)
        best_s = min(best_s, (time.thread_time() - start_s) / 500)
    assert best_s < 20e-6 * 2.5, f"{1e6 * best_s:.1f} us"  # of a machine that is slower by as much, or shared


small = st.floats(-3, 3).map(lambda x: round(x, 3))


@given(st.tuples(small, small, small), st.lists(st.tuples(small, small, small), min_size=3, max_size=3))
@example((1.0, -1.0, -3.0), [(1.0, 1.0, 1.0)] * 3)  # all zero
@settings(max_examples=500)
def test_the_nearest_nonnegative_coefficients(
    values: tuple[float, float, float], rows: list[tuple[float, float, float]]
) -> None:
    assume(min(values) < 0)
    precision, start = np.array(rows).T @ np.array(rows) + 0.1 * np.eye(3), np.array(values)
    covariance = np.linalg.inv(precision)[np.triu_indices(3)]
    distances = []
    for free in (f for size in range(4) for f in combinations(range(3), size)):  # every choice of which are 0
        point, used = np.zeros(3), list(free)
        point[used] = np.linalg.solve(precision[np.ix_(used, used)], (precision @ start)[used])
        if point.min() >= 0:
            distances.append((point - start) @ precision @ (point - start))
    found = np.array(_nonnegative(values, tuple(covariance.tolist())))
    assert found.min() >= 0
    assert (found - start) @ precision @ (found - start) <= min(distances) * (1 + 1e-6) + 1e-9
