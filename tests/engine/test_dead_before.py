"""An instance that died just before a front end came is a member until its lease lapses; nobody answers there."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from fastdeploy_pd.cluster.messages import Abort, Beat, Peer, Refused, Reserve, Reserved, Tokens
from fastdeploy_pd.core.placement import Load
from fastdeploy_pd.core.predictor import Predictor
from fastdeploy_pd.engine.frontend import UNHEARD_S, FrontEnd, Instance
from fastdeploy_pd.engine.outbox import Send
from fastdeploy_pd.request import Request, Slo, TokenChunk

ROLES = {"prefill-1": (True, False), "prefill-2": (True, False), "decode-1": (False, True), "decode-2": (False, True)}


def members(*names: str) -> list[Instance]:
    return [Instance(Peer(name, "tcp://127.0.0.1:1"), *ROLES[name]) for name in names]


def new_front_end(heard: Sequence[str] = ()) -> FrontEnd:
    front_end = FrontEnd("front", random.Random(0))
    front_end.set_members(members(*ROLES), 0.0)
    for name in heard:
        front_end.receive(name, Beat(1), 0.1)
    return front_end


def places(front_end: FrontEnd, now_s: float, count: int = 40) -> dict[str, set[str]]:
    """Submit so many requests. Returns: where each one is computed."""
    for number in range(count):
        front_end.submit(Request(f"{now_s}-{number}", [1] * 5), now_s)
    return {i: t.placement.instance_ids for i, t in front_end.requests.items() if t.placement}


@pytest.mark.parametrize("dead", ["decode-1", "prefill-1"])
def test_what_was_placed_there_is_placed_again_when_its_lease_lapses(dead: str) -> None:
    front_end = new_front_end()
    moved = {i for i, names in places(front_end, 0.5).items() if dead in names}
    assert 5 < len(moved) < 35
    front_end.outbox.take()
    front_end.set_members(members(*(name for name in ROLES if name != dead)), 0.9)
    after = {i: t.placement.instance_ids for i, t in front_end.requests.items() if t.placement}
    assert len(after) == 40 and not any(dead in names for names in after.values())
    assert {i for i, t in front_end.requests.items() if t.request.attempt == 2} == moved
    sent = [a.message for a in front_end.outbox.take() if isinstance(a, Send)]
    assert {m.request["request_id"] for m in sent if isinstance(m, Reserve)} == moved
    assert {m.request_id for m in sent if isinstance(m, Abort)} == moved


@pytest.mark.parametrize("name", ["decode-1", "prefill-1"])
def test_who_has_answered_goes_on_when_its_lease_lapses(name: str) -> None:
    front_end = new_front_end(list(ROLES))
    before = places(front_end, 0.5)
    front_end.set_members(members(*(other for other in ROLES if other != name)), 0.9)
    assert {i: t.placement.instance_ids for i, t in front_end.requests.items() if t.placement} == before
    assert all(t.request.attempt == 1 for t in front_end.requests.values())
    assert all(name not in names for i, names in places(front_end, 0.95).items() if i.startswith("0.95"))


def test_who_is_not_needed_any_more_may_leave() -> None:
    front_end = new_front_end(["decode-1", "decode-2"])
    moved = {i for i, names in places(front_end, 0.5).items() if "prefill-1" in names}
    request_id = sorted(moved)[0]
    decode_id = front_end.requests[request_id].decode_id
    front_end.receive(decode_id, Reserved(request_id, 1), 0.6)
    front_end.receive(decode_id, Tokens((TokenChunk(request_id, 1, 0, (7,)),)), 0.7)
    front_end.set_members(members("prefill-2", "decode-1", "decode-2"), 0.9)
    assert {i for i, t in front_end.requests.items() if t.request.attempt == 2} == moved - {request_id}


def test_others_of_its_kind_go_before_who_does_not_answer() -> None:
    front_end = new_front_end(["prefill-2", "decode-2"])
    now_s = UNHEARD_S + 0.1
    found = places(front_end, now_s).values()
    assert all(names == {"prefill-2", "decode-2"} for names in found)
    for name in ("prefill-1", "decode-1"):
        front_end.receive(name, Beat(1), now_s)
    assert {name for names in places(front_end, now_s + 0.1).values() for name in names} == set(ROLES)


@pytest.mark.parametrize("heard", [(), ("decode-1", "decode-2")])
def test_who_is_the_only_one_of_its_kind_is_waited_for(heard: Sequence[str]) -> None:
    """It may be busy with a step that takes seconds."""
    front_end = new_front_end(heard)
    found = places(front_end, UNHEARD_S + 0.1)
    assert len(found) == 40 and {name for names in found.values() for name in names} == set(ROLES)


def test_a_full_instance_is_not_the_last_word_while_another_may_answer() -> None:
    front_end = FrontEnd("front", random.Random(0))
    front_end.set_members(members("decode-1", "decode-2"), 0.0)
    front_end.receive("decode-1", Beat(1), 0.1)
    now_s = UNHEARD_S + 0.1
    assert places(front_end, now_s, 1) == {f"{now_s}-0": {"decode-1"}}
    front_end.receive("decode-1", Refused(f"{now_s}-0", 1, "the queue is full", "overloaded"), now_s)
    assert front_end.requests[f"{now_s}-0"].decode_id == "decode-2" and not front_end.take_events()


def test_who_does_not_answer_counts_in_admission() -> None:
    slow = Load(Predictor((0.0, 1.0, 0.0), (0.0, 0.0, 1e-3)))
    front_end = new_front_end()
    for name in ("decode-1", "decode-2"):
        front_end.receive(name, Beat(1, load=slow), 0.1)
    front_end.submit(Request("r", [1] * 9, slo=Slo(deadline_s=5.0)), UNHEARD_S + 0.1)
    assert not front_end.take_events() and front_end.requests["r"].placement
