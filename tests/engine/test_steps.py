"""One engine whose steps run while the next ones are prepared: every stream is the one that a step at a time gives."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdeploy_pd.clock import VirtualClock
from fastdeploy_pd.cluster.messages import Abort, Beat, Peer, Refused, Reserve, Tokens
from fastdeploy_pd.core.batch import Batch
from fastdeploy_pd.core.blocks import BlockPool
from fastdeploy_pd.core.layout import KVLayout
from fastdeploy_pd.core.scheduler import Scheduler, SchedulerOptions
from fastdeploy_pd.engine.context import EngineContext, EngineOptions
from fastdeploy_pd.engine.loop import Engine
from fastdeploy_pd.engine.outbox import Send
from fastdeploy_pd.engine.roles import Role
from fastdeploy_pd.errors import FastDeployPDError
from fastdeploy_pd.request import FinishReason, Request, SamplingParams, TokenChunk
from fastdeploy_pd.transfer.layout import KVPool
from tests.engine.simulated_cluster import (
    BLOCK_SIZE,
    ENDING,
    NUM_LAYERS,
    STEP_S,
    TOKEN_BYTES,
    OnLayer,
    SimulatedRunner,
    SimulatedStep,
    expected_tokens,
)

MAX_MODEL_LEN = 32


@dataclass(frozen=True)
class Submission:
    """A request, the turn at which it comes and the one at which its client goes away."""

    prompt: list[int]
    max_tokens: int
    on_host: bool
    arrives: int
    leaves: int | None

    @property
    def expected(self) -> list[int]:
        return expected_tokens(self.prompt, min(self.max_tokens, MAX_MODEL_LEN - len(self.prompt)))


SUBMISSIONS = st.builds(
    Submission,
    prompt=st.builds(
        lambda shared, own: [1, 2, 3, 4, 5, 6, 7, 8, 9][:shared] + own,
        st.sampled_from([0, 4, 9]),
        st.lists(st.integers(1, 900), min_size=1, max_size=9),
    ),
    max_tokens=st.integers(1, 20),
    on_host=st.booleans(),
    arrives=st.integers(0, 12),
    leaves=st.none() | st.none() | st.integers(0, 40),
)


@dataclass
class OneEngine:
    """A mixed instance, asked by one front end; collects what it answers."""

    depth: int
    rng: random.Random | None
    num_blocks: int = 40
    caching: bool = True
    chunked: bool = True
    answers: dict[str, list[TokenChunk]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        layout = KVLayout(NUM_LAYERS, self.num_blocks, 1, BLOCK_SIZE, TOKEN_BYTES // 8, "float32")
        self.runner = SimulatedRunner(KVPool(layout), self.rng, self.depth)
        budget = 10 if self.chunked else 2 * MAX_MODEL_LEN
        options = SchedulerOptions(4, budget, MAX_MODEL_LEN, self.chunked, self.caching)
        self.scheduler = Scheduler(BlockPool(self.num_blocks, BLOCK_SIZE), options, self.runner.samples_on_device)
        ids = iter(range(10**9))
        context = EngineContext("one", self.scheduler, {}, new_id=lambda: str(next(ids)), new_nonce=lambda: next(ids))
        self.clock = VirtualClock()
        self.engine = Engine(Role.MIXED, context, self.runner, self.clock)

    def submit(self, name: str, submission: Submission) -> None:
        sampling = SamplingParams(
            max_tokens=submission.max_tokens,
            temperature=0,
            logprobs=0 if submission.on_host else None,
            prompt_logprobs=0 if submission.on_host else None,
        )
        request = Request(name, submission.prompt, sampling, ENDING, front_end_id="front")
        self.answers[name] = []
        self.engine.receive("front", Reserve(request.to_wire(), None))

    def turn(self) -> None:
        self.clock.advance_to(self.clock.now_s() + STEP_S)
        self.engine.receive("front", Beat(int(self.clock.now_s() / STEP_S)))
        self.engine.step()
        assert self.scheduler.pool.num_free_among(self.runner.blocks_in_use()) == 0
        self.collect()

    def collect(self) -> None:
        for action in self.engine.take_actions():
            if isinstance(action, Send) and isinstance(action.message, Tokens):
                for chunk in action.message.chunks:
                    self.answers[chunk.request_id].append(chunk)

    def run(self, submissions: list[Submission]) -> list[list[int]]:
        """Returns: each client's tokens."""
        for now in range(5_000):
            for number, submission in enumerate(submissions):
                if submission.arrives == now:
                    self.submit(str(number), submission)
                if submission.leaves == now and now > submission.arrives:
                    self.engine.receive("front", Abort(str(number), 1))
            self.turn()
            if now > 60 and not self.engine.has_work:
                break
        assert self.scheduler.pool.counts().held == 0
        tokens = []
        for number in range(len(submissions)):
            chunks = self.answers[str(number)]
            assert [c.index for c in chunks] == list(range(len(chunks)))
            assert all(c.finish_reason is None for c in chunks[:-1])
            tokens.append([t for c in chunks for t in c.token_ids])
            if chunks and submissions[number].on_host:
                prompt = submissions[number].prompt
                assert [p and p.token_id for p in chunks[0].prompt_logprobs] == [None, *prompt[1:]]
                assert not any(c.prompt_logprobs for c in chunks[1:])
        return tokens


