"""What an engine learns of its steps, over the loop that overlaps them, and who hears of it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import pairwise

import pytest

from fastdeploy_pd.clock import VirtualClock
from fastdeploy_pd.cluster.messages import Beat, Reserve, Tokens
from fastdeploy_pd.core.batch import Batch
from fastdeploy_pd.core.blocks import BlockPool
from fastdeploy_pd.core.placement import Load
from fastdeploy_pd.core.predictor import Predictor
from fastdeploy_pd.core.scheduler import Scheduler, SchedulerOptions
from fastdeploy_pd.engine.context import EngineContext
from fastdeploy_pd.engine.loop import LEAD_S, LEAST_BEAT_S, Engine
from fastdeploy_pd.engine.outbox import Send
from fastdeploy_pd.engine.roles import Role
from fastdeploy_pd.errors import FastDeployPDError
from fastdeploy_pd.model.runner import StepOutput
from fastdeploy_pd.request import Request, SamplingParams, Slo
from tests.core.test_online import TRUE, step_s
from tests.engine.simulated_cluster import OnLayer
from tests.engine.test_slo import front_end_of, submit

TURN_S = 0.0005


@dataclass
class Step:
    """Ends at a point in time."""

    clock: VirtualClock
    end_s: float
    results: list[StepOutput]
    fault: FastDeployPDError | None = None

    def poll(self) -> bool:
        if self.fault is not None:
            raise self.fault
        return self.clock.now_s() >= self.end_s

    def outputs(self) -> list[StepOutput]:
        return self.results


class Device:
    """Takes what TRUE says for each step, one after the other."""

    def __init__(self, clock: VirtualClock, depth: int) -> None:
        self.clock, self.depth = clock, depth
        self.can_advance, self.is_nearly_done, self.is_queued = False, True, True
        self.free_s = 0.0
        self.num_steps = 0
        self.fault: FastDeployPDError | None = None

    def prepare_more(self) -> bool:
        return False

    def samples_on_device(self, request: Request) -> bool:
        return True

    def launch(self, batch: Batch, on_layer: OnLayer = None) -> Step:
        parts = [(s.start, s.stop) for s in batch.sequences if s.num_tokens > 1]
        seconds = step_s(TRUE, (parts, [s.stop for s in batch.sequences if s.num_tokens == 1]))
        self.free_s = max(self.free_s, self.clock.now_s()) + seconds
        self.num_steps += 1
        results = [StepOutput(5 if s.needs_sample else None) for s in batch.sequences]
        return Step(self.clock, self.free_s, results, self.fault)


class OneEngine:
    """A mixed instance whose clock goes on by TURN_S a turn."""

    def __init__(self, depth: int) -> None:
        self.clock = VirtualClock(1.0)
        self.device = Device(self.clock, depth)
        options = SchedulerOptions(16, 2048, 32_768)
        self.scheduler = Scheduler(BlockPool(4096, 64), options, self.device.samples_on_device)
        ids = iter(range(10**9))
        context = EngineContext("one", self.scheduler, {}, new_id=lambda: str(next(ids)), new_nonce=lambda: next(ids))
        self.engine = Engine(Role.MIXED, context, self.device, self.clock)
        self.names: list[str] = []
        self.beats: deque[tuple[float, Beat]] = deque()

    def submit(self, name: str, num_tokens: int, max_tokens: int) -> None:
        self.names.append(name)
        prompt = [len(self.names)] * num_tokens  # no two share a prefix
        request = Request(name, prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True))
        self.engine.receive("front", Reserve(request.to_wire(), None))

    def run(self) -> None:
        while self.engine.has_work:
            self.engine.receive("front", Beat(int(1e6 * self.clock.now_s())))
            self.engine.step()
            sends = [a.message for a in self.engine.take_actions() if isinstance(a, Send)]
            self.beats += [(self.clock.now_s(), m) for m in sends if isinstance(m, Beat)]
            self.clock.advance_to(self.clock.now_s() + TURN_S)


@pytest.mark.parametrize("depth", [1, 2])
def test_it_learns_the_device_it_runs_on(depth: int) -> None:
    one = OneEngine(depth)
    assert one.engine.predictor is None
    lengths = [300, 1000, 2000, 5000, 9000, 20_000, 64, 128]
    for number, length in enumerate(lengths * 2):
        one.submit(str(number), length, 1)
        one.run()
    assert one.engine.predictor is not None and not one.engine.predictor.knows_decode
    assert one.scheduler.predictor == one.engine.predictor
    for number, length in enumerate(lengths):
        one.submit(f"stream-{number}", length, 150)
    one.run()
    found = one.engine.predictor
    for n, m in ((2048, 0), (500, 0), (2048, 16_000)):
        assert found.prefill_s(n, m) == pytest.approx(TRUE.prefill_s(n, m), rel=0.1)
    for size, kv in ((8, 40_000), (1, 9_000), (4, 4_000)):
        assert found.decode_s(size, kv) == pytest.approx(TRUE.decode_s(size, kv), rel=0.15)


def test_who_comes_during_a_long_step_has_a_place_in_the_next_one() -> None:
    one = OneEngine(2)
    for number in range(40):
        one.submit(str(number), 100 + 500 * (number % 8), 1)
        one.run()
    one.device.is_nearly_done = False
    begun = one.device.num_steps
    for name in ("a", "b"):
        one.submit(name, 2000, 1)  # a step each
    end_s = left_s = 0.0
    while one.engine.has_work:
        one.engine.step()
        if one.device.num_steps == begun + 1 and not end_s:
            one.submit("c", 20, 1)
            end_s = one.device.free_s
        if one.device.num_steps == begun + 2 and not left_s:
            left_s = end_s - one.clock.now_s()
            assert len(one.engine._in_flight) == 2
            assert [s.request.request_id for s in one.engine._in_flight[1].batch.sequences] == ["b", "c"]
        one.clock.advance_to(one.clock.now_s() + TURN_S)
    assert 0 < left_s < 1.5 * LEAD_S < TRUE.prefill_s(2000) / 2


@pytest.mark.parametrize("is_on_device", [True, False])
def test_prompts_leave_streams_their_tpot_wherever_they_sample(
    is_on_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream that samples on the host takes no part in every second step, whose time is its own all the same."""
    one = OneEngine(2)
    monkeypatch.setattr(one.device, "samples_on_device", lambda r: is_on_device or r.sampling.max_tokens == 1)
    options = SchedulerOptions(16, 8192, 32_768, prefill_policy="slack", guards_tpot=True)
    one.scheduler = Scheduler(BlockPool(4096, 64), options, one.device.samples_on_device)
    one.engine.context.scheduler = one.scheduler
    one.engine.start_from(TRUE)
    sampling = SamplingParams(max_tokens=300, ignore_eos=True)
    one.engine.receive("front", Reserve(Request("s", [1] * 100, sampling, slo=Slo(None, 0.05)).to_wire(), None))
    times_s: list[float] = []
    num_prompts = 0
    while one.engine.has_work:
        one.engine.receive("front", Beat(int(1e6 * one.clock.now_s())))
        if num_prompts < 20 and one.clock.now_s() > 1.3 + 0.2 * num_prompts:
            num_prompts += 1
            one.submit(f"p{num_prompts}", 8000, 1)
        one.engine.step()
        sends = [a.message for a in one.engine.take_actions() if isinstance(a, Send)]
        chunks = [c for m in sends if isinstance(m, Tokens) for c in m.chunks if c.request_id == "s"]
        times_s += [one.clock.now_s() for _ in chunks]
        one.clock.advance_to(one.clock.now_s() + TURN_S)
    assert num_prompts == 20 and len(times_s) == 300
    assert (times_s[-1] - times_s[0]) / 299 <= 0.05
    assert max((t - times_s[0]) / n for n, t in enumerate(times_s[20:], 20)) <= 0.065


