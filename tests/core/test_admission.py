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
from fastdeploy_pd.core.multiplexing import Multiplexing
from fastdeploy_pd.core.order import POLICIES
from fastdeploy_pd.core.placement import Candidate, FewestTokens, Load
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
        ([mixed((2.0, 1.5), (2.0, 1.4))], 4.0),  # both are due before it, late or not
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


FULL_STEPS: dict[str, Any] = {"priority": 0, "step_tokens": 100, "num_seats": 8, "num_free_tokens": 10_000}


def test_other_prompts_parts_in_its_steps_count() -> None:
    """A tenth of a second of others' prompts in each of the 11 steps, until none of them is left."""
    request = request_of(100, 9.0)
    busy = Load(PREDICTOR, ((60.0, 1.0), (60.0, 3.0)), **FULL_STEPS)
    for load, seconds in (
        (replace(busy, prompts=((60.0, 2.0), (60.0, 2.0))), 0.2 + 10 * 0.1),
        (busy, 0.2 + 9 * 0.1),  # one may end in them, and cut a step short
        (replace(busy, prompts=((60.0, 0.02), (60.0, 0.03), (60.0, 3.0))), 0.2 + 8 * 0.1),
        (replace(busy, prompts=((60.0, 0.7),)), 0.2 + 0.6),  # they may have been computed before its first token
        (replace(busy, step_tokens=50), 0.2 + 10 * 0.05),
        (replace(busy, step_tokens=0), 0.2),
        (replace(busy, num_seats=1), 0.2),  # streams may take all the others
        (replace(busy, num_seats=2, prompts=((60.0, 0.3), (60.0, 0.4))), 0.2 + 0.2),
        (replace(busy, num_free_tokens=99), 0.2),
        (replace(busy, prompts=((2.0, 1.0), (60.0, 3.0))), 1.2 + 9 * 0.1),  # it is behind the first
        (replace(busy, age_s=3.6), 0.2 + 0.3),  # most of it may be done meanwhile
        (replace(busy, is_fcfs=True), 4.0 + 0.2),
    ):
        assert least_s(request, [Candidate("m", True, True, load=load)]) == pytest.approx(CAUTION * seconds), load
    guarded = replace(request, slo=replace(request.slo, tpot_s=0.05))
    assert least_s(guarded, [Candidate("m", True, True, load=busy)]) == pytest.approx(CAUTION * 0.2)


def test_a_decode_instance_computes_no_prompt_if_the_policy_gives_it_none() -> None:
    busy = Candidate("p", True, False, load=Load(PREDICTOR, ((1.0, 9.0),), is_fcfs=True))
    pair = [busy, Candidate("d", False, True, load=Load(PREDICTOR))]
    assert isinstance(refusal(request_of(100, 3.0), pair, FewestTokens()), DeadlineUnreachable)
    assert refusal(request_of(100, 3.0), pair, Multiplexing()) is None
    assert refusal(request_of(100, 3.0), pair[1:], FewestTokens()) is None, "there is nobody else"
    cached = [busy, replace(pair[1], num_cached_tokens=64)]
    assert refusal(request_of(100, 3.0), cached, FewestTokens()) is None, "decode computes a short rest"


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
    st.tuples(st.integers(1, 400), st.integers(1, 12), st.integers(0, 2), st.floats(0.1, 3.0) | st.just(60.0)),
    min_size=1,
    max_size=12,
)
#: a prompt of 400 tokens takes twice what its tokens take alone
CURVED = Predictor((2.5e-6, 1e-3, 0.005), (0.0, 0.0, 0.01))


@given(
    PROMPTS,
    st.integers(1, 400),
    st.integers(0, 2),
    st.floats(0.05, 4.0),
    st.sampled_from(POLICIES),
    st.sampled_from([None, 0.02]),
    st.sampled_from([PREDICTOR, CURVED]),
    st.sampled_from([2, 8]),
    st.sampled_from([40, 400]),
    st.integers(0, 6),
    st.booleans(),
)
def test_who_is_refused_would_have_been_late(
    prompts: list[tuple[int, int, int, float]],
    num_tokens: int,
    priority: int,
    deadline_s: float,
    policy: str,
    tpot_s: float | None,
    predictor: Predictor,
    num_seats: int,
    num_blocks: int,
    num_steps: int,
    has_ttft: bool,
) -> None:
    """A scheduler whose steps take what is predicted serves everybody; nobody is added after the one that is judged."""
    scheduler = Scheduler(
        BlockPool(num_blocks, 16),
        SchedulerOptions(num_seats, 64, 4096, enable_prefix_caching=False, prefill_policy=policy, guards_tpot=True),
    )
    scheduler.predictor = predictor
    for number, (length, num_output, urgency, due_s) in enumerate(prompts):
        other = Request(f"o{number}", [1] * length, SamplingParams(max_tokens=num_output), priority=urgency)
        other.slo = Slo(ttft_s=due_s, tpot_s=tpot_s)
        accept(scheduler, other)
    request = request_of(num_tokens, deadline_s, priority)
    if has_ttft:
        request.slo = replace(request.slo, ttft_s=100.0)
    request.arrival_s = now_s = advance(scheduler, predictor, num_steps)
    candidate = Candidate("m", True, True, load=scheduler.load(predictor, now_s, 0.0))
    least, error = least_s(request, [candidate]), refusal(request, [candidate])
    accept(scheduler, request)
    took_s = serve(scheduler, predictor, request, now_s) - now_s
    assert least / CAUTION <= took_s + 1e-9, "exact predictions need no caution"
    if error is not None:
        assert took_s > deadline_s


