"""Tenants that have prompts waiting get alike, whatever they send; nobody starves, and as much is computed as without."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdeploy_pd.core import fairness
from fastdeploy_pd.core.batch import Batch
from fastdeploy_pd.core.blocks import BlockPool
from fastdeploy_pd.core.fairness import INPUT_WEIGHT, OUTPUT_WEIGHT, VirtualTokenCounters
from fastdeploy_pd.core.order import Slack, Sorted, num_left
from fastdeploy_pd.core.predictor import Predictor
from fastdeploy_pd.core.scheduler import Scheduler, SchedulerOptions
from fastdeploy_pd.errors import ConfigError
from fastdeploy_pd.request import Phase, Request, SamplingParams, Slo

NUM_SEQS, BUDGET, MAX_LEN = 6, 64, 4096
POLICIES = ("fcfs", "sjf", "edf", "slack")


class Server:
    """A scheduler whose steps take a second, and what its tenants get of it."""

    def __init__(self, name: str = "vtc", policy: str = "fcfs", num_blocks: int = 400) -> None:
        options = SchedulerOptions(
            NUM_SEQS, BUDGET, MAX_LEN, enable_prefix_caching=False, prefill_policy=policy, fairness=name
        )
        self.scheduler = Scheduler(BlockPool(num_blocks, 16), options)
        self.scheduler.predictor = Predictor((0.0, 0.01, 0.0), (0.0, 0.0, 0.1))
        self.got: Counter[str] = Counter()
        self.num_added = 0
        self.now_s = 0.0
        self.ended: set[Request] = set()
        self.has_wasted = False  # whether the newest step could have begun any prompt that waits, and did not

    def add(self, tenant: str, num_tokens: int, num_output: int, ttft_s: float | None = None) -> Request:
        self.num_added += 1
        sampling = SamplingParams(max_tokens=num_output)
        request = Request(f"{tenant}{self.num_added}", [1] * num_tokens, sampling, tenant=tenant, slo=Slo(ttft_s))
        request.arrival_s = self.now_s
        request.advance(Phase.PLACED, self.now_s)
        request.advance(Phase.RESERVED, self.now_s)
        self.scheduler.add(request)
        return request

    def num_waiting(self, tenant: str) -> int:
        return sum(r.tenant == tenant for r in self.scheduler.waiting)

    def step(self) -> Batch:
        batch = self.scheduler.schedule(self.now_s)
        waiting, pool = self.scheduler.waiting, self.scheduler.pool
        most = max((pool.num_blocks_for(r.num_tokens) for r in waiting), default=0) + len(self.scheduler.running)
        has_room = most <= pool.num_free and len(self.scheduler.running) < NUM_SEQS
        self.has_wasted = bool(waiting) and has_room and batch.num_tokens < BUDGET
        self.scheduler.launched(batch)
        self.now_s += 1
        self.scheduler.computed(batch.sequences)
        for s in batch.sequences:
            prompt = max(0, min(s.stop, len(s.request.prompt_token_ids)) - s.start)
            again = 0 if s.num_tokens == 1 else s.num_tokens - prompt  # computed once more after a preemption
            self.got[s.request.tenant] += INPUT_WEIGHT * (prompt + again) + OUTPUT_WEIGHT * s.needs_sample
            if s.needs_sample:
                if s.request.phase is Phase.PREFILLING:
                    s.request.advance(Phase.DECODING, self.now_s)
                s.request.output_token_ids.append(1)
                if s.request.finish_reason_after(1, MAX_LEN) is not None:
                    self.scheduler.remove(s.request)
                    self.ended.add(s.request)
        return batch


SHAPES = st.tuples(st.integers(2, 150), st.integers(1, 30))


def backlogged(
    server: Server, shapes: dict[str, list[tuple[int, int]]], num_steps: int, on_step: Callable[[], object]
) -> None:
    """Let each tenant always have more prompts waiting than a step can begin."""
    for number in range(num_steps):
        for tenant, sizes in shapes.items():
            for _ in range(NUM_SEQS + 1 - server.num_waiting(tenant)):
                server.add(tenant, *sizes[server.num_added % len(sizes)], ttft_s=5.0 + number % 7)
        assert server.step()
        on_step()


@settings(deadline=None, max_examples=25)
@given(st.lists(SHAPES, min_size=1, max_size=12), st.lists(SHAPES, min_size=1, max_size=3), st.sampled_from(POLICIES))
def test_two_with_prompts_waiting_get_alike(
    many: list[tuple[int, int]], few: list[tuple[int, int]], policy: str
) -> None:
    """To within what the requests admitted at one time can take, at any time; that is a small part of all they get."""
    server, sizes = Server(policy=policy), [*many, *few]
    bound = NUM_SEQS * max(INPUT_WEIGHT * n + OUTPUT_WEIGHT * m for n, m in sizes) + INPUT_WEIGHT * BUDGET
    differences: list[int] = []
    backlogged(server, {"a": many, "b": few}, 200, lambda: differences.append(abs(server.got["a"] - server.got["b"])))
    assert max(differences) <= bound
    assert dict(server.got) == pytest.approx(server.scheduler._counters.counters)  # type: ignore[union-attr]


def test_what_others_generate_counts_once() -> None:
    counters = VirtualTokenCounters(lambda: None)
    for decode_id, total in (("d", 0), ("d", 7), ("d", 7), ("d", 3), ("d", 9), ("e", 100), ("e", 101)):
        counters.hear(decode_id, "a", total)
    assert counters.counters == {"a": OUTPUT_WEIGHT * (9 + 1)}, "what was there before e was first heard is not known"


def test_without_it_who_sends_more_gets_more() -> None:
    shares = []
    for name in ("none", "vtc"):
        server = Server(name)
        for _ in range(60):
            for tenant, count in (("many", 9), ("few", 1)):
                for _ in range(count):
                    server.add(tenant, 60, 2)
            server.step()
        shares.append(server.got["few"] / server.got.total())
    assert shares[0] < 0.15 and shares[1] > 0.45


@pytest.mark.parametrize("policy", POLICIES)
def test_who_comes_late_has_saved_nothing_up_and_does_not_starve(policy: str) -> None:
    """Its prompt is computed at once beside others with a backlog; later it gets no more than they do."""
    server = Server(policy=policy)
    shapes = {"a": [(100, 3)], "b": [(40, 9)]}
    backlogged(server, shapes, 100, lambda: None)
    before = server.got.copy()
    first = server.add("c", 100, 1)
    backlogged(server, shapes, 12, lambda: None)
    assert first in server.ended
    shapes["c"] = [(100, 3)]
    backlogged(server, shapes, 300, lambda: None)
    gained = server.got - before
    assert max(gained.values()) - min(gained.values()) < 2 * NUM_SEQS * 106 < before["a"]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), *[st.integers(1, n) for n in (200, 20)]), min_size=1, max_size=20),
    st.integers(20, 60),
)
def test_all_end_and_no_step_computes_less_for_it(rows: list[tuple[str, int, int]], num_blocks: int) -> None:
    """Also where blocks run out and requests are preempted."""
    server = Server(num_blocks=num_blocks)
    requests = [server.add(*row) for row in rows]
    for _ in range(3000):
        if server.scheduler.is_idle:
            break
        assert server.step(), "something waits, so something is computed"
        assert not server.has_wasted
    assert set(requests) == server.ended
    assert server.scheduler.pool.counts().held == 0


def test_within_a_tenant_the_policy_orders() -> None:
    def request(tenant: str, num_tokens: int) -> Request:
        return Request(f"{tenant}{num_tokens}", [1] * num_tokens, tenant=tenant)

    prompts = [request("a", 50), request("a", 10), request("b", 30), request("b", 40), request("c", 5)]
    counters = VirtualTokenCounters(lambda: Sorted(num_left))
    assert [r.request_id for r in counters.order(prompts, 0.0)] == ["a10", "b30", "c5", "a50", "b40"]
    counters.counters["a"] = 1000
    assert [r.request_id for r in counters.order(prompts, 0.0)] == ["b30", "c5", "b40", "a10", "a50"]
    slack = VirtualTokenCounters(lambda: Slack(lambda: None))
    assert set(slack.order(prompts, 0.0)) == set(prompts)


def test_many_names_are_not_remembered_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fairness, "MAX_TENANTS", 10)
    counters = VirtualTokenCounters(lambda: None)
    for number in range(100):
        counters.counters[f"old{number}"] = number
        counters.order([Request("r", [1], tenant=f"t{number % 3}")], 0.0)
        assert len(counters.counters) <= 12
    assert "old99" in counters.counters, "who has had most is not forgiven"


def test_a_wrong_name_is_told() -> None:
    with pytest.raises(ConfigError, match="--fairness is 'fair'; it must be one of none, vtc"):
        Server("fair")
