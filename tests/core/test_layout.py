"""Shards of KV heads between instances with different numbers of ranks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdeploy_pd.core.layout import KVLayout, shard, share_heads

WHOLE = KVLayout(num_layers=2, num_blocks=6, num_kv_heads=8, block_size=4, head_dim=2, dtype="float32")


def ranks(num_heads: int, num_ranks: int) -> list[KVLayout]:
    layout = KVLayout(2, 6, num_heads, 4, 2, "float32")
    return [shard(layout, rank, num_ranks) for rank in range(num_ranks)]


def heads_of_part(layout: KVLayout, parts: int, part: int) -> list[tuple[int, int]]:
    """Returns: (K or V, head of the model) in one part."""
    size = 2 * layout.num_kv_heads // parts
    if parts == 1:
        return [(k_or_v, layout.first_kv_head + h) for k_or_v in (0, 1) for h in range(layout.num_kv_heads)]
    k_or_v, first = divmod(part * size, layout.num_kv_heads)
    return [(k_or_v, layout.first_kv_head + first + h) for h in range(size)]


@given(st.sampled_from([1, 2, 4, 6, 8, 12]), st.integers(1, 24), st.integers(1, 24))
def test_each_head_of_each_target_comes_once_from_a_source_that_has_it(
    num_heads: int, num_sources: int, num_targets: int
) -> None:
    for count in (num_sources, num_targets):
        if num_heads % count and count % num_heads:
            with pytest.raises(ValueError, match="cannot be dealt out"):
                ranks(num_heads, count)
            return
    sources, targets = ranks(num_heads, num_sources), ranks(num_heads, num_targets)
    arrived: list[list[tuple[int, int]]] = [[] for _ in targets]
    for share in share_heads(sources, targets):
        source, target = sources[share.source_rank], targets[share.target_rank]
        assert source.cut(share.source_parts).block_bytes == target.cut(share.target_parts).block_bytes
        assert not source.differences(target)
        for here, there in zip(share.source_index, share.target_index, strict=True):
            moved = heads_of_part(source, share.source_parts, here)
            assert moved == heads_of_part(target, share.target_parts, there)
            arrived[share.target_rank] += moved
    for target, found in zip(targets, arrived, strict=True):
        wanted = range(target.first_kv_head, target.first_kv_head + target.num_kv_heads)
        assert sorted(found) == [(k_or_v, head) for k_or_v in (0, 1) for head in wanted]


def test_equal_ranks_send_whole_blocks() -> None:
    for share in share_heads(ranks(8, 4), ranks(8, 4)):
        assert (share.source_rank, share.source_parts, share.source_ids([5, 2])) == (share.target_rank, 1, [5, 2])


def test_ranks_with_the_same_heads_take_turns() -> None:
    assert [s.source_rank for s in share_heads(ranks(2, 4), ranks(2, 4))] == [0, 1, 2, 3]


def test_parts_are_numbered_within_their_block() -> None:
    first, second = share_heads(ranks(8, 1), ranks(8, 2))
    assert first.source_ids([0, 3]) == [0, 2, 12, 14] and first.target_ids([5, 1]) == [10, 11, 2, 3]
    assert second.source_ids([0]) == [1, 3] and second.target_ids([0]) == [0, 1]
    cut = WHOLE.cut(4)
    assert cut.offset(1, 4 * 3 + 2) == WHOLE.offset(1, 3) + 2 * cut.block_bytes and cut.pool_bytes == WHOLE.pool_bytes


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match="8 KV heads cannot be dealt out to 3 ranks"):
        shard(WHOLE, 0, 3)
    with pytest.raises(ValueError, match="cut into 7 parts"):
        WHOLE.cut(7)
    with pytest.raises(ValueError, match="KV head 4 of target rank 0 is in no source"):
        share_heads([shard(WHOLE, 0, 2)], [WHOLE])
    assert shard(WHOLE, 0, 2).differences(shard(WHOLE, 1, 2)) == ["first_kv_head: 0 != 4, and no head is in both pools"]
    assert shard(WHOLE, 0, 2).differences(shard(ranks(4, 1)[0], 0, 2)) == ["model_kv_heads: 8 != 4"]