@settings(max_examples=300, deadline=None)
@given(
    submissions=st.lists(SUBMISSIONS, min_size=1, max_size=10),
    num_blocks=st.sampled_from([8, 10, 12, 14, 40]),
    caching=st.booleans(),
    chunked=st.booleans(),
    depth=st.sampled_from([1, 2, 2]),
    seed=st.integers(0, 10**6),
)
def test_streams_are_those_of_one_step_at_a_time(
    submissions: list[Submission], num_blocks: int, caching: bool, chunked: bool, depth: int, seed: int
) -> None:
    plain = OneEngine(1, None, num_blocks, caching, chunked).run(submissions)
    ahead = OneEngine(depth, random.Random(seed), num_blocks, caching, chunked).run(submissions)
    for submission, one, other in zip(submissions, plain, ahead, strict=True):
        if submission.leaves is None or submission.leaves <= submission.arrives:
            assert one == other == submission.expected
        else:
            assert one == submission.expected[: len(one)]
            assert other == submission.expected[: len(other)]


def some(num_requests: int) -> list[Submission]:
    return [Submission([30 + number, 5, 6], 9, False, number, None) for number in range(num_requests)]


def test_two_steps_are_in_flight_and_none_is_waited_for() -> None:
    one = OneEngine(2, random.Random(1))
    one.run(some(4))
    assert one.runner.most_in_flight == 2


