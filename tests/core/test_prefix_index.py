"""The index says what a pool can find, whatever was lost on the way."""

from __future__ import annotations

import random

import pytest

from fastdeploy_pd.core.blocks import BlockPool, extend_hashes
from fastdeploy_pd.core.prefix_index import KEY_BYTES, HeldBlocks, PrefixIndex

BLOCK = 4


def hashes_of(tokens: list[int], salt: str = "") -> list[bytes]:
    hashes: list[bytes] = []
    extend_hashes(hashes, tokens, BLOCK, salt)
    return hashes


def compute(pool: BlockPool, hashes: list[bytes]) -> None:
    """What a request does that computes a prompt and ends."""
    cached = pool.find_prefix(hashes)
    pool.hold(cached)
    table = cached + pool.allocate(len(hashes) - len(cached))
    pool.make_findable(table, hashes)
    pool.release(table)


@pytest.mark.parametrize("seed", range(20))
def test_index_follows_a_pool_through_lost_and_repeated_increments(seed: int) -> None:
    rng = random.Random(seed)
    pool, index = BlockPool(24, BLOCK), PrefixIndex()
    pool.listener = held = HeldBlocks()
    prompts = [[rng.randrange(4) for _ in range(rng.randint(4, 40))] for _ in range(30)]
    index.reset("i", 0, held.snapshot())
    kept: list[tuple[int, bytes, bytes]] = []
    for sequence in range(1, 200):
        for _ in range(rng.randrange(3)):
            compute(pool, hashes_of(rng.choice(prompts)))
        if rng.random() < 0.02:
            pool.forget_all()
        kept.append((sequence, *held.take_changes()))
        if rng.random() < 0.1:
            continue  # lost
        if rng.random() < 0.1:
            index.apply("i", *rng.choice(kept[:-1] or kept))  # an old one again
        if index.sequence("i") is None or not index.apply("i", *kept[-1]):
            index.reset("i", sequence, held.snapshot())
        for prompt in prompts:
            found = index.match(hashes_of(prompt), ["i", "nobody"]).get("i", 0)
            assert found == len(pool.find_prefix(hashes_of(prompt)))
        assert index.num_blocks("i") == pool.counts().cached
    index.forget("i")
    assert index.match(hashes_of(prompts[0]), ["i"]) == {}


def test_another_salt_finds_nothing() -> None:
    pool, index = BlockPool(8, BLOCK), PrefixIndex()
    pool.listener = held = HeldBlocks()
    compute(pool, hashes_of([1] * 8, "a"))
    held.take_changes()
    index.reset("i", 0, held.snapshot())
    assert index.match(hashes_of([1] * 9, "a"), ["i"]) == {"i": 2}
    assert index.match(hashes_of([1] * 9, "b"), ["i"]) == {}
    assert index.match([], ["i"]) == {}


def test_newest_blocks_are_kept_on_both_sides() -> None:
    hashes = hashes_of(list(range(40)))
    held, index = HeldBlocks(max_blocks=4), PrefixIndex(max_blocks=3)
    for block_hash in hashes[:6]:
        held.found(block_hash)
    came, went = held.take_changes()
    assert (came, went) == (b"".join(h[:KEY_BYTES] for h in hashes[2:6]), b"")
    held.found(hashes[6])
    held.gone(hashes[0])  # was not told of any more
    held.found(hashes[7])
    held.gone(hashes[7])  # came and went
    assert held.take_changes() == (hashes[6][:KEY_BYTES], hashes[2][:KEY_BYTES])
    index.reset("i", 3, came)
    assert index.num_blocks("i") == 3
    assert index.apply("i", 4, came, b"") and index.num_blocks("i") == 3


def test_what_is_not_a_whole_number_of_keys_is_refused() -> None:
    with pytest.raises(ValueError, match="bytes"):
        PrefixIndex().reset("i", 0, b"123")
