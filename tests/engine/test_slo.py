"""The front end's part in what requests expect: defaults, and the end of those that are late."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from fastdeploy_pd.cluster.messages import Abort, Beat, Peer, Reserve
from fastdeploy_pd.core.multiplexing import Multiplexing
from fastdeploy_pd.core.placement import Load
from fastdeploy_pd.core.predictor import Predictor
from fastdeploy_pd.engine.frontend import Failed, FrontEnd, FrontEndOptions, Instance
from fastdeploy_pd.engine.outbox import Send
from fastdeploy_pd.errors import DeadlineExceeded, DeadlineUnreachable, FastDeployPDError, InvalidRequest
from fastdeploy_pd.request import Phase, Request, SamplingParams, Slo


def front_end_of(*instance_ids: str, **options: Any) -> FrontEnd:
    """A front end that sees mixed instances."""
    front_end = FrontEnd("front", random.Random(1), FrontEndOptions(**options))
    front_end.set_members([Instance(Peer(i, f"ipc://{i}"), True, True) for i in instance_ids], 0.0)
    front_end.outbox.take()
    return front_end


def submit(front_end: FrontEnd, slo: Slo, now_s: float = 0.0, num_tokens: int = 100) -> Request:
    request = Request("r", [1] * num_tokens, SamplingParams(), slo=slo)
    front_end.submit(request, now_s)
    return request


def sent(front_end: FrontEnd) -> list[Any]:
    return [a.message for a in front_end.outbox.take() if isinstance(a, Send)]


def test_what_a_request_says_goes_before_the_defaults() -> None:
    front_end = front_end_of("one", slo_ttft_s=0.5, slo_tpot_s=0.03)
    assert submit(front_end, Slo()).slo == Slo(0.5, 0.03)
    assert submit(front_end, Slo(ttft_s=2.0, deadline_s=9.0)).slo == Slo(2.0, 0.03, 9.0)
    reserve = next(m for m in sent(front_end) if isinstance(m, Reserve))
    assert Request.from_wire(reserve.request).slo == Slo(0.5, 0.03)


@pytest.mark.parametrize("limit_s", [3.0, 20.0])
def test_the_deadline_ends_a_request_everywhere(limit_s: float) -> None:
    front_end = front_end_of("one", deadline_s=10.0, instance_timeout_s=1e3)
    submit(front_end, Slo(deadline_s=limit_s), now_s=5.0)
    ends_s = 5.0 + min(limit_s, 10.0)
    front_end.tick(ends_s - 0.01)
    assert front_end.take_events() == [] and not any(isinstance(m, Abort) for m in sent(front_end))
    front_end.tick(ends_s)
    (event,) = front_end.take_events()
    assert isinstance(event, Failed) and isinstance(event.error, DeadlineExceeded)
    assert f"did not end within {min(limit_s, 10.0):g} s" in event.error.message
    assert Abort("r", 1) in sent(front_end)
    assert not front_end.requests


def beats(load: Load) -> FrontEnd:
    """A front end that has heard what waits on its one instance."""
    front_end = front_end_of("one")
    front_end.receive("one", Beat(1, load=load), 10.0)
    return front_end


def refused(front_end: FrontEnd) -> FastDeployPDError:
    (event,) = front_end.take_events()
    assert isinstance(event, Failed) and not front_end.requests and sent(front_end) == []
    return event.error


def test_who_cannot_end_in_time_is_refused_at_once() -> None:
    """A prompt's token takes 10 ms, a step 20 ms; 1 s of prompts waits."""
    load = Load(Predictor((0.0, 0.01, 0.0), (0.0, 0.0, 0.02)), ((0.6, 0.5), (1.2, 0.5)), priority=0)
    for deadline_s, error_type, status in ((0.5, InvalidRequest, 400), (1.3, DeadlineUnreachable, 429)):
        front_end = beats(load)
        request = submit(front_end, Slo(ttft_s=9.0, deadline_s=deadline_s), 10.0)
        error = refused(front_end)
        assert isinstance(error, error_type) and (error.status, error.param) == (status, "deadline")
        assert request.phase is Phase.FAILED
    assert error.retry_after_s == 1 and "0.8 s of them behind others" in error.message
    for slo in (Slo(), Slo(ttft_s=9.0, deadline_s=1.9), Slo(ttft_s=0.001)):
        front_end = beats(load)
        assert submit(front_end, slo, 10.0).phase is Phase.PLACED