def test_streams_that_a_prefill_instance_computes_for_take_seats(monkeypatch: pytest.MonkeyPatch) -> None:
    one = OneEngine(2)
    one.engine.start_from(TRUE)
    free = one.engine.load(1.0)
    for name, value in (("num_ordered", 3), ("num_ordered_tokens", 5000)):
        monkeypatch.setattr(type(one.engine.decode), name, property(lambda _, value=value: value))
    load = one.engine.load(1.0)
    assert free is not None and load is not None
    assert (free.num_seats, load.num_seats, load.num_ordered, load.ordered_tokens) == (16, 13, 3, 5000)


def test_nothing_is_launched_behind_a_step_that_is_not_queued_wholly() -> None:
    """However soon it is predicted to end: a launch would have to queue the rest, and messages would wait for the device meanwhile."""
    one = OneEngine(2)
    one.device.is_nearly_done = one.device.is_queued = False
    one.submit("a", 4000, 1)  # how long that takes is not known
    one.submit("b", 4000, 1)
    one.engine.step()
    one.engine.step()
    assert one.device.num_steps == 1
    one.device.is_queued = True
    one.engine.step()
    assert one.device.num_steps == 2


@pytest.mark.parametrize(("num_callers", "soon_s"), [(1, LEAST_BEAT_S), (149, 0.15)])
def test_front_ends_hear_soon_of_prompts(num_callers: int, soon_s: float) -> None:
    """Soon, but each of many not more often than the instance can bear."""
    one = OneEngine(2)
    heard: list[tuple[float, int]] = []

    def turn() -> None:
        for name in [*(f"front-{n}" for n in range(num_callers)), "front"]:
            one.engine.receive(name, Beat(int(1e6 * one.clock.now_s())))
        one.engine.step()
        for action in one.engine.take_actions():
            if isinstance(action, Send) and isinstance(action.message, Beat) and action.peer_id == "front-0":
                heard.append((one.clock.now_s(), action.message.outstanding_tokens))
        one.clock.advance_to(one.clock.now_s() + TURN_S)

    while one.clock.now_s() < 1.6:
        turn()
    assert len(heard) == 3, "the usual ones"
    sent_s = one.clock.now_s()
    for number in range(30):
        one.submit(str(number), 2000, 1)
        turn()
    while one.engine.has_work:
        turn()
    end_s = one.clock.now_s()
    while one.clock.now_s() < end_s + soon_s + 2 * TURN_S:
        turn()
    first_s = next(s for s, tokens in heard if tokens >= 2000)
    assert first_s - sent_s <= soon_s + 2 * TURN_S
    assert heard[-1][1] == 0
    gaps_s = [after[0] - before[0] for before, after in pairwise(heard[3:])]
    assert min(gaps_s) >= soon_s - 1e-9 and max(gaps_s) <= 0.25 + 2 * TURN_S


