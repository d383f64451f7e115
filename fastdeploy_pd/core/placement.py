"""Which instances serve a request: decided by each front end from its latest view of the members, without a network call.

Fewest outstanding tokens wins. Front ends decide at the same time from the same view, so the minimum alone would send everybody to
the same instance: among those within a blur of the minimum the choice is random.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from fastdeploy_pd.core.order import late
from fastdeploy_pd.core.predictor import Predictor
from fastdeploy_pd.request import MAX_SLO_S, Slo

NO_SLO = Slo()
BLUR_TOKENS = 64  # differences below one block are noise: loads are reported every quarter second
BLUR_FRACTION = 0.1
ROUNDING_S = 1e-9
MOST_STEPS = 16  # that are followed from one report to the next; more come only where steps are too short to matter


class Added(NamedTuple):
    """What was placed on an instance after it told of its `Load`; times count from then on."""

    placed_s: float
    due_s: float  #: its first token
    seconds: float  #: to compute its prompt; 0: that is done elsewhere
    num_tokens: int = 0


@dataclass(slots=True)  # not frozen, like Candidate
class Load:
    """What waits and runs on an instance, for policies that predict."""

    predictor: Predictor
    prompts: tuple[tuple[float, float], ...] = ()  #: (seconds from now until due, seconds left to compute), by due time
    busy_s: float = 0.0  #: until the step in flight ends
    num_streams: int = 0  #: requests that generate
    stream_tokens: int = 0  #: their tokens in sum
    slack_s: float = math.inf  #: that streams can wait before their SLO suffers
    num_free_tokens: int = 0  #: that KV blocks nobody holds have room for, less what waits for them
    priority: int | None = None  #: of all the prompts, which are computed by due time alone; None: not so
    is_fcfs: bool = False  #: they are computed as they came, whatever is due when
    step_tokens: int = 0  #: of prompts that a step computes beside its streams, if so many wait; 0: it may be fewer
    num_seats: int = 1  #: sequences that a step has room for beside the streams
    num_ordered: int = 0  #: streams to come, whose prompts are computed elsewhere
    ordered_tokens: int = 0  #: their tokens in sum
    most_step_s: float = 0.0  #: that prompts take of one step; 0: not told
    age_s: float = 0.0  #: since this was so, less busy_s: so much of the prompts may have been computed meanwhile

    @property
    def is_sane(self) -> bool:
        """Whether every number in it may be used: finite and of a possible size, what lasts not negative."""
        numbers = (*self.predictor.prefill, *self.predictor.decode, self.busy_s, self.most_step_s)
        is_timed = all(0 <= x < MAX_SLO_S for x in numbers) and self.slack_s > -MAX_SLO_S
        return is_timed and all(-MAX_SLO_S < due < MAX_SLO_S and 0 <= s < MAX_SLO_S for due, s in self.prompts)

    def after(self, elapsed_s: float, added: Sequence[Added] = ()) -> Load:
        """What it may be a little later at most, with what was placed there since: nothing but the step in flight has been computed."""
        prompts = sorted([*self.prompts, *((a.due_s, a.seconds) for a in added)])
        return self._later(elapsed_s, added, self.busy_s, prompts, max(0.0, elapsed_s - self.busy_s))

    def forecast(self, elapsed_s: float, added: Sequence[Added] = ()) -> Load:
        """What it is a little later in all likelihood: prompts have begun when the device was free, and a step that runs lets nobody in.

        That streams' SLOs, or a lack of blocks, may have kept prompts waiting is not followed.
        """
        is_short = self.num_seats < 1 or self.num_free_tokens < 0
        if elapsed_s < self.busy_s or not self.most_step_s or is_short:
            return self.after(elapsed_s, added)
        jobs = sorted([(d, s, 0.0) for d, s in self.prompts] + [(a.due_s, a.seconds, a.placed_s) for a in added])
        is_late = late([(due, seconds) for due, seconds, _ in jobs], self.busy_s)
        left = [job for _, job in sorted(zip(is_late, jobs, strict=True))]  # late ones last, as in `order.Slack`
        beside_s = self.predictor.decode_s(self.num_streams, self.stream_tokens) if self.num_streams else 0.0
        free_s = self.busy_s
        for _ in range(MOST_STEPS):
            begin_s = max(free_s, min((placed_s for _, _, placed_s in left), default=math.inf))
            if begin_s > elapsed_s:
                break
            free_s, left = _compute_step(left, begin_s, begin_s + self.most_step_s)
            free_s += beside_s
        return self._later(elapsed_s, added, free_s, sorted((due, seconds) for due, seconds, _ in left), 0.0)

    def _later(
        self, elapsed_s: float, added: Sequence[Added], free_s: float, prompts: list[tuple[float, float]], age_s: float
    ) -> Load:
        """Returns: this, with the times that count from when it was told."""
        ordered = [a.num_tokens for a in added if a.seconds == 0.0]
        return replace(
            self,
            prompts=tuple([(due - elapsed_s, seconds) for due, seconds in prompts]),
            busy_s=max(0.0, free_s - elapsed_s),
            age_s=age_s,
            num_free_tokens=self.num_free_tokens - sum(a.num_tokens for a in added),
        ).with_ordered(len(ordered), sum(ordered))

    def with_ordered(self, count: int, num_tokens: int) -> Load:
        """Returns: the same with so many more streams to come, of so many tokens in sum."""
        if not count:
            return self
        return replace(
            self,
            num_ordered=self.num_ordered + count,
            ordered_tokens=self.ordered_tokens + num_tokens,
            num_seats=self.num_seats - count,
        )


def _compute_step(
    jobs: Sequence[tuple[float, float, float]], begin_s: float, end_s: float
) -> tuple[float, list[tuple[float, float, float]]]:
    """Let a step begin with the prompts that are there, in their order, as many as end by end_s.

    Args:
        jobs: (due, seconds, when it came).
    Returns: when it ends, and what is left to later ones, in the same order.
    """
    now_s, left = begin_s, list[tuple[float, float, float]]()
    for number, (due, seconds, placed_s) in enumerate(jobs):
        if now_s >= end_s:
            left += jobs[number:]
            break
        part_s = min(seconds, end_s - now_s) if placed_s <= begin_s else 0.0
        now_s += part_s
        if placed_s > begin_s or seconds - part_s > ROUNDING_S:
            left.append((due, seconds - part_s, placed_s))
    return now_s, left


@dataclass(
    slots=True
)  # not frozen: there is one an instance and placement, and freezing makes it six times as slow to make
class Candidate:
    """An instance as placement sees it."""

    instance_id: str
    can_prefill: bool  #: takes prefill orders
    can_decode: bool  #: takes requests
    outstanding_tokens: int = 0  #: reported, plus what this front end has placed there since the report
    num_cached_tokens: int = 0  #: of this request's tokens, how many its prefix cache holds, as far as is known
    load: Load | None = None  #: None: not known


@dataclass(frozen=True, slots=True)
class Placement:
    """Who computes the prompt and who generates."""

    prefill_id: str | None  #: None: decode computes the prompt itself
    decode_id: str

    @property
    def instance_ids(self) -> set[str]:
        """Both, or the only one."""
        return {self.prefill_id or self.decode_id, self.decode_id}


class PlacementPolicy(Protocol):
    """What a scheduling policy implements."""

    def place(
        self,
        num_tokens: int,
        candidates: Collection[Candidate],
        rng: random.Random,
        slo: Slo = NO_SLO,
        age_s: float = 0.0,
    ) -> Placement | None:
        """Choose instances for a request of num_tokens known tokens that arrived age_s ago.

        Returns: the placement, or None if no candidate can decode.
        """
        ...


class FewestTokens:
    """Balances outstanding tokens over prefill, decode and mixed instances."""

    def place(
        self,
        num_tokens: int,
        candidates: Collection[Candidate],
        rng: random.Random,
        slo: Slo = NO_SLO,
        age_s: float = 0.0,
    ) -> Placement | None:
        """See `PlacementPolicy.place`. An instance that can do both serves alone; with no prefill instance, decode prefills.

        To a load the tokens are added that would have to be computed there, and would not where most are cached.
        """
        most = max((c.num_cached_tokens for c in candidates), default=0)
        candidates = [
            replace(c, outstanding_tokens=c.outstanding_tokens + most - c.num_cached_tokens) for c in candidates
        ]
        decoder = pick((c for c in candidates if c.can_decode and not c.can_prefill), rng)
        prefiller = pick((c for c in candidates if c.can_prefill and not c.can_decode), rng)
        both = pick((c for c in candidates if c.can_prefill and c.can_decode), rng)
        if decoder is None and both is None:
            return None
        if decoder is None:
            return self._with_mixed_decode(prefiller, both, rng)
        if prefiller is None:
            return self._without_prefill(decoder, both, rng)
        is_mixed_better = both is not None and is_lighter(both.outstanding_tokens, prefiller.outstanding_tokens, rng)
        if is_mixed_better and both is not None:
            return Placement(None, both.instance_id)
        return Placement(prefiller.instance_id, decoder.instance_id)

    def _with_mixed_decode(
        self, prefiller: Candidate | None, both: Candidate | None, rng: random.Random
    ) -> Placement | None:
        if both is None:
            return None
        if prefiller is None or is_lighter(both.outstanding_tokens, prefiller.outstanding_tokens, rng):
            return Placement(None, both.instance_id)
        return Placement(prefiller.instance_id, both.instance_id)

    def _without_prefill(self, decoder: Candidate, both: Candidate | None, rng: random.Random) -> Placement:
        if both is None or is_lighter(decoder.outstanding_tokens, both.outstanding_tokens, rng):
            return Placement(None, decoder.instance_id)
        return Placement(None, both.instance_id)


class RoundRobin:
    """Everybody in turn, whatever the load: what others are compared with."""

    def __init__(self) -> None:
        self._num_prefills = self._num_decodes = 0

    def place(
        self,
        num_tokens: int,
        candidates: Collection[Candidate],
        rng: random.Random,
        slo: Slo = NO_SLO,
        age_s: float = 0.0,
    ) -> Placement | None:
        """See `PlacementPolicy.place`. Prefill and mixed instances take turns with prompts; a mixed one keeps what it has begun."""
        decoders = [c for c in candidates if c.can_decode]
        if not decoders:
            return None
        starters = [c for c in candidates if c.can_prefill] or decoders
        starter = starters[self._num_prefills % len(starters)]
        self._num_prefills += 1
        if starter.can_decode:
            return Placement(None, starter.instance_id)
        decoders = [c for c in decoders if not c.can_prefill] or decoders
        decoder = decoders[self._num_decodes % len(decoders)]
        self._num_decodes += 1
        return Placement(starter.instance_id, decoder.instance_id)


def blur(minimum: int) -> float:
    """Returns: how many tokens above the minimum still count as equal."""
    return max(BLUR_TOKENS, minimum * BLUR_FRACTION)


def pick(candidates: Iterable[Candidate], rng: random.Random) -> Candidate | None:
    """Returns: one of the least loaded candidates, at random among those within the blur; None if there is none."""
    pool = sorted(candidates, key=lambda c: (c.outstanding_tokens, c.instance_id))
    if not pool:
        return None
    limit = pool[0].outstanding_tokens + blur(pool[0].outstanding_tokens)
    return rng.choice([c for c in pool if c.outstanding_tokens <= limit])


def is_lighter(tokens: int, other_tokens: int, rng: random.Random) -> bool:
    """Returns: whether the first load is smaller; a coin decides within the blur."""
    if abs(tokens - other_tokens) <= blur(min(tokens, other_tokens)):
        return rng.random() < 0.5
    return tokens < other_tokens
