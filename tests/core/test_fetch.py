"""A prefix is fetched where that is sooner than computing it."""

from __future__ import annotations

from fastdeploy_pd.core.fetch import FetchRule
from fastdeploy_pd.core.predictor import Predictor

PREDICTOR = Predictor(prefill=(0.0, 1e-3, 0.0), decode=(0.0, 0.0, 0.0))  # 1 ms a token


def test_tokens_decide_while_a_speed_is_unknown() -> None:
    rule = FetchRule(min_tokens=100)
    assert rule.is_sooner("p", 10, 0, 100, None) and not rule.is_sooner("p", 9, 0, 99, None)
    assert rule.is_sooner("p", 10, 0, 100, PREDICTOR) and not rule.is_sooner("p", 9, 0, 99, PREDICTOR)
    rule.observe("p", 10, wire_s=9.0, total_s=10.0)
    assert rule.is_sooner("p", 10, 0, 100, None)
    assert not FetchRule(0).is_sooner("p", 10, 0, 10**6, None)
    assert not rule.is_sooner("p", 0, 50, 50, None)


def test_link_speed_is_held_against_the_prediction() -> None:
    rule = FetchRule(min_tokens=100)
    rule.observe("fast", 10, wire_s=0.01, total_s=0.02)  # 10 ms and 1 ms a block of 10 tokens
    rule.observe("slow", 10, wire_s=0.2, total_s=0.21)
    assert rule.is_sooner("fast", 2, 0, 20, PREDICTOR)  # 12 ms against 20 ms
    assert not rule.is_sooner("fast", 1, 0, 10, PREDICTOR)  # 11 ms against 10 ms
    assert not rule.is_sooner("slow", 10, 0, 100, PREDICTOR)


def test_one_bad_moment_is_not_believed_for_ever() -> None:
    rule = FetchRule(min_tokens=100)
    rule.observe("p", 10, wire_s=0.1, total_s=5.0)
    declined = 0
    while not rule.is_sooner("p", 10, 0, 100, PREDICTOR):
        declined += 1
        assert declined < 100
    assert declined > 10


def test_newer_measurements_count_more() -> None:
    rule = FetchRule(min_tokens=100)
    rule.observe("p", 10, wire_s=0.1, total_s=1.0)
    for _ in range(20):
        rule.observe("p", 10, wire_s=0.01, total_s=0.02)
    assert rule.is_sooner("p", 10, 0, 100, PREDICTOR)