def test_beats_tell_front_ends() -> None:
    one = OneEngine(2)
    front_end = front_end_of("one", "two", slo_ttft_x=4.0, slo_ttft_s=0.7, instance_timeout_s=1e6)
    assert front_end.predictor_of("one") is None and front_end.predictor_of("nobody") is None
    assert submit(front_end, Slo(), 0.0, 1000).slo.ttft_s == 0.7
    for number in range(40):
        one.submit(str(number), 100 + 100 * number, 1)
        one.run()
    one.submit("stream", 100, 600)
    one.run()
    for now_s, beat in one.beats:
        front_end.receive("one", beat, now_s)
    found = front_end.predictor_of("one")
    told = [b.load.predictor for _, b in one.beats if b.load is not None]
    assert found == told[-1] and len(set(told)) > 10
    assert found.prefill_s(1000) == pytest.approx(TRUE.prefill_s(1000), rel=0.05)
    assert submit(front_end, Slo(), 1e3, 1000).slo.ttft_s == pytest.approx(4 * found.prefill_s(1000))
    assert submit(front_end, Slo(ttft_s=9.0), 1e3, 1000).slo.ttft_s == 9.0
    faster = Predictor((0, 1e-5, 0.001), (0, 0, 0))
    front_end.receive("two", Beat(1, load=Load(faster)), 1e3)
    assert submit(front_end, Slo(), 1e3, 1000).slo.ttft_s == pytest.approx(4 * 0.011)
    for wrong in (float("nan"), -0.1):
        front_end.receive("two", Beat(2, load=Load(Predictor((0, 0, wrong), (0, 0, 0)))), 1e3)
    assert front_end.predictor_of("two") == faster
    front_end.peer_lost("two", 1e3)
    assert front_end.predictor_of("two") is None


def test_a_step_that_fails_teaches_nothing() -> None:
    one = OneEngine(1)
    one.engine.start_from(TRUE)
    one.device.fault = FastDeployPDError("out of memory")
    for number in range(20):
        one.submit(str(number), 1000, 2)
        one.run()
    assert one.device.num_steps >= 20
    assert one.engine.predictor == TRUE == one.scheduler.predictor


def test_who_knows_no_prompts_tells_the_scheduler_nothing() -> None:
    one = OneEngine(1)
    decode_alone = Predictor((0, 0, 0), TRUE.decode)
    one.engine.start_from(decode_alone)
    assert (one.engine.predictor, one.scheduler.predictor) == (decode_alone, None)


@pytest.mark.parametrize("depth", [1, 2])
def test_what_is_in_flight_counts_until_it_has_ended(depth: int) -> None:
    one = OneEngine(depth)
    one.engine.start_from(TRUE)
    for name in "abc":
        one.submit(name, 2048, 1)
    seen = []
    while one.engine.has_work:
        one.engine.step()
        one.engine.take_actions()
        load = one.engine.load(one.clock.now_s())
        assert load is not None
        if one.device.free_s > one.clock.now_s():
            assert load.busy_s == pytest.approx(one.device.free_s - one.clock.now_s(), abs=2 * TURN_S)
        seen.append(one.engine.outstanding_tokens())
        one.clock.advance_to(one.clock.now_s() + TURN_S)
    assert list(dict.fromkeys(n // 2048 for n in seen)) == [3, 2, 1, 0]


def test_a_step_that_takes_too_long_uses_up_nothing_of_the_next_ones_time() -> None:
    one = OneEngine(depth=2)
    a, b, c = TRUE.prefill
    hasty = Predictor((a / 4, b / 4, c / 4), TRUE.decode)
    one.engine.start_from(hasty)
    for name in "ab":
        one.submit(name, 2048, 1)
    while one.device.num_steps < 2:
        one.engine.step()
    alone_s = hasty.prefill_s(2048)
    one.clock.advance_to(one.clock.now_s() + 3 * alone_s)  # the first one ends after 4
    one.engine.step()
    load = one.engine.load(one.clock.now_s())
    assert load is not None and load.busy_s == pytest.approx(alone_s)
