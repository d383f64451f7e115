"""Budgets hold, everything ends, blocks come back; with and without chunks, caches and enough memory."""

from __future__ import annotations

import random
from typing import Any

import pytest

from fastdeploy_pd.core.batch import Batch, slot_mapping
from fastdeploy_pd.core.blocks import BlockPool, extend_hashes
from fastdeploy_pd.core.predictor import Predictor
from fastdeploy_pd.core.scheduler import Scheduler, SchedulerOptions
from fastdeploy_pd.errors import OutOfBlocks
from fastdeploy_pd.request import Phase, Request, SamplingParams, Slo


def new_request(name: str, prompt: list[int], max_tokens: int = 4, **changes: object) -> Request:
    request = Request(name, prompt, SamplingParams(max_tokens=max_tokens), **changes)
    request.advance(Phase.PLACED, 0)
    request.advance(Phase.RESERVED, 0)
    return request


def compute(scheduler: Scheduler, batch: Batch) -> None:
    """What an engine does with a batch, with token 7 as every answer."""
    scheduler.launched(batch)
    scheduler.computed(batch.sequences)
    for sequence in batch.sequences:
        request = sequence.request
        if sequence.stop == request.num_tokens:
            request.output_token_ids.append(7)
            if request.phase is Phase.PREFILLING:
                request.advance(Phase.DECODING, 0)
            if request.finish_reason_after(7, scheduler.options.max_model_len):
                request.advance(Phase.FINISHED, 0)
                scheduler.remove(request)


@pytest.mark.parametrize("num_blocks", [9, 14, 60])
@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("caching", [True, False])
def test_everything_ends_within_its_budget(num_blocks: int, chunked: bool, caching: bool) -> None:
    rng = random.Random(num_blocks)
    for _ in range(15):
        options = SchedulerOptions(4, 12 if chunked else 40, 32, chunked, caching)
        scheduler = Scheduler(BlockPool(num_blocks, 4), options)
        shared = [rng.randrange(99) for _ in range(9)]
        requests = [
            new_request(
                str(n),
                (shared if rng.random() < 0.5 else []) + [rng.randrange(99) for _ in range(rng.randint(1, 15))],
                rng.randint(1, 8),
            )
            for n in range(12)
        ]
        for request in requests:
            scheduler.add(request)
        for _ in range(2000):
            batch = scheduler.schedule(0)
            assert sum(s.num_tokens for s in batch.sequences if s.num_tokens > 1) <= options.max_num_batched_tokens
            assert len(batch.sequences) <= 4
            for sequence in batch.sequences:
                assert sequence.num_tokens > 0
                assert sequence.start == sequence.request.local.num_computed_tokens
                slot_mapping(sequence.request.local.block_table, sequence.start, sequence.stop, 4)
            compute(scheduler, batch)
            if scheduler.is_idle:
                break
        assert all(r.phase is Phase.FINISHED and len(r.output_token_ids) == r.sampling.max_tokens for r in requests)
        assert scheduler.pool.counts().held == 0


def test_streams_leave_prompts_the_whole_budget() -> None:
    scheduler = Scheduler(BlockPool(40, 4), SchedulerOptions(8, 16, 32, enable_prefix_caching=False))
    for number in range(8):
        scheduler.add(new_request(str(number), list(range(8)), 9))
    steps = []
    while not scheduler.is_idle:
        batch = scheduler.schedule(0)
        steps.append([s.num_tokens for s in batch.sequences])
        compute(scheduler, batch)
    assert steps[:5] == [[8, 8], [1, 1, 8, 8], [1] * 4 + [8, 8], [1] * 6 + [8, 8], [1] * 8]


def test_streams_go_on_where_they_are_more_than_the_budget() -> None:
    scheduler = Scheduler(BlockPool(40, 4), SchedulerOptions(4, 2, 32, enable_prefix_caching=False))
    for number in range(4):
        scheduler.add(new_request(str(number), [number, 5], 9))
    for _ in range(4):
        compute(scheduler, scheduler.schedule(0))
    assert [s.num_tokens for s in scheduler.schedule(0).sequences] == [1] * 4


