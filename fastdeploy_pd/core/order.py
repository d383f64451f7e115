"""In which order prompts are computed, and how long a step may keep running streams waiting for it.

`fcfs`: as they came. `sjf`, `ljf`: fewest, most tokens left first. `edf`: whose first token is due first. `slack`: the order in which the
most first tokens come on time: by due time, but where that makes one late, the one that takes longest goes back until all that stay
are on time (Moore and Hodgson's rule, which is optimal on one machine). What has gone back is late or takes others' time: it follows, by
arrival, one at a time since what has begun holds blocks, and every tenth step it comes first, so that nobody starves, however many arrive.

Under all but fcfs a prompt that is overtaken keeps its blocks and its computed tokens: preemption costs nothing but memory. Where memory
is short, one that is late whatever is done (`is_lost`) gives its blocks to one that can be on time.
Source: shortest remaining time and slack as in Tropical (DAC 2025); J. M. Moore, Management Science 15 (1968).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from fastdeploy_pd.core.predictor import Predictor
from fastdeploy_pd.errors import ConfigError
from fastdeploy_pd.request import Phase, Request, Slo

LATE_EVERY = 10  # steps
RECOVERY_S = 1.0
TPOT_AIM = 0.95  # of the SLO: predictions are not exact, and the last token has no later one to make up for it
WORTH_S = 0.5  # of a chunk: prompts wait for streams until so much fits into a step
MAX_WAIT_S = 60.0  # what says nothing about its first token is due after so long


class PrefillPolicy(Protocol):
    """What a prefill policy implements; a user's own is named by an entry point (`fastdeploy_pd.prefill_policies`)."""

    def order(self, prompts: Sequence[Request], now_s: float, stretch: float = 1.0) -> Iterable[Request]:
        """Put prompts in the order to compute them; what is left out waits.

        Args:
            prompts: running ones, oldest first, then waiting ones as they came.
            stretch: by how much longer than alone they take beside the streams that run.
        """
        ...


def num_left(request: Request) -> int:
    """Returns: tokens of a request still to compute, those found in the prefix cache not counted."""
    local = request.local
    return request.num_tokens - max(local.num_computed_tokens, local.num_matched_tokens)


def most_wait_s(slo: Slo) -> float:
    """Returns: seconds from arrival until the first token is due; MAX_WAIT_S where nothing is said."""
    ttft_s, deadline_s = slo.ttft_s, slo.deadline_s
    if ttft_s is None or (deadline_s is not None and deadline_s < ttft_s):
        ttft_s = deadline_s
    return MAX_WAIT_S if ttft_s is None else ttft_s


def due_s(request: Request) -> float:
    """Returns: when its first token is due, on the clock of its arrival."""
    return request.arrival_s + most_wait_s(request.slo)


class Sorted:
    """Prompts by a key, then as they came."""

    def __init__(self, key: Callable[[Request], float]) -> None:
        self._key = key

    def order(self, prompts: Sequence[Request], now_s: float, stretch: float = 1.0) -> Iterable[Request]:
        """See `PrefillPolicy.order`."""
        return sorted(prompts, key=lambda r: (r.priority, self._key(r)))


class Slack:
    """The most first tokens on time; see the module."""

    def __init__(self, predictor: Callable[[], Predictor | None]) -> None:
        """
        Args:
            predictor: gives the present one; while there is none prompts are sorted by due time.
        """
        self._predictor = predictor
        self._num_steps = 0

    def order(self, prompts: Sequence[Request], now_s: float, stretch: float = 1.0) -> Iterable[Request]:
        """See `PrefillPolicy.order`."""
        predictor = self._predictor()
        if len(prompts) < 2:
            return prompts
        in_order = sorted((r.priority, due_s(r), n) for n, r in enumerate(prompts))
        by_due = [prompts[n] for _, _, n in in_order]
        if predictor is None:
            return by_due
        left = [prefill_left_s(r, predictor) * stretch for r in by_due]
        is_late = late([(due, seconds) for (_, due, _), seconds in zip(in_order, left, strict=True)], now_s)
        self._num_steps += 1
        if True not in is_late:
            return by_due
        on_time = [r for r, x in zip(by_due, is_late, strict=True) if not x]
        rest = sorted((r for r, x in zip(by_due, is_late, strict=True) if x), key=lambda r: (r.priority, r.arrival_s))
        begun = [r for r in rest if r.local.block_table]
        rest = begun or rest[:1]  # one at a time: those that have begun hold blocks
        if self._num_steps % LATE_EVERY == 0:
            return [rest[0], *on_time, *rest[1:]]
        return [*on_time, *rest]


