"""Blocks are conserved, shared only by equal prefixes, and never handed out twice."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fastdeploy_pd.core.blocks import BlockPool, chain_hash, extend_hashes, root_hash
from fastdeploy_pd.errors import OutOfBlocks


class PoolMachine(RuleBasedStateMachine):
    """A pool beside the simplest possible account of who holds what."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(12, 4)
        self.tables: list[list[int]] = []
        self.free = list(range(12))  # the next to be taken first
        self.content: dict[int, bytes] = {}  # what a findable block was registered as
        self.count = 0

    @rule(count=st.integers(0, 6))
    def allocate(self, count: int) -> None:
        free = self.pool.num_free
        if count > free:
            with pytest.raises(OutOfBlocks):
                self.pool.allocate(count)
            assert self.pool.num_free == free
            return
        table = self.pool.allocate(count)
        held = {b for t in self.tables for b in t}
        assert not held & set(table)
        assert table == self.free[:count]
        del self.free[:count]
        for block_id in table:
            self.content.pop(block_id, None)
        self.tables.append(table)

    @rule(which=st.integers(0, 50))
    def release(self, which: int) -> None:
        if self.tables:
            table = self.tables.pop(which % len(self.tables))
            self.pool.release(table)
            held = {b for t in self.tables for b in t}
            for block_id in reversed(table):
                if block_id not in held:
                    self.free.insert(len(self.free) if block_id in self.content else 0, block_id)

    @rule(which=st.integers(0, 50))
    def forget(self, which: int) -> None:
        if self.tables:
            table = self.tables[which % len(self.tables)]
            self.pool.forget(table)
            for block_id in table:
                self.content.pop(block_id, None)

    @rule(which=st.integers(0, 50))
    def make_findable(self, which: int) -> None:
        if self.tables:
            table = self.tables[which % len(self.tables)]
            parent = root_hash("")
            for block_id in table:
                self.count += 1
                parent = chain_hash(parent, [self.count])
                known = self.content.get(block_id)
                self.pool.make_findable([block_id], [parent])
                self.content[block_id] = known or parent

    @rule(which=st.integers(0, 50))
    def share(self, which: int) -> None:
        if self.content:
            block_id = sorted(self.content)[which % len(self.content)]
            found = self.pool.find_prefix([self.content[block_id]])
            assert found == [block_id]
            self.pool.hold(found)
            self.tables.append(found)
            if block_id in self.free:
                self.free.remove(block_id)

    @invariant()
    def conserved(self) -> None:
        counts = self.pool.counts()
        held = {b for t in self.tables for b in t}
        assert counts.free + counts.held == 12
        assert (counts.held, counts.free, self.pool.num_free) == (len(held), len(self.free), len(self.free))
        assert counts.cached == len(self.content)


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestPool = PoolMachine.TestCase


def test_misuse_is_refused() -> None:
    pool = BlockPool(4, 4)
    table = pool.allocate(2)
    pool.release(table)
    with pytest.raises(ValueError, match="more often"):
        pool.release(table)
    with pytest.raises(ValueError, match="free"):
        pool.hold(table)
    with pytest.raises(ValueError, match="free"):
        pool.make_findable(table[:1], [b"x"])


def test_salts_and_prefixes_separate_hashes() -> None:
    def hashes(tokens: list[int], salt: str) -> list[bytes]:
        found: list[bytes] = []
        extend_hashes(found, tokens, 4, salt)
        return found

    tokens = list(range(11))
    assert len(hashes(tokens, "")) == 2
    assert hashes(tokens, "a") != hashes(tokens, "b")
    assert hashes([9, *tokens[1:]], "")[1] != hashes(tokens, "")[1], "equal blocks after different prefixes differ"


def test_prefixes_outlive_their_tails() -> None:
    pool = BlockPool(4, 4)
    table = pool.allocate(3)
    for index, block_id in enumerate(table):
        pool.make_findable([block_id], [bytes([index])])
    pool.release(table)
    pool.allocate(2)  # the never used block and the tail go first
    assert pool.find_prefix([bytes([0]), bytes([1])]) == table[:2]


def test_what_is_shared_often_is_given_up_last() -> None:
    pool = BlockPool(6, 4)
    table = pool.allocate(4)
    pool.make_findable(table, [bytes([n]) for n in range(4)])
    pool.release(table)
    for _ in range(20):
        pool.hold(table[2:3])
        assert pool.num_free == 5
        pool.release(table[2:3])
        assert pool.num_free == 6
    assert pool.allocate(6) == [4, 5, table[3], table[1], table[0], table[2]]