def test_a_waiting_prompt_is_as_much_work_as_the_prefix_cache_leaves_of_it() -> None:
    scheduler = Scheduler(BlockPool(40, 4), SchedulerOptions(1, 64, 64))
    for number in range(2):
        scheduler.add(new_request(str(number), list(range(16)), 2))
        assert scheduler.outstanding_tokens() == (16 if number == 0 else 1 + 4)
        compute(scheduler, scheduler.schedule(0))


@pytest.mark.parametrize("has_room", [True, False])
def test_a_waiting_prompt_is_more_work_when_its_cached_prefix_is_gone(has_room: bool) -> None:
    scheduler = Scheduler(BlockPool(12, 4), SchedulerOptions(max_num_batched_tokens=16))
    first, again = new_request("first", list(range(20)), 1), new_request("again", list(range(20)), 1)
    scheduler.add(first)
    while not first.is_done:
        compute(scheduler, scheduler.schedule(0))
    scheduler.add(again)
    assert scheduler.outstanding_tokens() == 20 - 16
    taken = scheduler.pool.allocate(12)
    if has_room:
        scheduler.pool.release(taken)
    scheduler.schedule(0)
    assert again.local.num_computed_tokens == 0 and scheduler.outstanding_tokens() == 20


@pytest.mark.parametrize("policy", ["fcfs", "slack"])
def test_prompts_of_one_token_wait_for_their_turn(policy: str) -> None:
    """However many come, and whatever they are: a longer prompt that came before is begun before."""
    options = SchedulerOptions(4, 64, 64, enable_prefix_caching=False, prefill_policy=policy)
    scheduler = Scheduler(BlockPool(100, 4), options)
    for number in range(4):
        scheduler.add(new_request(f"first {number}", [number]))
    compute(scheduler, scheduler.schedule(0))
    wanted = new_request("long", list(range(30)))
    scheduler.add(wanted)
    for number in range(40):
        scheduler.add(new_request(str(number), [number]))
    for _ in range(4):
        compute(scheduler, scheduler.schedule(0))
    assert wanted.local.num_computed_tokens >= 30


@pytest.mark.parametrize(("busy_s", "num_tokens"), [(0.0, 500), (0.05, 200)])
def test_a_step_begins_when_those_in_flight_have_ended(busy_s: float, num_tokens: int) -> None:
    """What a step may hold beside a prompt whose first token is due depends on when it begins."""
    options = SchedulerOptions(4, 4096, 4096, enable_prefix_caching=False, prefill_policy="slack", guards_tpot=True)
    scheduler = Scheduler(BlockPool(100, 16), options)
    scheduler.predictor = Predictor((0.0, 1e-4, 0.0), (0.0, 1e-4, 0.0))
    for name, length, ttft_s in (("due", 100, 0.1), ("later", 500, 10.0)):
        scheduler.add(new_request(name, [length] * length, slo=Slo(ttft_s=ttft_s)))
    parts = {s.request.request_id: s.num_tokens for s in scheduler.schedule(0.0, busy_s).sequences}
    assert parts == {"due": 100, "later": pytest.approx(num_tokens, abs=2)}


def test_blocks_that_a_waiting_prompt_holds_are_not_promised_to_it_again() -> None:
    scheduler, request = Scheduler(BlockPool(10, 16), SchedulerOptions(4, 64, 256)), new_request("a", [1] * 100)
    assert scheduler.reserve(request)
    scheduler.add(request)
    load = scheduler.load(Predictor((0.0, 1e-4, 0.0), (0.0, 1e-4, 0.0)), 0.0, 0.0)
    assert load.num_free_tokens == 16 * scheduler.pool.num_free == 48


