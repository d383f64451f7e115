"""A front end of thousands of instances: who holds the prefix is seen, who is lost or drains is not, and a placement's cost stays."""

from __future__ import annotations

import random

from fastdeploy_pd.cluster.messages import Beat
from fastdeploy_pd.core.placement import Candidate, FewestTokens, Placement
from fastdeploy_pd.core.shortlist import MOST
from tests.engine.test_lookup import BLOCK, FrontEnd, front_end_over, hold, placed_on

NUM = 2000


class Seen(FewestTokens):
    """Remembers what it was shown."""

    def __init__(self) -> None:
        self.shown: list[Candidate] = []

    def place(self, num_tokens: int, candidates: list[Candidate], *args: object) -> Placement | None:  # type: ignore[override]
        """See PlacementPolicy."""
        self.shown = list(candidates)
        return super().place(num_tokens, candidates, *args)  # type: ignore[arg-type]


def many() -> tuple[FrontEnd, Seen]:
    front_end = front_end_over(*[BLOCK] * NUM)
    policy = front_end.policy = Seen()
    return front_end, policy


def test_few_are_looked_at_and_the_holder_is_among_them() -> None:
    front_end, policy = many()
    prompt = list(range(40 * BLOCK))
    for number in range(NUM):
        front_end.receive(f"m{number}", Beat(1, outstanding_tokens=100 + number), 0.1)
    hold(front_end, "m1234", prompt)
    assert placed_on(front_end, 0, [*prompt, 5]) in {c.instance_id for c in policy.shown}
    assert len(policy.shown) <= MOST
    assert [c.num_cached_tokens for c in policy.shown if c.instance_id == "m1234"] == [40 * BLOCK]
    assert {f"m{number}" for number in range(8)} <= {c.instance_id for c in policy.shown}, (
        "those with the fewest tokens"
    )


def test_who_is_gone_drains_or_has_another_role_is_not_looked_at_as_before() -> None:
    front_end, policy = many()
    for number in range(NUM - 3):
        front_end.peer_lost(f"m{number}", 0.1) if number % 2 else front_end.receive(
            f"m{number}", Beat(1, is_draining=True), 0.1
        )
    front_end.receive("m1999", Beat(1, role="prefill"), 0.2)
    placed = {placed_on(front_end, number, [number, 1, 2]) for number in range(20)}
    assert placed == {"m1997", "m1998"}
    assert {(c.instance_id, c.can_decode) for c in policy.shown} == {("m1997", True), ("m1998", True), ("m1999", False)}
    front_end.receive("m3", Beat(1), 0.3)  # it was silent only
    assert "m3" in {placed_on(front_end, number, [number, 1, 2]) for number in range(30, 70)}
    front_end.set_members([front_end._views["m1998"].instance], 0.4)
    assert {placed_on(front_end, number, [number, 1, 2]) for number in range(80, 90)} == {"m1998"}


def test_what_was_placed_counts_until_the_next_report() -> None:
    front_end, _ = many()
    front_end._rng = random.Random(3)
    placed = [placed_on(front_end, number, list(range(number, number + 200))) for number in range(NUM // 2)]
    assert len(set(placed)) == NUM // 2, "nobody gets a second one while others have none"
