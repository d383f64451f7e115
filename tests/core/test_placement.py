"""Load spreads, nobody herds, mixed instances take part."""

from __future__ import annotations

import random

from fastdeploy_pd.core.placement import Candidate, FewestTokens, Placement, RoundRobin


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
