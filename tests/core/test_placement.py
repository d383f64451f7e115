"""Load spreads, nobody herds, mixed instances take part."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import pytest

from fastdeploy_pd.core.placement import Added, Candidate, FewestTokens, Load, Placement, RoundRobin
from fastdeploy_pd.core.predictor import Predictor

PREDICTOR = Predictor((0.0, 1e-4, 0.0), (0.0, 0.0, 0.02))


def place(*candidates: Candidate, seed: int = 0) -> Placement | None:
    return FewestTokens().place(100, candidates, random.Random(seed))


def test_who_can_serve() -> None:
    prefill, decode = Candidate("p", True, False), Candidate("d", False, True)
    both = Candidate("m", True, True)
    assert place() is None
    assert place(prefill) is None
    assert place(decode) == Placement(None, "d")
    assert place(prefill, decode) == Placement("p", "d")
    assert place(both) == Placement(None, "m")
    assert {place(prefill, both, seed=s) for s in range(30)} == {Placement(None, "m"), Placement("p", "m")}
    assert {place(prefill, decode, both, seed=s) for s in range(30)} == {Placement(None, "m"), Placement("p", "d")}


def test_the_lighter_one_wins() -> None:
    heavy, light = Candidate("d1", False, True, 5000), Candidate("d2", False, True, 100)
    prefill = Candidate("p", True, False, 0)
    assert {place(prefill, heavy, light, seed=s) for s in range(50)} == {Placement("p", "d2")}


def test_front_ends_with_stale_views_do_not_herd() -> None:
    rngs = [random.Random(i) for i in range(4)]
    load = {f"d{i}": 0 for i in range(5)}
    for _ in range(500):
        view = [Candidate(i, False, True, t) for i, t in load.items()]  # all four decide on the same, old view
        for rng in rngs:
            placement = FewestTokens().place(20, view, rng)
            assert placement is not None
            load[placement.decode_id] += 20
    assert max(load.values()) - min(load.values()) < 0.2 * max(load.values())


def test_everybody_in_turn() -> None:
    def turns(*candidates: Candidate) -> list[Placement | None]:
        policy, rng = RoundRobin(), random.Random(0)
        return [policy.place(100, candidates, rng) for _ in range(4)]

    p1, p2 = Candidate("p1", True, False), Candidate("p2", True, False, 10**6)
    d1, both = Candidate("d1", False, True), Candidate("m", True, True)
    assert turns(p1) == [None] * 4
    assert turns(d1) == [Placement(None, "d1")] * 4
    assert turns(p1, p2, d1) == [Placement("p1", "d1"), Placement("p2", "d1")] * 2
    assert turns(p1, both) == [Placement("p1", "m"), Placement(None, "m")] * 2
    d2 = Candidate("d2", False, True)
    assert turns(p1, both, d1, d2) == [
        Placement("p1", "d1"), Placement(None, "m"), Placement("p1", "d2"), Placement(None, "m")
    ]  # fmt: skip


def test_a_holder_of_the_prefix_wins_when_loads_are_alike() -> None:
    prefill = Candidate("p", True, False)
    idle, holder = Candidate("d1", False, True, 0), Candidate("d2", False, True, 100, num_cached_tokens=2000)
    assert {place(prefill, idle, holder, seed=s) for s in range(30)} == {Placement("p", "d2")}
    busy = Candidate("d2", False, True, 2500, num_cached_tokens=2000)
    assert {place(prefill, idle, busy, seed=s) for s in range(30)} == {Placement("p", "d1")}
    both = Candidate("m", True, True, 0, num_cached_tokens=2000)
    assert {place(prefill, idle, both, seed=s) for s in range(30)} == {Placement(None, "m")}


def forecast(
    elapsed_s: float,
    prompts: Sequence[tuple[float, float]] = (),
    added: Sequence[Added] = (),
    busy_s: float = 0.0,
    step_s: float = 10.0,
) -> tuple[float, list[tuple[float, float]]]:
    """Returns: for how long the device is busy, and what waits: (seconds until due, seconds it takes)."""
    found = Load(PREDICTOR, tuple(prompts), busy_s, most_step_s=step_s).forecast(elapsed_s, added)
    return round(found.busy_s, 6), [(round(d, 6), round(s, 6)) for d, s in found.prompts]


def test_prompts_begin_when_the_device_is_free() -> None:
    waits = [(1.0, 0.2), (3.0, 0.4)]
    assert forecast(0.1, waits, busy_s=0.3) == (0.2, [(0.9, 0.2), (2.9, 0.4)])
    assert forecast(0.4, waits, busy_s=0.3) == (0.5, []), "both are in the step that has begun"
    assert forecast(0.4, waits, busy_s=0.3, step_s=0.3) == (0.2, [(2.6, 0.3)]), "... or as much as it has room for"
    assert forecast(0.75, waits, busy_s=0.3, step_s=0.3) == (0.15, [])
    assert forecast(2.0, waits) == (0.0, [])


def test_what_was_placed_since_a_report_begins_when_it_came() -> None:
    late = Added(0.5, 9.0, 0.2)
    assert forecast(0.4, added=[Added(0.4, 9.0, 0.2)]) == (0.2, [])
    assert forecast(0.6, added=[late]) == (0.1, [])
    assert forecast(0.6, [(5.0, 0.4)], [late], busy_s=0.2) == (0.0, [(8.4, 0.2)]), "the step before ends just then"
    assert forecast(0.61, [(5.0, 0.4)], [late], busy_s=0.2) == (0.19, [])
    stream_to_come = Added(0.0, 9.0, 0.0, 500)
    assert forecast(0.1, added=[stream_to_come]) == (0.0, [])


def test_who_is_late_already_comes_last() -> None:
    assert forecast(0.1, [(0.1, 0.3), (4.0, 0.2)], step_s=0.2) == (0.1, [(0.0, 0.3)])


@pytest.mark.parametrize("seed", range(20))
def test_a_forecast_loses_no_work(seed: int) -> None:
    rng = random.Random(seed)
    prompts = [(rng.uniform(-1, 5), rng.uniform(0.01, 0.5)) for _ in range(rng.randrange(20))]
    added = [Added(rng.uniform(0, 2), rng.uniform(0, 5), rng.uniform(0.01, 0.5)) for _ in range(rng.randrange(9))]
    busy_s, elapsed_s = rng.uniform(0, 1), rng.uniform(0, 3)
    all_s = busy_s + sum(s for _, s in prompts) + sum(a.seconds for a in added)
    left_s, waiting = forecast(elapsed_s, prompts, added, busy_s, rng.choice([0.2, 1.0, 10.0]))
    done_s = all_s - left_s - sum(s for _, s in waiting)
    assert -1e-4 <= done_s <= elapsed_s + 1e-4 and waiting == sorted(waiting)


@pytest.mark.parametrize("step_s", [0.0, 1e-9])
def test_steps_of_no_length_are_not_followed_for_ever(step_s: float) -> None:
    start_s = time.perf_counter()
    assert forecast(1e5, [(1.0, 1.0)] * 256, step_s=step_s)[0] == 0.0
    assert time.perf_counter() - start_s < 1.0
