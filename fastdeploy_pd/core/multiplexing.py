"""SLO-aware placement: who computes a prompt so that the most first tokens come on time and no running stream falls behind.

For each instance that could take the prompt it is worked out, from the instance's predictor, what would become of everything that waits
there (`order.late`) if this prompt, less what the instance has in its prefix cache, waited too, while its streams get the share of
time that their SLO asks for. The instance with the fewest first tokens lost wins; among equals the one with the least time until this
first token plus time spent on it, so a cached prefix is followed as long as its holder is not too busy.
A prompt may be computed by a prefill instance, or by whoever generates from it (a mixed instance, or a decode instance whose streams
have the time to spare).
Source: the toggle of Tropical (DAC 2025) and the argmin of Mooncake's Conductor (FAST 2025), here in one cost, with cached prefixes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import NamedTuple

from fastdeploy_pd.core.order import WORTH_S, late, most_wait_s
from fastdeploy_pd.core.placement import NO_SLO, Candidate, FewestTokens, Placement, PlacementPolicy, RoundRobin
from fastdeploy_pd.request import Slo

MOST_SHARE = 0.9  # of an instance's time that streams may need before it takes no prompt
SAFETY = 1.05  # predictions are that much too short


class Estimate(NamedTuple):
    """What an instance would make of a prompt; less is better, in the order of the fields."""

    num_lost: int  #: first tokens that come late because of it, its own included
    cost_s: float  #: until its first token, and spent on it


class Multiplexing:
    """See the module. Until every instance has a predictor tokens decide, as in `FewestTokens`; who has computed no prompt yet is taken
    to be as slow as the slowest that has."""

    def __init__(self) -> None:
        self._by_tokens = FewestTokens()

    def place(
        self,
        num_tokens: int,
        candidates: Collection[Candidate],
        rng: random.Random,
        slo: Slo = NO_SLO,
        age_s: float = 0.0,
    ) -> Placement | None:
        """See `PlacementPolicy.place`."""
        if any(c.load is None for c in candidates):
            return self._by_tokens.place(num_tokens, candidates, rng, slo, age_s)
        due_s = most_wait_s(slo) - age_s
        if not any(c.can_decode for c in candidates):
            return None
        shuffled = sorted(candidates, key=lambda c: c.instance_id)
        rng.shuffle(shuffled)  # equals are chosen at random
        decoder = None
        if any(c.can_prefill and not c.can_decode for c in shuffled):
            decoder = min((c for c in shuffled if c.can_decode), key=lambda c: decode_cost(c, num_tokens))
        best: tuple[Estimate, Candidate] | None = None
        known = [c.load.predictor for c in shuffled if c.load and c.load.predictor.knows_prefill]
        slowest = max(known, key=lambda p: p.prefill_s(num_tokens), default=None)
        for c in shuffled:
            if c.load is None or slowest is None:
                continue
            if not c.load.predictor.knows_prefill:  # it has computed none yet, and would never learn if it got none
                c = replace(c, load=replace(c.load, predictor=replace(c.load.predictor, prefill=slowest.prefill)))
            found = estimate(c, num_tokens, due_s, slo)
            if best is None or found < best[0]:
                best = found, c
        if best is None:
            return self._by_tokens.place(num_tokens, candidates, rng, slo, age_s)
        chosen = best[1]
        if chosen.can_decode or decoder is None:
            return Placement(None, chosen.instance_id)
        return Placement(chosen.instance_id, decoder.instance_id)


#: the placement policies by the name that flags give them
PLACEMENTS: dict[str, Callable[[], PlacementPolicy]] = {
    "fewest-tokens": FewestTokens,
    "round-robin": RoundRobin,
    "slo": Multiplexing,
}


def stream_share(candidate: Candidate, slo: Slo) -> float:
    """Returns: the share of an instance's time that its streams need to keep their SLO."""
    load = candidate.load
    if load is None or slo.tpot_s is None or not load.num_streams:
        return 0.0
    return load.predictor.decode_s(load.num_streams, load.stream_tokens) / slo.tpot_s


def decode_cost(candidate: Candidate, num_tokens: int) -> tuple[bool, float]:
    """Returns: whether an instance has no room for one more stream of num_tokens, and the seconds of a step with it."""
    load = candidate.load
    if load is None:
        return False, 0.0
    has_room = load.num_seats > 0 and load.num_free_tokens >= num_tokens
    num_streams, stream_tokens = load.num_streams + load.num_ordered, load.stream_tokens + load.ordered_tokens
    return not has_room, load.predictor.decode_s(num_streams + 1, stream_tokens + num_tokens)


def estimate(candidate: Candidate, num_tokens: int, due_s: float, slo: Slo) -> Estimate:
    """Returns: what the instance would make of a prompt.

    Args:
        due_s: seconds from now until its first token is due.
    """
    load = candidate.load
    assert load is not None
    share = stream_share(candidate, slo)
    stretch = SAFETY / (1 - min(share, MOST_SHARE))
    own_s = load.predictor.prefill_s(num_tokens, min(candidate.num_cached_tokens, num_tokens - 1))
    lacking_s = max(0.0, min(WORTH_S, own_s) - load.slack_s)  # by which streams get ahead first
    wait_s = load.busy_s + lacking_s * share / (1 - min(share, MOST_SHARE))
    is_short = load.num_seats < 1 or num_tokens - candidate.num_cached_tokens > load.num_free_tokens
    spent_s = own_s * stretch * (1 if candidate.can_prefill else 2)  # a decode instance's streams feel it
    if not load.prompts:  # what follows, with nobody else to look at
        ends_s = wait_s + own_s * stretch
        return Estimate((ends_s > due_s) + is_short, ends_s + spent_s)
    jobs = [(d, s * stretch) for d, s in load.prompts]
    num_lost_before = sum(late(jobs, wait_s))
    place = next((n for n, (d, _) in enumerate(jobs) if d > due_s), len(jobs))
    jobs.insert(place, (due_s, own_s * stretch))
    is_late = late(jobs, wait_s)
    ahead_s = sum(s for (_, s), x in zip(jobs[:place], is_late[:place], strict=True) if not x)
    if is_late[place]:
        ahead_s = sum(s for _, s in jobs) - own_s * stretch
    return Estimate(sum(is_late) - num_lost_before + is_short, wait_s + ahead_s + own_s * stretch + spent_s)