def test_a_cached_prefix_is_not_computed_again() -> None:
    scheduler = Scheduler(BlockPool(40, 4), SchedulerOptions(4, 64, 64))
    prompt = list(range(16))
    for number, salt in enumerate(["", "", "other"]):
        request = new_request(str(number), prompt, 1, cache_salt=salt)
        scheduler.add(request)
        batch = scheduler.schedule(0)
        assert batch.num_tokens == (4 if number == 1 else 16), "one block is always computed: its logits are needed"
        compute(scheduler, batch)


def test_preemption_spares_what_a_transfer_reads() -> None:
    scheduler = Scheduler(BlockPool(5, 4), SchedulerOptions(4, 64, 64))
    first, second = new_request("a", list(range(7)), 12), new_request("b", list(range(20, 27)), 12)
    second.local.is_preemptible = False
    scheduler.add(first)
    scheduler.add(second)
    for _ in range(6):
        compute(scheduler, scheduler.schedule(0))
    assert first.local.num_preemptions >= 1
    assert second.local.num_preemptions == 0


def test_who_holds_blocks_is_not_stuck_behind_who_waits_for_them() -> None:
    scheduler = Scheduler(BlockPool(4, 4), SchedulerOptions(4, 64, 64))
    handed = new_request("handed", list(range(8)), 2)
    assert scheduler.reserve(handed)
    handed.local.num_computed_tokens = 8
    handed.output_token_ids.append(7)
    handed.advance(Phase.PREFILLING, 0)
    handed.advance(Phase.DECODING, 0)
    scheduler.add(new_request("large", list(range(30, 44))))
    scheduler.add(handed)
    compute(scheduler, scheduler.schedule(0))
    assert handed.phase is Phase.FINISHED


def test_slots_past_the_table_are_refused() -> None:
    assert slot_mapping([5, 2], 3, 6, 4) == [23, 8, 9]
    with pytest.raises(OutOfBlocks):
        slot_mapping([5, 2], 3, 9, 4)


def start_ahead(*requests: Request, num_blocks: int = 40, **options: object) -> tuple[Scheduler, list[Batch]]:
    """Returns: a scheduler of requests, those without log-probabilities sampled on the device, and two steps in flight."""
    scheduler = Scheduler(
        BlockPool(num_blocks, 4), SchedulerOptions(4, 64, **{"max_model_len": 64, **options}), is_sampled_on_device
    )
    for request in requests:
        scheduler.add(request)
    return scheduler, [launch(scheduler), launch(scheduler)]


def is_sampled_on_device(request: Request) -> bool:
    return request.sampling.logprobs is None


def launch(scheduler: Scheduler) -> Batch:
    batch = scheduler.schedule(0)
    if batch:
        scheduler.launched(batch)
    return batch


def end(scheduler: Scheduler, batch: Batch, token_id: int = 7) -> None:
    """The oldest step in flight has sampled token_id everywhere."""
    running = [s for s in batch.sequences if s.request in scheduler.running]
    scheduler.computed(running)
    for sequence in running:
        if sequence.needs_sample:
            sequence.request.output_token_ids.append(token_id)


def test_a_pending_token_is_scheduled_before_it_is_known() -> None:
    request = new_request("a", list(range(1, 6)), 3)
    scheduler, (first, second) = start_ahead(request)
    assert [(s.start, s.stop, s.num_pending, s.needs_sample) for s in first.sequences] == [(0, 5, 0, True)]
    assert [(s.start, s.stop, s.num_pending, s.needs_sample) for s in second.sequences] == [(5, 6, 1, True)]
    assert second.sequences[0].token_ids == [0]
    end(scheduler, first)
    assert (request.num_tokens, request.num_known_tokens, request.token_ids(4, 7)) == (7, 6, [5, 7, 0])
    third = launch(scheduler)
    assert [(s.start, s.stop, s.num_pending) for s in third.sequences] == [(6, 7, 1)]
    end(scheduler, second)
    assert not scheduler.schedule(0), "the pending token is its last: known beforehand"
    end(scheduler, third)
    assert request.finish_reason_after(7, 64) is not None
    assert request.num_tokens == request.num_known_tokens == 8


