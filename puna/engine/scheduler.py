"""Who computes how many tokens next, and what follows from the tokens that were sampled."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as SequenceOf
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from puna.engine.block_pool import BlockPool
from puna.engine.fair_queue import FairQueue
from puna.engine.prefill_budget import PrefillBudget
from puna.engine.prefix_store import PrefixStore
from puna.engine.request import Event, FinishReason
from puna.engine.sequence import Sequence
from puna.ops.protocol import Sampled

SCORING_COST = 8  # tokens of the step for each prompt token that is scored


class Work(NamedTuple):
    """One sequence's part of a step: its next ``num_tokens`` tokens, and after them a draft of what may follow.

    ``samples``: the sequence has caught up after this step, so that its next token can be sampled. Only then is there a
    draft, and one more token is sampled after each of its tokens. The tokens after the first ``num_scored`` are of the
    prompt, and their log probabilities are wanted.
    """

    sequence: Sequence
    num_tokens: int
    samples: bool
    draft: SequenceOf[int] = ()
    num_scored: int = 0


class Scheduler:
    """Continuous batching with chunked prefill, fair between tenants.

    A step computes at most ``max_batch_tokens`` tokens of at most ``max_sequences`` sequences. Those that are one token
    behind come first. Prompts share what is left, those that no step can hold what PrefillBudget allows: the next
    tokens are those of the tenant that got least (FairQueue), first come, first served within a tenant. A sequence is
    admitted when there are blocks for all of its tokens. When blocks run out, the sequence that was admitted last waits
    again and is computed again later, before any new one is admitted. The one that was admitted first is never put
    back, so there is always progress.
    """

    def __init__(
        self, pool: BlockPool, max_batch_tokens: int, max_sequences: int, prefixes: PrefixStore | None = None
    ) -> None:
        assert 0 < max_sequences <= max_batch_tokens
        self.pool = pool
        self.max_batch_tokens = max_batch_tokens
        self.max_sequences = max_sequences
        self.prefixes = prefixes
        self.prefill_budget = PrefillBudget()
        self.running: list[Sequence] = []  # in the order in which they were admitted
        self.waiting = FairQueue()
        self.num_preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. All the tokens it may ever have must fit in the pool."""
        self.waiting.add(sequence)

    def schedule(self) -> list[Work]:
        """Choose the next step and reserve its blocks. Empty only when nothing runs or waits."""
        preemptions = self.num_preemptions
        works = self._decoding()
        # After a preemption none is admitted: whoever has just made room would take it back.
        self._add_prefill(works, self.max_sequences if self.num_preemptions == preemptions else 0)
        return works

    def observe(self, works: SequenceOf[Work], seconds: float) -> None:
        """Learn from the time that a step took."""
        num_decoding = num_prompt_tokens = 0
        for work in works:
            if work.num_tokens == 1:
                num_decoding += 1
            else:
                num_prompt_tokens += work.num_tokens
        self.prefill_budget.observe(num_decoding, num_prompt_tokens, seconds)

    def update(
        self,
        works: SequenceOf[Work],
        sampled: SequenceOf[Sampled],
        scored: SequenceOf[Sampled] = (),
        hidden: SequenceOf[NDArray[np.float32]] = (),
    ) -> list[Event]:
        """Account for a computed step.

        ``sampled`` begins with the entries of each work that samples, ``scored`` has those of each work's scored prompt
        tokens, ``hidden`` those of each work of a sequence with ``pooling``, all in the works' order.
        """
        events: list[Event] = []
        tokens, scores, states = iter(sampled), iter(scored), iter(hidden)
        for work in works:
            sequence = work.sequence
            num_events = len(events)
            if work.num_scored:
                sequence.add_prompt_logprobs(list(islice(scores, work.num_scored)))
            if sequence.pooling is not None:
                sequence.add_hidden(next(states))
            sequence.num_computed += work.num_tokens
            if work.draft:
                events += self._verify(sequence, work.draft, list(islice(tokens, 1 + len(work.draft))))
            elif work.samples:
                events.append(sequence.advance(next(tokens)))
            elif not sequence.behind:
                events.append(sequence.complete())
            self._register(sequence)
            if len(events) > num_events and events[-1].finish_reason is not None:
                self._remove(sequence)
            elif sequence.must_shift:
                self._shift(sequence)
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

    def _decoding(self) -> list[Work]:
        """The works of those that are one token behind."""
        works: list[Work] = []
        i = 0
        while i < len(self.running):
            sequence = self.running[i]
            if sequence.behind == 1:
                if not self._reserve(sequence, 1):
                    break
                works.append(self._work(sequence, 1))
            i += 1
        return works

    def _add_prefill(self, works: list[Work], max_sequences: int) -> None:
        """Give what the step has left to those that are further behind, and to new ones while there are places."""
        prompts = [sequence for sequence in self.running if sequence.behind > 1]
        if not (prompts or self.waiting):
            return
        left = self.max_batch_tokens - len(works)
        # A prompt of one step is over at once; cut small, it would only cost more.
        left_of_long = self.prefill_budget.tokens(len(works)) if works else left
        held: set[int] = set()
        while left > 0:
            new = self.waiting.candidates() if len(self.running) < max_sequences else []
            choices = [*prompts, *(sequence for sequence in new if sequence.id not in held)]
            if not choices:
                return
            sequence = min(choices, key=self.waiting.work)
            long = sequence.behind > self.max_batch_tokens
            if sequence in prompts:
                prompts.remove(sequence)
                if long and left_of_long <= 0:
                    continue
            elif long and left_of_long <= 0:
                held.add(sequence.id)
                continue
            else:
                admitted = self._admit(sequence)
                if admitted is None:  # its tenant's other sequences wait with it
                    held.add(sequence.id)
                    continue
                if not admitted:
                    max_sequences = 0
                    continue
            # A row of logits costs as much as several tokens, and much more memory.
            cost = SCORING_COST if sequence.scores_prompt else 1
            room = min(left, left_of_long) if long else left
            works.append(self._work(sequence, min(sequence.behind, max(1, room // cost))))
            left -= works[-1].num_tokens * cost
            left_of_long -= works[-1].num_tokens * cost if long else 0

    def _work(self, sequence: Sequence, num_tokens: int) -> Work:
        self.waiting.charge(sequence, num_tokens)
        num_scored = 0
        if sequence.scores_prompt:
            num_scored = min(num_tokens, sequence.num_prompt - 1 - sequence.num_computed)
        samples = sequence.wants_token and num_tokens == sequence.behind
        return Work(sequence, num_tokens, samples, num_scored=num_scored)

    def _admit(self, sequence: Sequence) -> bool | None:
        """Move a sequence from those that wait to those that run. False when there are not blocks enough for it,
        None when another one is about to compute what it can then take over.
        """
        pool = self.pool
        reusable, salt = sequence.reusable, sequence.cache_salt
        cached = pool.match(reusable, salt)
        missing = pool.blocks_for(len(sequence.tokens)) - len(cached)
        end = (len(cached) + 1) * pool.block_size
        soon = end <= len(reusable) and self._computed_soon(reusable[:end], salt)
        if soon or missing > pool.available:
            pool.release(cached)
            return None if soon else False
        self.waiting.take(sequence)
        self.running.append(sequence)
        sequence.blocks.extend(cached)
        sequence.blocks.extend(pool.allocate(missing))
        sequence.num_registered = found = len(cached)
        if self.prefixes is not None:
            found = self.prefixes.load(reusable, salt, sequence.blocks, found)
        sequence.num_computed = found * pool.block_size
        self._register(sequence)
        sequence.mark_admitted(sequence.num_computed)
        return True

    def _computed_soon(self, prefix: array[int], salt: str) -> bool:
        """Whether a sequence that runs begins with these full blocks and has not computed the last of them yet."""
        end = len(prefix)
        return any(
            other.num_computed < end and other.cache_salt == salt and other.tokens[:end] == prefix
            for other in self.running
        )

    def _reserve(self, sequence: Sequence, count: int) -> bool:
        """Make sure of blocks for the next ``count`` tokens; False when the sequence itself had to give way."""
        missing = self.pool.blocks_for(sequence.num_computed + count) - len(sequence.blocks)
        if missing <= 0:
            return True
        while missing > self.pool.available:
            last = self.running.pop()
            self._free(last)
            self.waiting.put_back(last)
            self.num_preemptions += 1
            if last is sequence:
                return False
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

    def _shift(self, sequence: Sequence) -> None:
        """Make room in a full context. What is left of the sequence is computed again, as after a preemption."""
        self.running.remove(sequence)
        self._free(sequence)
        sequence.shift()
        self.waiting.put_back(sequence)

    def _remove(self, sequence: Sequence) -> None:
        if sequence in self.running:
            self.running.remove(sequence)
            if self.prefixes is not None:
                full = sequence.blocks[: sequence.num_registered]
                self.prefixes.save(sequence.tokens, sequence.cache_salt, full)
            self._free(sequence)
        else:
            self.waiting.take(sequence)
        self.waiting.forget(sequence)

    def _free(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.restart()
