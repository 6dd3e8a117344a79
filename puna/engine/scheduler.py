"""Who computes how many tokens next, and what follows from the tokens that were sampled."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

from puna.engine.block_pool import BlockPool
from puna.engine.prefix_store import PrefixStore
from puna.engine.request import Event, FinishReason
from puna.engine.sequence import Sequence
from puna.ops.protocol import Sampled


class Work(NamedTuple):
    """One sequence's part of a step: its next ``num_tokens`` tokens, and after them a draft of what may follow.

    Only a work that samples has a draft. It samples one token, and one more after each token of the draft.
    """

    sequence: Sequence
    num_tokens: int
    draft: SequenceOf[int] = ()

    @property
    def samples(self) -> bool:
        """Whether the sequence has caught up after this step, so that its next token can be sampled."""
        return self.num_tokens == self.sequence.behind


class Scheduler:
    """Continuous batching with chunked prefill, first come, first served.

    A step computes at most ``max_batch_tokens`` tokens of at most ``max_sequences`` sequences. Sequences that run come
    first; what they leave of the budget admits new ones, when there are blocks for all of their tokens. A sequence that
    gets less than it is behind has used up the budget, so it is the last one running and holds up none of the others.
    When blocks run out, the sequence that arrived last goes back to waiting and is computed again later. Everyone
    running arrived before everyone waiting.
    """

    def __init__(
        self, pool: BlockPool, max_batch_tokens: int, max_sequences: int, prefixes: PrefixStore | None = None
    ) -> None:
        assert 0 < max_sequences <= max_batch_tokens
        self.pool = pool
        self.max_batch_tokens = max_batch_tokens
        self.max_sequences = max_sequences
        self.prefixes = prefixes
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self.num_preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. All the tokens it may ever have must fit in the pool."""
        self.waiting.append(sequence)

    def schedule(self) -> list[Work]:
        """Choose the next step and reserve its blocks. Empty only when nothing runs or waits."""
        works: list[Work] = []
        budget = self.max_batch_tokens
        preemptions = self.num_preemptions
        while len(works) < len(self.running):
            sequence = self.running[len(works)]
            count = min(sequence.behind, budget)
            assert count > 0
            if not self._reserve(sequence, count):
                break
            works.append(Work(sequence, count))
            budget -= count
        if self.num_preemptions == preemptions:  # otherwise whoever has just made room would take it back
            self._admit(works, budget)
        return works

    def update(self, works: SequenceOf[Work], sampled: SequenceOf[Sampled]) -> list[Event]:
        """Account for a computed step. ``sampled`` has the entries of each work that samples, in their order."""
        events: list[Event] = []
        first = 0
        for work in works:
            sequence, samples = work.sequence, work.samples
            sequence.num_computed += work.num_tokens
            if work.draft:
                end = first + 1 + len(work.draft)
                events += self._verify(sequence, work.draft, sampled[first:end])
                first = end
            elif samples:
                events.append(sequence.advance(sampled[first]))
                first += 1
            self._register(sequence)
            if samples and events[-1].finish_reason is not None:
                self._remove(sequence)
        return events

    def reserve_draft(self, sequence: Sequence, wanted: int) -> int:
        """Blocks for as many of ``wanted`` drafted tokens as there is room for; a draft never makes others give way."""
        pool = self.pool
        room = (len(sequence.blocks) + pool.available) * pool.block_size - len(sequence.tokens)
        granted = min(wanted, room)
        missing = pool.blocks_for(len(sequence.tokens) + granted) - len(sequence.blocks)
        if missing > 0:
            sequence.blocks.extend(pool.allocate(missing))
        return granted

    def finish(self, sequence: Sequence, reason: FinishReason, error: str | None = None) -> Event:
        """End a sequence that runs or waits, and free its blocks."""
        self._remove(sequence)
        return sequence.end(reason, error)

    def _verify(self, sequence: Sequence, draft: SequenceOf[int], sampled: SequenceOf[Sampled]) -> list[Event]:
        """Take sampled tokens for as long as the draft foretold them, and the one that it did not; undo the rest."""
        events = []
        accepted = 0
        for chosen, drafted in zip(sampled, (*draft, None), strict=True):
            event = sequence.advance(chosen)
            events.append(event)
            if event.token != drafted or event.finish_reason is not None:
                break
            accepted += 1  # its key and value are in the cache already
        sequence.num_computed += accepted
        sequence.record_draft(len(draft), accepted)
        kept = self.pool.blocks_for(len(sequence.tokens))
        self.pool.release(sequence.blocks[kept:])
        del sequence.blocks[kept:]
        return events

    def _admit(self, works: list[Work], budget: int) -> None:
        pool = self.pool
        while self.waiting and budget > 0 and len(self.running) < self.max_sequences:
            sequence = self.waiting[0]
            # The last token is never taken from the cache: its logits are needed.
            reusable, salt = sequence.tokens[:-1], sequence.cache_salt
            cached = pool.match(reusable, salt)
            missing = pool.blocks_for(len(sequence.tokens)) - len(cached)
            if missing > pool.available:
                pool.release(cached)
                return
            self.waiting.popleft()
            self.running.append(sequence)
            sequence.blocks.extend(cached)
            sequence.blocks.extend(pool.allocate(missing))
            sequence.num_registered = found = len(cached)
            if self.prefixes is not None:
                found = self.prefixes.load(reusable, salt, sequence.blocks, found)
            sequence.num_computed = found * pool.block_size
            self._register(sequence)
            sequence.mark_admitted(sequence.num_computed)
            count = min(sequence.behind, budget)
            works.append(Work(sequence, count))
            budget -= count

    def _reserve(self, sequence: Sequence, count: int) -> bool:
        """Make sure of blocks for the next ``count`` tokens; False when the sequence itself had to give way."""
        missing = self.pool.blocks_for(sequence.num_computed + count) - len(sequence.blocks)
        while missing > self.pool.available:
            last = self.running.pop()
            self._free(last)
            self.waiting.appendleft(last)
            self.num_preemptions += 1
            if last is sequence:
                return False
        if missing > 0:
            sequence.blocks.extend(self.pool.allocate(missing))
        return True

    def _register(self, sequence: Sequence) -> None:
        """Offer the blocks that have become full to later requests."""
        size = self.pool.block_size
        while (sequence.num_registered + 1) * size <= sequence.num_computed:
            i = sequence.num_registered
            sequence.blocks[i] = self.pool.register(
                sequence.blocks[i],
                sequence.blocks[i - 1] if i else None,
                sequence.tokens[i * size : (i + 1) * size],
                sequence.cache_salt,
            )
            sequence.num_registered += 1

    def _remove(self, sequence: Sequence) -> None:
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
            if self.prefixes is not None:
                full = sequence.blocks[: sequence.num_registered]
                self.prefixes.save(sequence.tokens, sequence.cache_salt, full)
            self._free(sequence)

    def _free(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        del sequence.blocks[:]
        sequence.num_computed = sequence.num_registered = 0
