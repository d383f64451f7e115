"""The phase table is the only way, and a request survives the wire."""

from __future__ import annotations

import itertools

import msgspec
import pytest

from fastdeploy_pd.errors import IllegalTransition, InvalidRequest
from fastdeploy_pd.request import (
    TERMINAL_PHASES,
    TRANSITIONS,
    FinishReason,
    Phase,
    Request,
    SamplingParams,
    Slo,
    print_transitions,
)


@pytest.mark.parametrize(("start", "stop"), list(itertools.product(Phase, Phase)))
def test_every_transition(start: Phase, stop: Phase) -> None:
    request = Request("r", [1])
    request.phase = start
    if stop in TRANSITIONS[start]:
        request.advance(stop, 3.0)
        assert request.phase is stop
        assert request.timeline.stamps == {stop: 3.0}
    else:
        with pytest.raises(IllegalTransition, match=f"from {start.name} to {stop.name}"):
            request.advance(stop, 3.0)
        assert request.phase is start
        assert request.timeline.stamps == {}


def test_terminal_phases_are_final_and_all_are_reachable() -> None:
    assert all(not TRANSITIONS[p] for p in TERMINAL_PHASES)
    reached = {Phase.ARRIVED}
    while True:
        more = reached | {s for p in reached for s in TRANSITIONS[p]}
        if more == reached:
            break
        reached = more
    assert reached == set(Phase)


def test_wire() -> None:
    sampling = SamplingParams(5, stop=("a", "b"), stop_token_ids=(3,), logit_bias={7: -1.5}, logprobs=2, seed=-4)
    request = Request(
        "r", [1, 2], sampling, (9,), "salt", 2, 3, [8], "front", slo=Slo(0.5, deadline_s=60.0), arrival_s=-2.5
    )
    wire = request.to_wire()
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(wire)) == wire
    again = Request.from_wire(wire)
    assert (again.to_wire(), again.sampling, again.slo) == (wire, sampling, Slo(0.5, None, 60.0))
    assert Request.from_wire(request.to_wire(4.0), 100.0).arrival_s == 93.5  # 6.5 s old, on another process's clock
    changes = ({"nonsense": 1}, {"sampling": {"max_tokens": 0}}, {"sampling": 5}, {"attempt": "x"}, {"attempt": [1]}, {"attempt": 2**62},
               {"attempt": 0}, {"prompt_token_ids": ["a"]}, {"prompt_token_ids": [1.5]}, {"prompt_token_ids": [2**70]},
               {"prompt_token_ids": [-1]}, {"output_token_ids": [2**32]},
               {"front_end_id": 5}, {"tenant": 5},
               {"age_s": -1.0}, {"age_s": float("nan")}, {"slo": {"ttft_s": 0}}, {"slo": {"tpot_s": "fast"}}, {"slo": {"e2e_s": 1.0}},
               {"slo": [1]}, {"eos_token_ids": [None]}, {"sampling": {"temperature": "hot"}})  # fmt: skip
    for damaged in ({}, *({**wire, **change} for change in changes)):
        with pytest.raises(InvalidRequest):
            Request.from_wire(damaged)


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_tokens", 0), ("min_tokens", 99), ("temperature", 2.1), ("top_p", -0.1), ("top_k", -1), ("top_k", 2**31), ("min_p", 2.0), ("seed", 2**63),
     ("repetition_penalty", 0.0), ("repetition_penalty", 1e-38), ("presence_penalty", 3.0), ("frequency_penalty", -3.0), ("logprobs", 21)],
)  # fmt: skip
def test_bounds_name_the_field_and_the_value(name: str, value: float) -> None:
    with pytest.raises(InvalidRequest, match=f"{name} is {value}") as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name


def test_reasons_to_end() -> None:
    def reason(token_id: int, count: int, **changes: object) -> FinishReason | None:
        sampling = SamplingParams(**{"max_tokens": 9, "stop_token_ids": (5,), **changes})
        return Request("r", [1, 2], sampling, (2,), output_token_ids=[token_id] * count).finish_reason_after(
            token_id, 8
        )

    assert reason(2, 1) is FinishReason.STOP
    assert reason(5, 1) is FinishReason.STOP
    assert reason(3, 1) is None
    assert reason(2, 1, ignore_eos=True) is None
    assert reason(2, 1, min_tokens=2) is None
    assert reason(3, 4, max_tokens=4) is FinishReason.LENGTH
    assert reason(3, 6) is FinishReason.LENGTH


def test_the_printed_table() -> None:
    assert "ARRIVED -> PLACED, ABORTED, FAILED" in print_transitions()