def test_what_was_placed_since_the_report_counts() -> None:
    front_end = beats(Load(Predictor((0.0, 0.01, 0.0), (0.0, 0.0, 0.02)), priority=0))
    for number in range(3):
        front_end.submit(Request(f"{number}", [1] * 50, SamplingParams(), slo=Slo(deadline_s=3.0)), 10.0)
    assert front_end.take_events() == []
    sent(front_end)
    front_end.submit(Request("late", [1] * 300, SamplingParams(), slo=Slo(ttft_s=9.0, deadline_s=3.2)), 10.0)
    (event,) = front_end.take_events()
    assert isinstance(event, Failed) and isinstance(event.error, DeadlineUnreachable) and len(front_end.requests) == 3


def test_how_old_the_report_is_and_whom_steps_are_cut_for_count() -> None:
    """Prompts may have been computed since; streams with a TPOT keep prompts out of steps."""
    load = Load(
        Predictor((0.0, 0.01, 0.0), (0.0, 0.0, 0.02)), ((60.0, 9.0),), busy_s=0.5,
        num_free_tokens=9999, priority=0, step_tokens=50, num_seats=8,
    )  # fmt: skip
    fcfs = replace(load, is_fcfs=True)
    steps = SamplingParams(max_tokens=11, ignore_eos=True)  # 10 of 0.52 s after the first
    for view, wait_s, tpot_s, deadline_s, is_refused in (
        (fcfs, 0.0, None, 7.5, True),
        (fcfs, 5.0, None, 7.5, False),
        (load, 0.0, None, 4.0, True),
        (load, 8.0, None, 4.0, False),
        (load, 0.0, 0.1, 4.0, False),
    ):
        front_end = beats(view)
        other = Request("other", [1] * 10, SamplingParams(), slo=Slo(ttft_s=60.0, tpot_s=tpot_s))
        front_end.submit(other, 10.0 + wait_s)
        request = Request("r", [1] * 10, steps, slo=Slo(ttft_s=99.0, deadline_s=deadline_s))
        front_end.submit(request, 10.0 + wait_s)
        assert (request.phase is Phase.FAILED) == is_refused, (view, wait_s, tpot_s)


def test_what_was_begun_goes_on_and_nobody_known_refuses_nobody() -> None:
    front_end = front_end_of("one")
    assert submit(front_end, Slo(deadline_s=0.001)).phase is Phase.PLACED
    front_end = beats(Load(Predictor((0.0, 0.01, 0.0), (0.0, 0.0, 0.02))))
    resumed = Request("r", [1] * 100, SamplingParams(), output_token_ids=[5], slo=Slo(deadline_s=0.001))
    front_end.submit(resumed, 10.0)
    assert resumed.phase is Phase.PLACED


def test_who_is_urgent_is_not_placed_where_a_long_prompt_has_just_begun() -> None:
    """The instance has not told so yet: it was idle when it beat, and computes since what it was given then."""
    front_end = FrontEnd("front", random.Random(1), policy=Multiplexing())
    front_end.set_members([Instance(Peer(i, f"ipc://{i}"), True, True) for i in ("one", "two")], 0.0)
    idle = Load(Predictor((0.0, 1e-4, 0.0), (0.0, 0.0, 0.01)), num_free_tokens=10**6, most_step_s=0.8)
    front_end.receive("one", Beat(1, load=idle), 10.0)
    front_end.receive("two", Beat(1, load=replace(idle, busy_s=0.06)), 10.0)
    front_end.outbox.take()
    placed = []
    for name, num_tokens, ttft_s, now_s in (("long", 5000, 9.0, 10.0), ("urgent", 500, 0.2, 10.01)):
        front_end.submit(Request(name, [1] * num_tokens, SamplingParams(), slo=Slo(ttft_s, 0.1)), now_s)
        placed += [a.peer_id for a in front_end.outbox.take() if isinstance(a, Send)]
    assert placed == ["one", "two"]


@pytest.mark.parametrize(
    "wrong",
    [{"prompts": ((1.9, -1e308),)}, {"slack_s": float("-inf")}, {"most_step_s": float("nan")}, {"busy_s": 1e300}],
)
def test_a_report_that_cannot_be_is_left_alone(wrong: dict[str, Any]) -> None:
    load = Load(Predictor((0.0, 0.01, 0.0), (0.0, 0.0, 0.02)), num_free_tokens=10**6)
    front_end = beats(load)
    front_end.receive(
        "one", Beat(2, load=replace(load, predictor=Predictor((0.0, 9.0, 0.0), (0.0, 0.0, 9.0)), **wrong)), 10.1
    )
    assert front_end.predictor_of("one") == load.predictor
    submit(front_end, Slo(ttft_s=9.0, deadline_s=30.0), 10.2)
    assert front_end.requests
