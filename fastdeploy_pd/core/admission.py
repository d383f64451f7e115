"""Whether a request can end by its deadline: one that cannot, even if all goes well, is refused when it arrives, before anything is spent on it.

All goes well when the instance where it ends soonest takes it, its prompt is overtaken by nobody who is not there yet, its streams never
wait for others, and the model ends it as soon as it may. The time this takes is worked out from what instances report of their steps
(`predictor`) and of what waits there (`Load`); what one has not reported counts as nothing. So far nobody is refused by mistake but for
errors of the predictions, and CAUTION allows for those.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Collection

from fastdeploy_pd.core.order import late, most_wait_s
from fastdeploy_pd.core.placement import Candidate, Load
from fastdeploy_pd.errors import DeadlineUnreachable, FastDeployPDError, InvalidRequest
from fastdeploy_pd.request import Request

CAUTION = 0.8  # predictions may be that much too long


def refusal(request: Request, candidates: Collection[Candidate]) -> FastDeployPDError | None:
    """Returns: why a request that arrives now must miss its deadline: InvalidRequest if it would on idle instances too, else
    DeadlineUnreachable; None if it may meet it, or has none.
    """
    deadline_s = request.slo.deadline_s
    if deadline_s is None or not any(c.can_decode for c in candidates):
        return None
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
    num_steps = least_output_tokens(request) - 1
    mean_tokens = num_tokens + (num_steps + 1) // 2
    step_s = min(c.load.predictor.decode_s(1, mean_tokens) if c.load else 0.0 for c in candidates if c.can_decode)
    return CAUTION * (first_s + num_steps * step_s)


def _first_token_s(load: Load | None, request: Request, num_cached: int, after_s: float) -> float:
    """Returns: seconds until an instance has computed a prompt, but for what is cached."""
    if load is None or not load.predictor.knows_prefill:
        return 0.0
    own_s = load.predictor.prefill_s(request.num_tokens, num_cached)
    return (
        own_s
        if after_s == math.inf
        else max(0.0, load.busy_s + _ahead_s(load, request, own_s, after_s) - after_s) + own_s
    )


def _ahead_s(load: Load, request: Request, own_s: float, after_s: float) -> float:
    """Returns: seconds of the prompts that come before a request's: those that are due before it and can be on time (`order.Slack`), as
    far as the instance goes by that; those that could be overtaken are left out.
    """
    if load.priority is None or request.priority < load.priority or request.num_tokens < 2:
        return 0.0  # a single token goes with the streams
    due_s, jobs = most_wait_s(request.slo) + after_s, list(load.prompts)
    place = bisect_right(jobs, due_s, key=lambda job: job[0])
    jobs.insert(place, (due_s, own_s))
    once_s = max(0.0, load.predictor.prefill[2])  # several prompts' parts in one step pay it together
    is_late = late(jobs, load.busy_s)
    return sum(max(0.0, s - once_s) for (_, s), x in zip(jobs[:place], is_late, strict=False) if not x)
