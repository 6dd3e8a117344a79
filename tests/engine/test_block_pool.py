"""The block pool against a simple model of itself: who holds what, and which prefix each block stands for."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from puna.engine.block_pool import BlockPool


def fill(pool: BlockPool, tokens: list[int], salt: str = "") -> list[int]:
    """Blocks for all full blocks of tokens, registered as a sequence would."""
    blocks = pool.allocate(len(tokens) // pool.block_size)
    for i in range(len(blocks)):
        part = tokens[i * pool.block_size : (i + 1) * pool.block_size]
        blocks[i] = pool.register(blocks[i], blocks[i - 1] if i else None, part, salt)
    return blocks


def test_released_content_is_found_again() -> None:
    pool = BlockPool(4, 2)
    blocks = fill(pool, [1, 2, 3, 4])
    pool.release(blocks)
    assert pool.available == 4
    assert pool.match([1, 2, 3, 4, 5]) == blocks
    assert pool.available == 2


def test_a_match_is_a_prefix_of_full_blocks() -> None:
    pool = BlockPool(4, 2)
    blocks = fill(pool, [1, 2, 3, 4])
    assert pool.match([1, 2, 3]) == blocks[:1]
    assert pool.match([1, 2, 9, 9, 3, 4]) == blocks[:1]
    assert pool.match([1]) == []
    assert pool.match([3, 4]) == []  # equal tokens after another prefix are other content


def test_salts_do_not_share() -> None:
    pool = BlockPool(4, 2)
    mine = fill(pool, [1, 2], "a")
    assert pool.match([1, 2], "b") == []
    assert pool.match([1, 2]) == []
    assert pool.match([1, 2], "a") == mine


def test_equal_content_is_kept_once() -> None:
    """Two sequences that computed the same prefix side by side end up sharing its blocks."""
    pool = BlockPool(4, 2)
    first = fill(pool, [1, 2, 3, 4])
    second = fill(pool, [1, 2, 3, 4])
    assert first == second
    assert pool.available == 2
    pool.release(first)
    assert pool.available == 2
    pool.release(second)
    assert pool.available == 4


def test_the_least_recently_used_prefix_goes_first_and_from_its_end() -> None:
    pool = BlockPool(4, 1)
    pool.release(old := fill(pool, [1, 2]))
    pool.release(new := fill(pool, [3, 4]))
    pool.release(pool.match([1, 2]))  # now the other one is the oldest
    taken = pool.allocate(1)
    assert taken == new[1:]
    assert pool.match([3, 4]) == new[:1]
    assert pool.match([1, 2]) == old


def test_blank_blocks_are_taken_before_cached_ones() -> None:
    pool = BlockPool(3, 1)
    pool.release(kept := fill(pool, [7]))
    pool.allocate(2)
    assert pool.match([7]) == kept


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (4, 1), (5, 2)])
def test_blocks_for(tokens: int, blocks: int) -> None:
    assert BlockPool(1, 4).blocks_for(tokens) == blocks


class PoolMachine(RuleBasedStateMachine):
    """Sequences come, grow, register and go in any order; a dictionary remembers what was written to each block."""

    NUM_BLOCKS, SIZE = 9, 2

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(self.NUM_BLOCKS, self.SIZE)
        self.held: list[tuple[list[int], list[int], str]] = []  # tokens, blocks, salt
        self.content: dict[int, tuple[str, tuple[int, ...]]] = {}  # block -> salt and whole prefix

    # Two token values and two salts, so that prefixes meet often.
    @rule(tokens=st.lists(st.integers(0, 1), max_size=10), salt=st.sampled_from(["", "x"]))
    def start(self, tokens: list[int], salt: str) -> None:
        blocks = self.pool.match(tokens, salt)
        for i, block in enumerate(blocks):
            assert self.content[block] == (salt, tuple(tokens[: (i + 1) * self.SIZE]))
        full = len(tokens) // self.SIZE
        if full - len(blocks) > self.pool.available:
            self.pool.release(blocks)
            return
        matched = len(blocks)
        self.take(blocks, full - matched)
        self.write(tokens, blocks, salt, matched)
        self.held.append((tokens[: full * self.SIZE], blocks, salt))

    @precondition(lambda self: self.held)
    @rule(data=st.data(), more=st.lists(st.integers(0, 1), min_size=2, max_size=2))
    def grow(self, data: st.DataObject, more: list[int]) -> None:
        tokens, blocks, salt = data.draw(st.sampled_from(self.held))
        if self.pool.available:
            self.take(blocks, 1)
            tokens += more
            self.write(tokens, blocks, salt, len(blocks) - 1)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def stop(self, data: st.DataObject) -> None:
        self.pool.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))[1])

    def take(self, blocks: list[int], count: int) -> None:
        in_use = {b for _, held, _ in self.held for b in held} | set(blocks)
        new = self.pool.allocate(count)
        assert len(set(new)) == count
        assert not in_use & set(new), "a block was handed out twice"
        for block in new:
            self.content.pop(block, None)
        blocks += new

    def write(self, tokens: list[int], blocks: list[int], salt: str, start: int) -> None:
        for i in range(start, len(blocks)):
            part = tokens[i * self.SIZE : (i + 1) * self.SIZE]
            content = (salt, tuple(tokens[: (i + 1) * self.SIZE]))
            block = self.pool.register(blocks[i], blocks[i - 1] if i else None, part, salt)
            assert self.content.setdefault(block, content) == content
            blocks[i] = block

    @invariant()
    def nothing_leaks(self) -> None:
        in_use = {b for _, held, _ in self.held for b in held}
        assert self.pool.available == self.NUM_BLOCKS - len(in_use)

    @invariant()
    def what_is_in_use_can_be_matched(self) -> None:
        """A block is never evicted before the ones that follow it, so all of a running sequence can be found."""
        for tokens, blocks, salt in self.held:
            assert self.pool.match(tokens, salt) == blocks
            self.pool.release(blocks)

    def teardown(self) -> None:
        for _, blocks, _ in self.held:
            self.pool.release(blocks)
        self.held.clear()
        assert self.pool.available == self.NUM_BLOCKS


PoolMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestPoolMachine = PoolMachine.TestCase
