"""Which block of the paged key/value cache belongs to whom, and which prefix it holds. Bookkeeping only, no arrays."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

# What identifies a block's content: the block before it (or, for a first block, the salt) and its own tokens.
Key = tuple[int | str, tuple[int, ...]]


class BlockPool:
    """Reference-counted blocks, with a trie of the prefixes they hold.

    A block is in use (one or more references), idle (no reference, but its content can be matched again until it is
    evicted, least recently used first), or blank. A sequence holds its blocks from the first on and releases them
    together, so whoever uses a block uses the one before it: a block is never evicted before those that follow it.
    A block's id therefore stands for its whole prefix, and a match compares tokens, not digests: it is exact.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks > 0
        assert block_size > 0
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._references = [0] * num_blocks
        self._blank = list(reversed(range(num_blocks)))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._by_key: dict[Key, int] = {}
        self._key_of: dict[int, Key] = {}

    @property
    def available(self) -> int:
        """How many blocks ``allocate`` could hand out."""
        return len(self._blank) + len(self._idle)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks that many tokens occupy."""
        return -(-num_tokens // self.block_size)

    def match(self, tokens: Sequence[int], salt: str = "") -> list[int]:
        """The longest registered chain of blocks that holds a prefix of ``tokens``, referenced for the caller."""
        size = self.block_size
        blocks: list[int] = []
        parent: int | str = salt
        for start in range(0, len(tokens) - size + 1, size):
            block = self._by_key.get((parent, tuple(tokens[start : start + size])))
            if block is None:
                break
            self._reference(block)
            blocks.append(block)
            parent = block
        return blocks

    def allocate(self, count: int) -> list[int]:
        """That many blocks of undefined content, each with one reference. ``count`` must not exceed ``available``."""
        assert count <= self.available
        blocks = []
        for _ in range(count):
            block = self._blank.pop() if self._blank else self._evict()
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def register(self, block: int, parent: int | None, tokens: Sequence[int], salt: str = "") -> int:
        """Record that ``block`` now holds ``tokens`` after ``parent`` (a registered block, or None at the start).

        Returns the block to use from now on. Where another one already holds the same content, that one is it: the
        caller's reference moves there and ``block`` is given back.
        """
        assert self._references[block] == 1
        assert block not in self._key_of
        assert len(tokens) == self.block_size
        key: Key = (salt if parent is None else parent, tuple(tokens))
        existing = self._by_key.get(key)
        if existing is not None:
            self._reference(existing)
            self.release([block])
            return existing
        self._by_key[key] = block
        self._key_of[block] = key
        return block

    def release(self, blocks: Iterable[int]) -> None:
        """Give up one reference to each block of a sequence, listed from its first on."""
        # From the last on, so that the ends of prefixes are evicted before what they follow.
        for block in reversed(list(blocks)):
            assert self._references[block] > 0
            self._references[block] -= 1
            if self._references[block] == 0:
                if block in self._key_of:
                    self._idle[block] = None
                else:
                    self._blank.append(block)

    def check_idle(self) -> None:
        """Assert that no block is in use and that each is either blank or holds a prefix that can be matched."""
        assert not any(self._references), f"blocks in use: {[b for b, n in enumerate(self._references) if n]}"
        assert sorted([*self._blank, *self._idle]) == list(range(self.num_blocks))
        assert self._idle.keys() == self._key_of.keys() == set(self._by_key.values())
        assert all(self._by_key[key] == block for block, key in self._key_of.items())
        assert all(isinstance(parent, str) or parent in self._idle for parent, _ in self._by_key)

    def _reference(self, block: int) -> None:
        self._references[block] += 1
        self._idle.pop(block, None)

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        del self._by_key[self._key_of.pop(block)]
        return block
