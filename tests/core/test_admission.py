"""Refused is what must be late, and nothing else."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdeploy_pd.core.admission import CAUTION, least_output_tokens, least_s, refusal
from fastdeploy_pd.core.blocks import BlockPool
from fastdeploy_pd.core.placement import Candidate, Load
from fastdeploy_pd.core.predictor import Predictor
from fastdeploy_pd.core.scheduler import Scheduler, SchedulerOptions
from fastdeploy_pd.errors import DeadlineUnreachable, InvalidRequest
from fastdeploy_pd.request import FinishReason, Phase, Request, SamplingParams, Slo

#: a prompt's token takes 1 ms, an output token 10 ms
PREDICTOR = Predictor((0.0, 1e-3, 0.0), (0.0, 0.0, 0.01))
NO_PREFILL = Predictor((0.0, 0.0, 0.0), (0.0, 0.0, 0.01))


def request_of(num_tokens: int, deadline_s: float | None = None, priority: int = 0, **sampling: Any) -> Request:
    return Request(
        f"{num_tokens}", [1] * num_tokens, SamplingParams(**{"max_tokens": 11, **sampling}),
        priority=priority, slo=Slo(deadline_s=deadline_s),
    )  # fmt: skip


def mixed(*prompts: tuple[float, float], busy_s: float = 0.0, priority: int | None = 0, cached: int = 0) -> Candidate:
    return Candidate("m", True, True, 0, cached, Load(PREDICTOR, prompts, busy_s, priority=priority))


@pytest.mark.parametrize(
    ("sampling", "eos", "least"),
    [
        ({"max_tokens": 9}, (), 9),
        ({"max_tokens": 9}, (2,), 1),
        ({"max_tokens": 9, "min_tokens": 4}, (2,), 4),
        ({"max_tokens": 9, "ignore_eos": True}, (2,), 9),
        ({"max_tokens": 9, "ignore_eos": True, "stop_token_ids": (5,)}, (2,), 1),
        ({"max_tokens": 9, "stop": ("x",)}, (), 1),
    ],
)
def test_how_short_an_answer_can_be(sampling: dict[str, Any], eos: tuple[int, ...], least: int) -> None:
    assert least_output_tokens(Request("r", [1], SamplingParams(**sampling), eos)) == least


def test_what_it_takes() -> None:
    """1 s of prefill, 10 steps of 10 ms."""
    request, other = request_of(1000, 9.0), replace(mixed((0.5, 0.4)), instance_id="n")
    for candidates, seconds in (
        ([mixed()], 1.1),
        ([mixed(cached=600)], 0.5),
        ([mixed(busy_s=0.7)], 1.8),
        ([mixed((2.0, 1.5), (30.0, 4.0))], 2.6),  # the second is due later: it is overtaken
        ([mixed((2.0, 1.5), (2.0, 1.4))], 2.5),  # both cannot be on time: the longer one goes back
        ([mixed((2.0, 1.5), priority=1)], 1.1),  # one that is less urgent is overtaken
        ([mixed((2.0, 1.5), priority=None)], 1.1),
        ([mixed((2.0, 1.5)), other], 1.5),
        ([mixed(), Candidate("new", True, True)], 0.0),  # it has not said anything yet
        ([Candidate("p", True, False, load=Load(PREDICTOR)), Candidate("d", False, True, load=Load(NO_PREFILL))], 1.1),
        ([Candidate("d", False, True, load=Load(NO_PREFILL))], 0.1),
    ):
        assert least_s(request, candidates) == pytest.approx(CAUTION * seconds), candidates
    assert least_s(request, [mixed((2.0, 1.5), busy_s=9.0)], math.inf) == pytest.approx(CAUTION * 1.1)


def test_who_is_refused() -> None:
    busy = [mixed((0.5, 0.4), (3.0, 2.0))]
    assert refusal(request_of(1000), busy) is None, "no deadline"
    assert refusal(request_of(1000, 0.1), [Candidate("m", True, True)]) is None, "nothing is known"
    assert refusal(request_of(1000, 0.1), [Candidate("p", True, False)]) is None, "it waits for an instance"
    never = refusal(request_of(1000, 0.5), busy)
    assert isinstance(never, InvalidRequest) and (never.status, never.param, never.code) == (
        400,
        "deadline",
        "deadline_too_short",
    )
    assert "it is 0.5 s" in never.message and "takes at least 0.88 s on idle instances" in never.message
    busy = [mixed((0.5, 0.4), (1.0, 0.3))]
    later = refusal(request_of(1000, 1.0), busy)
    assert isinstance(later, DeadlineUnreachable)
    assert (later.status, later.param, later.code) == (429, "deadline", "deadline_unreachable")
    assert "after 1.44 s at the earliest, 0.56 s of them behind others; it can be met in 1 s" in later.message
    assert refusal(request_of(1000, 1.45), busy) is None


JOBS = st.lists(st.tuples(st.floats(-5, 30), st.floats(0, 5)).map(lambda j: (j[0], round(j[1], 3))), max_size=12)


@given(JOBS, st.floats(0, 3), st.integers(1, 3000), st.floats(0.01, 20))
def test_after_so_long_it_is_taken_and_not_much_sooner(
    jobs: list[tuple[float, float]], busy_s: float, num_tokens: int, deadline_s: float
) -> None:
    request, candidates = request_of(num_tokens, deadline_s), [mixed(*sorted(jobs), busy_s=busy_s)]
    error = refusal(request, candidates)
    if isinstance(error, DeadlineUnreachable):
        wait_s = error.retry_after_s
        assert wait_s >= 1 and least_s(request, candidates, wait_s) <= deadline_s
        # the queue is worked off as time goes by; more of it may be due before a request that comes later
        assert wait_s <= 1 + math.ceil(sum(s for _, s in jobs) + busy_s) + 1
    elif isinstance(error, InvalidRequest):
        assert least_s(request, candidates, math.inf) > deadline_s
    else:
        assert least_s(request, candidates) <= deadline_s


PROMPTS = st.lists(
    st.tuples(st.integers(1, 400), st.integers(1, 12), st.integers(0, 2), st.floats(0.1, 3.0)), min_size=1, max_size=8
)


@given(
    PROMPTS,
    st.integers(1, 400),
    st.integers(0, 2),
    st.floats(0.05, 4.0),
    st.sampled_from(["fcfs", "edf", "slack", "sjf"]),
)
def test_who_is_refused_would_have_been_late(
    prompts: list[tuple[int, int, int, float]], num_tokens: int, priority: int, deadline_s: float, policy: str
) -> None:
    """A scheduler whose steps take what is predicted serves everybody; nobody is added after the one that is judged."""
    scheduler = Scheduler(
        BlockPool(400, 16), SchedulerOptions(8, 64, 4096, enable_prefix_caching=False, prefill_policy=policy)
    )
    scheduler.predictor = PREDICTOR
    for number, (length, num_output, urgency, due_s) in enumerate(prompts):
        other = Request(f"o{number}", [1] * length, SamplingParams(max_tokens=num_output), priority=urgency)
        other.slo = Slo(ttft_s=due_s)
        accept(scheduler, other)
    request = request_of(num_tokens, deadline_s, priority)
    candidate = Candidate("m", True, True, load=scheduler.load(PREDICTOR, 0.0, 0.0))
    least = least_s(request, [candidate])
    accept(scheduler, request)
    took_s = serve(scheduler, request)
    assert least / CAUTION <= took_s + 1e-9, "exact predictions need no caution"
    if refusal(request, [candidate]) is not None:
        assert took_s > deadline_s


def accept(scheduler: Scheduler, request: Request) -> None:
    request.advance(Phase.PLACED, 0.0)
    request.advance(Phase.RESERVED, 0.0)
    scheduler.add(request)


def serve(scheduler: Scheduler, request: Request) -> float:
    """Returns: when a request has ended."""
    now_s = 0.0
    while request.phase is not Phase.FINISHED:
        batch = scheduler.schedule(now_s)
        scheduler.launched(batch)
        parts = [
            (s.start, s.stop)
            for s in batch.sequences
            if s.stop - s.start > 1 or s.start < len(s.request.prompt_token_ids)
        ]
        now_s += sum(PREDICTOR.prefill_s(stop, start) for start, stop in parts)
        now_s += PREDICTOR.decode_s(1, 1) if len(parts) < len(batch.sequences) else 0.0
        scheduler.computed(batch.sequences)
        for s in batch.sequences:
            if s.needs_sample:
                if not s.request.output_token_ids:
                    s.request.advance(Phase.DECODING, now_s)
                s.request.output_token_ids.append(1)
                if s.request.finish_reason_after(1, 4096) is FinishReason.LENGTH:
                    scheduler.remove(s.request)
                    s.request.advance(Phase.FINISHED, now_s)
    return now_s
