"""The order of prompts, and what running streams are left."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdeploy_pd.core.blocks import BlockPool
from fastdeploy_pd.core.order import LATE_EVERY, MAX_WAIT_S, POLICIES, Slack, due_s, late, make_policy, stream_slack_s
from fastdeploy_pd.core.predictor import Predictor
from fastdeploy_pd.core.scheduler import Scheduler, SchedulerOptions
from fastdeploy_pd.errors import ConfigError
from fastdeploy_pd.request import Phase, Request, SamplingParams, Slo

PREDICTOR = Predictor((1e-9, 1e-4, 0.005), (2e-8, 2e-5, 0.01))
TPOT_S = 0.1


def request(name: str, num_tokens: int, arrival_s: float = 0.0, slo: Slo | None = None, max_tokens: int = 4) -> Request:
    made = Request(name, [1] * num_tokens, SamplingParams(max_tokens=max_tokens), slo=slo or Slo(), arrival_s=arrival_s)
    made.advance(Phase.PLACED, arrival_s)
    made.advance(Phase.RESERVED, arrival_s)
    return made


@given(st.lists(st.tuples(st.floats(0, 20), st.floats(0.1, 5)), max_size=7), st.floats(0, 5))
@settings(max_examples=300, deadline=None)
def test_nobody_could_make_more_come_on_time(jobs: list[tuple[float, float]], now_s: float) -> None:
    jobs.sort()
    found = late(jobs, now_s)
    end_s = now_s
    for (due, seconds), is_late in zip(jobs, found, strict=True):
        if not is_late:
            end_s += seconds
            assert end_s <= due + 1e-9  # what stays is on time
    best = 0
    for chosen in itertools.product((False, True), repeat=len(jobs)):
        end_s, is_possible = now_s, True
        for (due, seconds), is_in in zip(jobs, chosen, strict=True):
            end_s += seconds * is_in
            is_possible &= not is_in or end_s <= due
        if is_possible:
            best = max(best, sum(chosen))
    assert found.count(False) >= best


def names(policy: str, prompts: list[Request], now_s: float = 0.0) -> str:
    chosen = make_policy(policy, lambda: PREDICTOR)
    return "".join(r.request_id for r in (chosen.order(prompts, now_s) if chosen else prompts))


def test_each_policy_by_its_name() -> None:
    prompts = [request("a", 500, 0.0, Slo(3.0)), request("b", 100, 1.0), request("c", 900, 2.0, Slo(0.5))]
    assert [names(p, prompts) for p in POLICIES] == ["abc", "bac", "cab", "cab", "cab"]
    prompts[1].priority = -1
    assert [names(p, prompts) for p in POLICIES[1:]] == ["bac", "bca", "bca", "bca"]
    with pytest.raises(ConfigError, match=r"'fast'.*fcfs, sjf"):
        make_policy("fast", lambda: None)
    assert due_s(prompts[1]) == 1.0 + MAX_WAIT_S
    assert due_s(request("d", 5, 2.0, Slo(9.0, deadline_s=4.0))) == 6.0


def test_what_is_known_of_the_cache_counts() -> None:
    long, short = request("l", 900), request("s", 300)
    long.local.num_matched_tokens = 832
    assert names("sjf", [short, long]) == "ls"


def test_the_one_that_makes_others_late_goes_back_and_is_not_forgotten() -> None:
    long = request("L", 60_000, 0.0, Slo(5.0))
    short = [request(str(n), 1000, 0.0, Slo(5.5)) for n in range(3)]
    policy = Slack(lambda: PREDICTOR)
    assert PREDICTOR.prefill_s(60_000) > 5.0
    orders = ["".join(r.request_id for r in policy.order([long, *short], 0.0)) for _ in range(2 * LATE_EVERY)]
    assert orders.count("L012") == 2 and orders.count("012L") == 2 * LATE_EVERY - 2


def stream(num_tokens: int, begun_s: float, tpot_s: float | None = TPOT_S) -> Request:
    made = request("s", 10, 0.0, Slo(tpot_s=tpot_s), max_tokens=1000)
    made.advance(Phase.PREFILLING, 0.0)
    made.advance(Phase.DECODING, begun_s)
    made.output_token_ids = [1] * num_tokens
    return made


def test_what_a_stream_is_ahead_it_may_wait() -> None:
    fresh, ahead, careless = stream(1, 10.0), stream(40, 10.0), stream(1, 0.0, None)
    assert stream_slack_s([careless], 0.01, 10.0) == float("inf")
    assert stream_slack_s([ahead], 0.01, 10.0) == pytest.approx(40 * 0.095 - 0.01)
    assert stream_slack_s([ahead, fresh, careless], 0.01, 10.0) == pytest.approx(0.085)
    late_one, lost_one = stream(1, 9.0), stream(1, 0.0)
    assert stream_slack_s([ahead, late_one], 0.01, 10.0) < 0  # can be on time again
    assert stream_slack_s([ahead, lost_one], 0.01, 10.0) == stream_slack_s([ahead], 0.01, 10.0)


def serve(policy: str, guards: bool, seed: int) -> tuple[dict[str, float], dict[str, float], int]:
    """Run a scheduler on a virtual clock, steps taking what the predictor says.

    Returns: first token times and mean times per token by request, and how many prompt tokens were computed.
    """
    rng = random.Random(seed)
    scheduler = Scheduler(
        BlockPool(3000, 16), SchedulerOptions(64, 2048, 40_000, prefill_policy=policy, guards_tpot=guards)
    )
    scheduler.predictor = PREDICTOR
    offered = sorted(
        (
            request(str(n), rng.choice((40, 200, 900, 4000)), rng.uniform(0, 6), max_tokens=rng.randrange(2, 30))
            for n in range(40)
        ),
        key=lambda r: r.arrival_s,
    )
    for r in offered:
        r.slo = Slo(5 * PREDICTOR.prefill_s(len(r.prompt_token_ids)), TPOT_S)
        r.prompt_token_ids = [int(r.request_id) + 1] * len(r.prompt_token_ids)
    now_s, num_computed, num_steps = 0.0, 0, 0
    first_s: dict[str, float] = {}
    tpot_s: dict[str, float] = {}
    waiting = list(offered)
    while waiting or not scheduler.is_idle:
        while waiting and waiting[0].arrival_s <= now_s:
            scheduler.add(waiting.pop(0))
        batch = scheduler.schedule(now_s)
        if not batch:
            assert scheduler.is_idle, "there is work, and nothing is computed"
            now_s = waiting[0].arrival_s if waiting else now_s
            continue
        scheduler.launched(batch)
        streams = [s for s in batch.sequences if s.num_tokens == 1]
        now_s += PREDICTOR.decode_s(len(streams), sum(s.stop for s in streams)) if streams else 0.0
        for s in batch.sequences:
            if s.num_tokens > 1:
                now_s += PREDICTOR.prefill_s(s.stop, s.start)
                num_computed += s.num_tokens
        scheduler.computed(batch.sequences)
        for s in batch.sequences:
            if not s.needs_sample:
                continue
            r = s.request
            r.output_token_ids.append(1)
            if r.phase is Phase.PREFILLING:
                r.advance(Phase.DECODING, now_s)
                first_s[r.request_id] = now_s - r.arrival_s
            if len(r.output_token_ids) == r.sampling.max_tokens:
                tpot_s[r.request_id] = (now_s - first_s[r.request_id] - r.arrival_s) / (r.sampling.max_tokens - 1)
                scheduler.remove(r)
        num_steps += 1
        assert num_steps < 50_000
    assert scheduler.pool.num_free == 3000
    return first_s, tpot_s, num_computed


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("guards", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_everybody_ends_and_no_token_is_computed_twice(policy: str, guards: bool, seed: int) -> None:
    first_s, tpot_s, num_computed = serve(policy, guards, seed)
    assert len(first_s) == len(tpot_s) == 40
    rng = random.Random(seed)
    lengths = [(rng.choice((40, 200, 900, 4000)), rng.uniform(0, 6), rng.randrange(2, 30))[0] for _ in range(40)]
    assert num_computed <= sum(lengths)  # overtaken prompts keep what they have; the cache may save some


@pytest.mark.parametrize("seed", range(6))
def test_guarded_streams_keep_their_slo(seed: int) -> None:
    _, guarded, _ = serve("slack", True, seed)
    assert max(guarded.values()) <= TPOT_S


def test_unguarded_streams_do_not() -> None:
    assert max(max(serve("slack", False, seed)[1].values()) for seed in range(6)) > TPOT_S


def test_slack_brings_more_first_tokens_on_time_than_any_other() -> None:
    def on_time(policy: str) -> int:
        count = 0
        for seed in range(8):
            first_s, _, _ = serve(policy, True, seed)
            rng = random.Random(seed)
            for n in range(40):
                length = (rng.choice((40, 200, 900, 4000)), rng.uniform(0, 6), rng.randrange(2, 30))[0]
                count += first_s[str(n)] <= 5 * PREDICTOR.prefill_s(length)
        return count

    counts = {policy: on_time(policy) for policy in POLICIES}
    assert counts["slack"] == max(counts.values()) and counts["slack"] > counts["fcfs"]


def begun(policy: str, num_prompts: int, num_blocks: int) -> tuple[Scheduler, list[Request]]:
    """Returns: a scheduler in which prompts that are due within 9 s have begun, and these: they hold 375, 338, 300 blocks."""
    scheduler = Scheduler(BlockPool(num_blocks, 16), SchedulerOptions(64, 512, 40_000, prefill_policy=policy))
    scheduler.predictor = PREDICTOR
    prompts = [request(str(n), 6000 - 600 * n, 0.1 * n, Slo(9.0 - n)) for n in range(num_prompts)]
    for r in prompts:
        r.prompt_token_ids = [int(r.request_id) + 2] * len(r.prompt_token_ids)
        scheduler.add(r)
        batch = scheduler.schedule(r.arrival_s)
        assert [s.request for s in batch.sequences] == [r], "the last one is due first, and the shortest"
        scheduler.launched(batch)
        scheduler.computed(batch.sequences)
    return scheduler, prompts


def test_lost_prompts_give_their_blocks_to_one_that_can_be_on_time() -> None:
    scheduler, (oldest, middle, last) = begun("slack", 3, 1030)
    newcomer = request("on time", 2000, 30.0, Slo(5.0))
    scheduler.add(newcomer)
    assert [s.request for s in scheduler.schedule(30.0).sequences] == [newcomer]
    assert [bool(r.local.block_table) for r in (oldest, middle, last)] == [True, True, False]
    assert last.local.num_preemptions == 1 and last in scheduler.waiting
    large = request("large", 10_000, 30.0, Slo(3.0))
    scheduler.add(large)
    assert scheduler.schedule(30.0)
    assert middle.local.block_table and not large.local.block_table, "the oldest one's blocks would be needed too"


@pytest.mark.parametrize("why", ["", "late itself", "in flight", "read by a transfer", "has begun to generate"])
def test_nothing_is_taken_in_vain(why: str) -> None:
    scheduler, lost = begun("sjf", 2, 730)
    for r in lost:
        r.local.is_preemptible = why != "read by a transfer"
        r.local.last_step += 9 * (why == "in flight")
        r.output_token_ids += [1] * (why == "has begun to generate")
    scheduler.add(request("new", 2000, 30.0, Slo(0.1 if why == "late itself" else 1.0)))
    assert scheduler.schedule(30.0)
    assert scheduler.num_preemptions == (why == "")


def test_nobody_starves_however_many_arrive() -> None:
    scheduler = Scheduler(BlockPool(4000, 16), SchedulerOptions(64, 512, 40_000, prefill_policy="slack"))
    scheduler.predictor = PREDICTOR
    hopeless = request("L", 6000, 0.0, Slo(0.1), max_tokens=1)
    scheduler.add(hopeless)
    now_s, number = 0.0, 0
    while not hopeless.output_token_ids:
        while number * 0.04 <= now_s:  # more than there is time for
            made = request(str(number), 500, now_s, Slo(0.5), max_tokens=1)
            made.prompt_token_ids = [number + 2] * 500
            scheduler.add(made)
            number += 1
        batch = scheduler.schedule(now_s)
        scheduler.launched(batch)
        now_s += 0.056
        scheduler.computed(batch.sequences)
        for s in batch.sequences:
            if s.needs_sample:
                s.request.output_token_ids.append(1)
                scheduler.remove(s.request)
        assert now_s < 0.056 * LATE_EVERY * (6000 / 512 + 4)