def prefill_left_s(request: Request, predictor: Predictor) -> float:
    """Returns: seconds that what is left of a prompt takes alone."""
    local = request.local
    computed, matched = local.num_computed_tokens, local.num_matched_tokens
    return predictor.prefill_s(request.num_tokens, computed if computed > matched else matched)


def is_lost(request: Request, predictor: Predictor, now_s: float) -> bool:
    """Returns: whether a prompt's first token is late even if nothing else is computed."""
    return due_s(request) < now_s + prefill_left_s(request, predictor)


def late(jobs: Sequence[tuple[float, float]], now_s: float) -> list[bool]:
    """Choose the jobs that one machine leaves for later so that the fewest are late (Moore and Hodgson).

    Args:
        jobs: [n] (due time, seconds that it takes), by due time.
        now_s: when the machine starts; it can change from one job to another at any time.
    Returns: [n] whether it is left for later.
    """
    longest: list[tuple[float, int]] = []
    is_late, end_s = [False] * len(jobs), now_s
    for number, (due, seconds) in enumerate(jobs):
        end_s += seconds
        heapq.heappush(longest, (-seconds, number))
        if end_s > due:
            taken_s, last = heapq.heappop(longest)
            is_late[last] = True
            end_s += taken_s
    return is_late


POLICIES = ("fcfs", "sjf", "ljf", "edf", "slack")


def make_policy(name: str, predictor: Callable[[], Predictor | None]) -> PrefillPolicy | None:
    """Returns: the policy of that name; None for fcfs, which orders nothing. Raises: ConfigError: there is none."""
    match name:
        case "fcfs":
            return None
        case "sjf":
            return Sorted(num_left)
        case "ljf":
            return Sorted(lambda r: -num_left(r))
        case "edf":
            return Sorted(due_s)
        case "slack":
            return Slack(predictor)
    raise ConfigError(f"the prefill policy is {name!r}; there are {', '.join(POLICIES)}")


def stream_slack_s(streams: Iterable[Request], step_s: float, now_s: float) -> float:
    """How long running streams may wait on top of their own next step.

    A stream's mean time per token must stay within its SLO: what it has been ahead so far it may wait. One that is late, and would not
    be on time again after RECOVERY_S of steps with nothing else in them, is lost and waits like one without an SLO.

    Args:
        step_s: what a step with the streams alone takes.
    Returns: seconds, the least over the streams; infinite where none has an SLO that can be met.
    """
    least_s = math.inf
    for request in streams:
        tpot_s, begun_s = request.slo.tpot_s, request.timeline.stamps.get(Phase.DECODING)
        if tpot_s is None or begun_s is None:
            continue
        num_tokens = len(request.output_token_ids) + request.local.num_pending_tokens
        tpot_s *= TPOT_AIM
        slack_s = begun_s + tpot_s * num_tokens - now_s - step_s
        if slack_s >= least_slack_s(tpot_s, step_s):
            least_s = min(least_s, slack_s)
    return least_s


def least_slack_s(tpot_s: float, step_s: float) -> float:
    """Returns: the slack below which a stream that aims at tpot_s a token is lost; see `stream_slack_s`."""
    return (step_s - tpot_s) * RECOVERY_S / max(step_s, 1e-9)
