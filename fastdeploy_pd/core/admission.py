"""Whether a request can end by its deadline: one that cannot, even if all goes well, is refused when it arrives, before anything is spent on it.

All goes well when the instance where it ends soonest takes it, its prompt is overtaken by nobody who is not there yet, and the model ends
it as soon as it may. Its steps also compute other prompts' parts, those that are there when it comes, as far as they surely do. The time
this takes is worked out from what instances report of their steps (`predictor`) and of what waits there (`Load`); what one has not
reported counts as nothing. So nobody is refused by mistake but by errors of the predictions, and CAUTION allows for those.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace

from fastdeploy_pd.core.order import most_wait_s
from fastdeploy_pd.core.placement import Candidate, FewestTokens, Load, PlacementPolicy, RoundRobin
from fastdeploy_pd.errors import DeadlineUnreachable, FastDeployPDError, InvalidRequest
from fastdeploy_pd.request import Request

CAUTION = 0.8  # predictions may be that much too long


def refusal(
    request: Request, candidates: Collection[Candidate], policy: PlacementPolicy | None = None
) -> FastDeployPDError | None:
    """
    Args:
        policy: which will place it; None: one that may choose any instance.
    Returns: why a request that arrives now must miss its deadline: InvalidRequest if it would on idle instances too, else
    DeadlineUnreachable; None if it may meet it, or has none.
    """
    deadline_s = request.slo.deadline_s
    if deadline_s is None or not any(c.can_decode for c in candidates):
        return None
    is_found = any(c.num_cached_tokens for c in candidates)  # what is left may be little enough for a decode instance
    if isinstance(policy, FewestTokens | RoundRobin) and not is_found and any(c.can_prefill for c in candidates):
        candidates = [c if c.can_prefill else _without_prompts(c) for c in candidates]
    now_s = least_s(request, candidates)
    if now_s <= deadline_s:
        return None
    idle_s, least = least_s(request, candidates, math.inf), least_output_tokens(request)
    asked = f"Invalid 'deadline': it is {deadline_s:g} s, and a prompt of {request.num_tokens} tokens with an answer of {least}"
    if idle_s > deadline_s:
        idle = f"{asked} takes at least {idle_s:.3g} s on idle instances; it must be no less"
        return InvalidRequest(idle, param="deadline", code="deadline_too_short")
    retry_s = 1
    while (late_s := least_s(request, candidates, retry_s) - deadline_s) > 0:
        retry_s += math.ceil(late_s)
    return DeadlineUnreachable(
        f"{asked} would end after {now_s:.3g} s at the earliest, {now_s - idle_s:.3g} s of them behind others; "
        f"it can be met in {retry_s} s.",
        retry_after_s=retry_s,
    )


def _without_prompts(candidate: Candidate) -> Candidate:
    """Returns: the decode instance as it is for a policy that gives it no prompt to compute."""
    load = candidate.load
    if load is None:
        return candidate
    predictor = replace(load.predictor, prefill=(0.0, 0.0, 0.0))
    return replace(candidate, load=replace(load, predictor=predictor, step_tokens=0))


def least_output_tokens(request: Request) -> int:
    """Returns: the fewest tokens that an answer can have: max_tokens where nothing ends it before."""
    sampling = request.sampling
    has_stops = sampling.stop or sampling.stop_token_ids or (request.eos_token_ids and not sampling.ignore_eos)
    return max(1, sampling.min_tokens) if has_stops else sampling.max_tokens


def least_s(request: Request, candidates: Collection[Candidate], after_s: float = 0.0) -> float:
    """Returns: seconds from arrival to end, if all goes well, of a request that arrives in after_s seconds and nobody else does; infinite: on
    idle instances.

    Args:
        candidates: at least one of them can decode. A decode instance that has computed no prompt computes none where others are for that.
    """
    num_tokens = request.num_tokens
    num_cached = min(max(c.num_cached_tokens for c in candidates), num_tokens - 1)  # wherever: blocks can be fetched
    starters = [c for c in candidates if c.can_prefill or (c.load and c.load.predictor.knows_prefill)]
    first_s = min(_first_token_s(c.load, request, num_cached, after_s) for c in starters or candidates)
    return CAUTION * (first_s + min(_rest_s(c.load, request, first_s, after_s) for c in candidates if c.can_decode))


def _first_token_s(load: Load | None, request: Request, num_cached: int, after_s: float) -> float:
    """Returns: seconds until the step ends in which an instance has computed a prompt, but for what is cached."""
    if load is None or not load.predictor.knows_prefill:
        return 0.0
    own_s = load.predictor.prefill_s(request.num_tokens, num_cached)
    if after_s == math.inf:
        return own_s
    return max(0.0, load.busy_s - load.age_s + _ahead_s(load, request, after_s) - after_s) + own_s


def _rest_s(load: Load | None, request: Request, first_s: float, after_s: float) -> float:
    """Returns: seconds that an instance takes for the tokens after the first, which comes after first_s."""
    num_steps = least_output_tokens(request) - 1
    if load is None:
        return 0.0
    mean_tokens = request.num_tokens + (num_steps + 1) // 2
    own_s = num_steps * load.predictor.decode_s(1, mean_tokens)
    return own_s + _beside_s(load, request, num_steps, first_s, after_s)


def _beside_s(load: Load, request: Request, num_steps: int, from_s: float, after_s: float) -> float:
    """Returns: seconds, at least, of the other prompts' parts in num_steps steps that a request takes part in from from_s on.

    A step is full of other prompts but where one ends: what follows may be cut to bring its first token on time. So either few of them
    end, and most steps are full, or many do, and have been computed; or there is nothing left to compute.
    """
    is_guarded = request.slo.tpot_s is not None
    if after_s == math.inf or is_guarded or load.step_tokens < 1 or load.num_free_tokens < request.num_tokens:
        return 0.0
    _, token_s, once_s = (max(0.0, x) for x in load.predictor.prefill)
    left = sorted(max(0.0, s - once_s) for _, s in load.prompts)
    past_s = max(0.0, from_s + after_s + load.age_s - load.busy_s)  # in which some of it may have been computed
    least_s = sum(left[: max(0, load.num_seats - 1)]) - past_s  # of more, streams may take the seats
    ended_s = -past_s
    for num_ended, seconds in enumerate([0.0, *left]):
        ended_s += seconds
        least_s = min(least_s, max(token_s * load.step_tokens * (num_steps - num_ended), ended_s))
    return max(0.0, least_s)


def _ahead_s(load: Load, request: Request, after_s: float) -> float:
    """Returns: seconds of the prompts that surely come before a request's: all where an instance goes by arrival, those that are due no
    later where it goes by that.

    Under `order.Slack` nobody surely does: one that would be late is left for later, and every step that takes a little longer than
    predicted may make one late.
    """
    if not load.is_fcfs and (load.priority is None or request.priority < load.priority):
        return 0.0
    due_s = math.inf if load.is_fcfs else most_wait_s(request.slo) + after_s
    once_s = max(0.0, load.predictor.prefill[2])  # several prompts' parts in one step pay it together
    return sum(max(0.0, seconds - once_s) for due, seconds in load.prompts if due <= due_s)