@pytest.mark.parametrize("policy", ["fcfs", "edf"])
def test_a_cached_prefix_that_others_will_take_is_no_room(policy: str) -> None:
    scheduler = Scheduler(BlockPool(30, 16), SchedulerOptions(8, 64, 4096, prefill_policy=policy))
    scheduler.predictor = PREDICTOR
    first = Request("first", [5] * 320, SamplingParams(max_tokens=1))
    accept(scheduler, first)
    now_s = serve(scheduler, PREDICTOR, first, 0.0)
    accept(
        scheduler, Request("prefix", [*([5] * 320), 6], SamplingParams(max_tokens=100))
    )  # 20 blocks that are free and cached
    accept(scheduler, Request("other", [7] * 288, SamplingParams(max_tokens=2)))
    load = scheduler.load(PREDICTOR, now_s, 0.0)
    assert load.num_free_tokens == 30 * 16 - 321 - 288 and load.step_tokens == 0
    assert scheduler.outstanding_tokens() == 1 + 288


def test_of_one_token_a_step_nothing_is_said() -> None:
    scheduler = Scheduler(BlockPool(30, 16), SchedulerOptions(2, 1, 4096))
    scheduler.predictor = PREDICTOR
    assert scheduler.load(PREDICTOR, 0.0, 0.0).step_tokens == 0


@pytest.mark.parametrize(("predictor", "share"), [(PREDICTOR, 0.6), (CURVED, 0.4)])  # what curves is not counted
@pytest.mark.parametrize(("policy", "ttft_s"), [("fcfs", None), ("edf", 100.0), ("slack", 100.0)])
def test_who_must_be_late_behind_long_prompts_is_refused(
    predictor: Predictor, share: float, policy: str, ttft_s: float | None
) -> None:
    """Its deadline puts it first under edf and slack, and each of its steps takes as long as others' parts in it."""
    scheduler = Scheduler(
        BlockPool(400, 16),
        SchedulerOptions(8, 64, 4096, enable_prefix_caching=False, prefill_policy=policy, guards_tpot=True),
    )
    scheduler.predictor = predictor
    for number in range(5):
        accept(scheduler, Request(f"o{number}", [1] * 400, SamplingParams(max_tokens=2)))
    now_s = advance(scheduler, predictor, 3)
    request = replace(request_of(20), arrival_s=now_s)
    load = scheduler.load(predictor, now_s, 0.0)
    assert (load.step_tokens, load.num_seats, load.is_fcfs) == (64, 8, policy == "fcfs")
    alone = Candidate("m", True, True, load=load)
    request.slo = Slo(ttft_s=ttft_s, deadline_s=9.0)
    earliest_s = least_s(request, [alone])
    request.slo = Slo(ttft_s=ttft_s, deadline_s=0.9 * earliest_s)
    assert isinstance(refusal(request, [alone]), DeadlineUnreachable)
    accept(scheduler, request)
    took_s = serve(scheduler, predictor, request, now_s) - now_s
    assert share * took_s < earliest_s / CAUTION <= took_s


def accept(scheduler: Scheduler, request: Request) -> None:
    request.advance(Phase.PLACED, 0.0)
    request.advance(Phase.RESERVED, 0.0)
    scheduler.add(request)


def serve(scheduler: Scheduler, predictor: Predictor, request: Request, now_s: float) -> float:
    """Returns: when a request has ended."""
    while request.phase is not Phase.FINISHED:
        now_s = step(scheduler, predictor, now_s)
    return now_s


def advance(scheduler: Scheduler, predictor: Predictor, num_steps: int) -> float:
    """Returns: when so many steps have ended."""
    now_s = 0.0
    for _ in range(num_steps):
        now_s = step(scheduler, predictor, now_s)
    return now_s


def step(scheduler: Scheduler, predictor: Predictor, now_s: float) -> float:
    """Compute one step. Returns: when it has ended."""
    batch = scheduler.schedule(now_s)
    scheduler.launched(batch)
    parts = [
        (s.start, s.stop) for s in batch.sequences if s.stop - s.start > 1 or s.start < len(s.request.prompt_token_ids)
    ]
    once_s = predictor.prefill[2]  # of all parts together
    now_s += sum(predictor.prefill_s(stop, start) - once_s for start, stop in parts) + once_s * bool(parts)
    now_s += predictor.decode_s(1, 1) if len(parts) < len(batch.sequences) else 0.0
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