@pytest.mark.parametrize("why", ["context", "prefill"])
def test_an_end_that_is_known_beforehand_is_not_computed_beyond(why: str) -> None:
    request = new_request("a", list(range(5)), 9)
    request.local.ends_with_next_token = why == "prefill"
    _, (_, second) = start_ahead(request, max_model_len=6 if why == "context" else 64)
    assert not second


def test_what_is_sampled_on_the_host_takes_part_together_when_its_tokens_are_known() -> None:
    on_host = [new_request(name, [number] * 5, 9) for number, name in enumerate("ab")]
    for request in on_host:
        request.sampling = SamplingParams(max_tokens=9, logprobs=0)
    on_device = new_request("c", [9] * 5, 9)
    scheduler, (first, second) = start_ahead(on_host[0], on_device)
    assert [s.request for s in second.sequences] == [on_device]
    scheduler.add(on_host[1])
    end(scheduler, first)
    third = launch(scheduler)
    assert [s.request for s in third.sequences] == [on_host[0], on_device, on_host[1]]
    end(scheduler, second)
    fourth = launch(scheduler)
    assert [s.request for s in fourth.sequences] == [on_device]
    end(scheduler, third)
    assert [s.request for s in launch(scheduler).sequences] == [on_host[0], on_device, on_host[1]]


def test_a_newcomer_on_the_host_is_waited_for() -> None:
    early, late = new_request("early", [1] * 5, 9), new_request("late", [2] * 5, 9)
    for request in (early, late):
        request.sampling = SamplingParams(max_tokens=9, logprobs=0)
    scheduler, (first, nothing) = start_ahead(early)
    assert not nothing
    scheduler.add(late)
    second = launch(scheduler)
    assert [s.request for s in second.sequences] == [late]
    end(scheduler, first)
    assert not scheduler.schedule(0), "the two would take turns for ever"
    end(scheduler, second)
    assert [s.request for s in launch(scheduler).sequences] == [early, late]


def test_blocks_stay_held_while_a_step_may_write_into_them() -> None:
    request, other = new_request("a", list(range(5)), 9), new_request("b", list(range(20, 25)), 9)
    scheduler, (first, second) = start_ahead(request, other)
    scheduler.remove(request)
    assert scheduler.pool.counts().held == 4
    end(scheduler, first)
    assert scheduler.pool.counts().held == 4, "the second step is still in flight"
    end(scheduler, second)
    assert scheduler.pool.counts().held == 2
    assert request.output_token_ids == [] and request.num_tokens == 5


def test_only_known_tokens_are_findable() -> None:
    scheduler, (first, second) = start_ahead(new_request("a", [1, 2, 3], 9))
    end(scheduler, first)
    assert scheduler.pool.counts().cached == 0
    end(scheduler, second)
    assert scheduler.pool.counts().cached == 1
    for last, num_found in ((0, 0), (7, 1)):
        assert len(scheduler.match_prefix(new_request("b", [1, 2, 3, last, 5]))) == num_found


def test_preemption_waits_until_no_step_is_in_flight() -> None:
    first, second = new_request("a", list(range(7)), 12), new_request("b", list(range(20, 27)), 12)
    scheduler, (step, ahead) = start_ahead(first, second, num_blocks=5)
    assert len(ahead.sequences) == 2
    end(scheduler, step)
    assert not scheduler.schedule(0)
    assert scheduler.num_preemptions == 0
    second.local.prompt_logprobs.append(None)
    end(scheduler, ahead)
    assert [s.request for s in launch(scheduler).sequences] == [first]
    assert scheduler.num_preemptions == 1
    assert second.local.prompt_logprobs == [], "its prompt is computed again, and its log-probabilities with it"