def count_calls(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> list[None]:
    """Returns: a list that gets an entry for each call."""
    calls, called = list[None](), getattr(owner, name)

    def counting() -> object:
        calls.append(None)
        return called()

    monkeypatch.setattr(owner, name, counting)
    return calls


def refused(one: OneEngine, first: int, names: str, prefill: Peer | None = None) -> str:
    """Give the engine a burst of requests of 9 tokens. Returns: who is refused for now."""
    for number, name in enumerate(names):
        request = Request(name, [first + number] * 9, SamplingParams(max_tokens=2), ENDING, front_end_id="front")
        one.engine.receive("front", Reserve(request.to_wire(), prefill))
    sent = [action.message for action in one.engine.take_actions() if isinstance(action, Send)]
    return "".join(m.request_id for m in sent if isinstance(m, Refused) and m.code == "overloaded")


def test_what_is_too_much_is_refused_until_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """And of a burst of requests each is not to count all that is there."""
    one = OneEngine(1, None)
    one.engine.context.options = EngineOptions(max_queued_tokens=30)
    calls = count_calls(monkeypatch, one.scheduler, "outstanding_tokens")
    one.answers = {name: [] for name in "abcdefghi"}
    assert refused(one, 100, "ab") == "" and len(calls) == 1
    one.engine.receive("front", Abort("a", 1))
    assert refused(one, 200, "c") == "" and len(calls) == 1
    assert refused(one, 300, "def") == "ef" and len(calls) == 2  # b, c, d: what has ended is left out where it matters
    assert refused(one, 400, "g") == "g" and len(calls) == 2
    one.engine.receive("front", Abort("b", 1))
    assert refused(one, 500, "gh") == "h" and len(calls) == 3
    one.turn()
    one.turn()
    assert refused(one, 600, "i") == ""


def test_what_a_peer_computes_is_one_token_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until there are no more blocks, of which each takes three, and what waits for them counts as a whole."""
    one = OneEngine(1, None)
    one.engine.context.options = EngineOptions(max_queued_tokens=30)
    calls = count_calls(monkeypatch, one.scheduler, "outstanding_tokens")
    peer = Peer("prefill", "tcp://127.0.0.1:1")
    assert refused(one, 100, "abcdefghijklm", peer) == "" and len(calls) == 1
    assert one.engine.decode.outstanding_tokens() == 13
    assert refused(one, 200, "nop", peer) == "op"
    assert len(calls) == 1 and one.engine.decode.outstanding_tokens() == 13 + 9


@dataclass
class FailingStep:
    """Fails as a whole when its outputs are asked for."""

    step: SimulatedStep

    def poll(self) -> bool:
        return self.step.poll()

    def outputs(self) -> list[object]:
        raise FastDeployPDError("the device has lost a step", code="device_lost")


class FailingRunner(SimulatedRunner):
    """Fails once: at a launch, or in the outputs of what it launched."""

    at, where = 3, "launch"

    def launch(self, batch: Batch, on_layer: OnLayer = None) -> SimulatedStep | FailingStep:
        self.at -= 1
        if self.at == 0 and self.where == "launch":
            raise FastDeployPDError("the device takes no step", code="device_lost")
        step = super().launch(batch, on_layer)
        return FailingStep(step) if self.at == 0 else step


@pytest.mark.parametrize("where", ["launch", "outputs"])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_failed_step_ends_its_requests_and_nothing_else(depth: int, where: str) -> None:
    one = OneEngine(depth, random.Random(5))
    runner = FailingRunner(one.runner.pool, random.Random(5), depth)
    runner.where = where
    one.runner = one.engine.runner = runner
    submissions = [*some(2), Submission([80, 5, 6], 9, False, 50, None)]
    one.run(submissions)
    ended = [one.answers[str(number)][-1] for number in range(3)]
    assert FinishReason.ERROR in [c.finish_reason for c in ended]
    for submission, number, last in zip(submissions, range(3), ended, strict=True):
        tokens = [t for c in one.answers[str(number)] for t in c.token_ids]
        if last.finish_reason is FinishReason.ERROR:
            assert last.error_code == "device_lost"
            assert tokens == submission.expected[: len(tokens)]
        else:
            assert tokens == submission.expected
    assert ended[2].finish_reason is not FinishReason.ERROR


@pytest.mark.parametrize("damage", [{"attempt": "x"}, {"attempt": None}, {"prompt_token_ids": [-1] * 9}])
def test_a_damaged_request_ends_no_engine(damage: dict[str, object]) -> None:
    one = OneEngine(1, None)
    one.engine.receive("front", Reserve({**Request("0", [2] * 9).to_wire(), **damage}, None))
    (good,) = some(1)
    assert one.run([good]) == [good.expected]


def test_a_device_that_hangs_is_not_alive() -> None:
    """Messages are answered on, but the counter that peers and the lease look at stands still."""
    one = OneEngine(2, random.Random(1))
    for number, submission in enumerate(some(2)):
        one.submit(str(number), submission)
    one.turn()
    one.runner.advance = lambda: None  # type: ignore[method-assign]
    one.turn()
    counter = one.engine.counter
    for _ in range(20):
        one.turn()
    assert one.engine.counter == counter
    one.engine.receive("front", Abort("0", 1))
    assert one.engine.decode.served[("0", 1)].request.is_done


def test_blocks_that_become_free_are_given_away_at_once() -> None:
    """A request that waits for room is ordered in the very step that ends another one, not at the next tick of the timers."""
    one = OneEngine(depth=1, rng=None, num_blocks=4, caching=False, chunked=False)
    one.submit("first", Submission([1, 2, 3] * 4, 4, False, 0, None))
    one.turn()
    prefill = Peer("p", "ipc://nowhere")
    request = Request("second", [5] * 12, SamplingParams(max_tokens=4, temperature=0), ENDING, front_end_id="front")
    one.engine.receive("front", Reserve(request.to_wire(), prefill))
    assert one.engine.decode.queued and not one.engine.decode.num_ordered
    while one.answers["first"][-1].finish_reason is None:
        one.engine.step()  # no time passes: no timer helps
        one.collect()
    assert one.engine.decode.num_ordered == 1
