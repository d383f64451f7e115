"""Budgets hold, everything ends, blocks come back; with and without chunks, caches and enough memory."""

from __future__ import annotations

import random

import pytest

from fastdeploy_pd.core.batch import Batch, slot_mapping
from fastdeploy_pd.core.blocks import BlockPool
from fastdeploy_pd.core.scheduler import Scheduler, SchedulerOptions
from fastdeploy_pd.errors import OutOfBlocks
from fastdeploy_pd.request import Phase, Request, SamplingParams


def new_request(name: str, prompt: list[int], max_tokens: int = 4, **changes: object) -> Request:
    request = Request(name, prompt, SamplingParams(max_tokens=max_tokens), **changes)
    request.advance(Phase.PLACED, 0)
    request.advance(Phase.RESERVED, 0)
    return request


def compute(scheduler: Scheduler, batch: Batch) -> None:
    """What an engine does with a batch, with token 7 as every answer."""
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
            assert batch.num_tokens <= options.max_num_batched_tokens
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