def test_who_waits_for_room_is_looked_up_once() -> None:
    scheduler = Scheduler(BlockPool(4, 4), SchedulerOptions(4, 64, 64))
    first, second = new_request("a", list(range(9)), 3), new_request("b", list(range(9)), 3)
    for request in (first, second):
        scheduler.add(request)
    for _ in range(2):
        compute(scheduler, scheduler.schedule(0))
    assert second in scheduler.waiting
    assert (scheduler.num_prefix_queries, scheduler.num_prefix_hits) == (9, 0)
    for _ in range(3):
        compute(scheduler, scheduler.schedule(0))
    assert (scheduler.num_prefix_queries, scheduler.num_prefix_hits) == (18, 8)


def test_blocks_that_are_hashed_already_are_not_hashed_again() -> None:
    scheduler = Scheduler(BlockPool(40, 4), SchedulerOptions(4, 64, 64))
    for number, prompt in enumerate(([1] * 10, [2] * 10)):
        request = new_request(str(number), prompt, 4)
        request.local.block_hashes = [b"x", b"y"]  # by whoever knows them
        scheduler.add(request)
        batch = scheduler.schedule(0)
        assert batch.num_tokens == (2 + 1 if number else 10)
        compute(scheduler, batch)
    assert len(request.local.block_hashes) == 2
    for _ in range(2):
        compute(scheduler, scheduler.schedule(0))
    own = [b"x", b"y"]
    extend_hashes(own, [2, 2, 7, 7], 4, "")
    assert request.local.block_hashes == own, "a block that fills later is hashed behind the given ones"


def test_a_lone_stream_that_gives_up_its_blocks_is_computed_again_once() -> None:
    scheduler = Scheduler(
        BlockPool(4, 4), SchedulerOptions(max_num_seqs=4, max_num_batched_tokens=32, max_model_len=32)
    )
    pool, tokens = scheduler.pool, list(range(8))
    hashes: list[bytes] = []
    extend_hashes(hashes, tokens, 4, "")
    pool.make_findable(pool.allocate(1), hashes[:1])  # a transfer holds it, and another block
    pool.allocate(1)
    received = new_request("received", tokens)
    received.output_token_ids.append(8)
    received.local.block_table, received.local.num_computed_tokens = pool.allocate(2), 8
    for phase in (Phase.PREFILLING, Phase.TRANSFERRING, Phase.DECODING):
        received.advance(phase, 0)
    scheduler.add(received)
    assert [(s.start, s.stop) for s in scheduler.schedule(0).sequences] == [(4, 9)]


def test_a_prompt_that_is_alone_is_not_cut() -> None:
    """Beside another prompt, or a stream, it is."""
    options = SchedulerOptions(4, 8, 64, enable_prefix_caching=False, max_lone_prompt_tokens=24)
    for others, wanted in (([], [24, 6]), ([30], [8, 8]), ([1], [7, 8, 8, 7])):
        scheduler = Scheduler(BlockPool(60, 4), options)
        for number, length in enumerate([*others, 30]):
            scheduler.add(new_request(str(number), list(range(length)), 20))
        found = []
        while len(found) < len(wanted):
            batch = scheduler.schedule(0)
            found.append(sum(s.num_tokens for s in batch.sequences if s.num_tokens > 1))
            compute(scheduler, batch)
        assert found == wanted


@pytest.mark.parametrize(
    ("options", "sampling", "wanted"),
    [
        ({"max_lone_prompt_tokens": 8}, {}, 16),  # less than others get
        ({"max_lone_prompt_tokens": 24}, {}, 24),
        ({"max_lone_prompt_tokens": 24}, {"prompt_logprobs": 0}, 16),  # each token would be a row of logits
        ({"max_lone_prompt_tokens": 24, "enable_chunked_prefill": False}, {}, 24),
    ],
)
def test_how_many_tokens_a_prompt_that_is_alone_has(
    options: dict[str, Any], sampling: dict[str, Any], wanted: int
) -> None:
    scheduler = Scheduler(BlockPool(60, 4), SchedulerOptions(4, 16, 64, enable_prefix_caching=False, **options))
    request = new_request("r", list(range(30)))
    request.sampling = SamplingParams(max_tokens=4, **sampling)
    scheduler.add(request)
    assert scheduler.schedule(0).sequences[0].num_tokens == wanted
