"""Speculative decoding: several tokens of an answer in one step, none of them different.

A drafter guesses what comes next, the model computes all guesses in the one step that reads its weights, and each
place's token is chosen exactly as it would have been without (the same parameters, penalties, mask and random number).
As long as the choice is what was guessed, the next place's logits are valid too.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple, Protocol

from puna.engine.draft_length import DraftCost
from puna.engine.runner import RunnableModel
from puna.engine.scheduler import Scheduler, Work
from puna.engine.sequence import Sequence
from puna.errors import RequestError
from puna.ops.protocol import SamplingRow

DRAFTERS: dict[str, str] = {
    "ngram": "puna.engine.ngram_drafter:NgramDrafter",
    "model": "puna.engine.model_drafter:ModelDrafter",
}


@dataclass(frozen=True)
class Speculation:
    """How to speculate.

    ``drafter``: ``ngram`` proposes what followed the last few tokens when they occurred before; ``model`` asks
    ``draft_model``, a smaller one of the same vocabulary. At most ``max_tokens`` are drafted for a step, fewer or none
    where they would not pay. That needs the cost of a drafted token as a share of a step: ``token_cost``, or None to
    learn it from the time that steps take. Raises RequestError naming the field.
    """

    drafter: str = "ngram"
    max_tokens: int = 12
    token_cost: float | None = None
    draft_model: RunnableModel | None = None

    def __post_init__(self) -> None:
        if self.drafter not in DRAFTERS:
            raise RequestError(f"unknown drafter {self.drafter!r}; known: {', '.join(DRAFTERS)}")
        if self.max_tokens < 1:
            raise RequestError(f"max_tokens of a draft must be at least 1, found {self.max_tokens}")
        if self.token_cost is not None and not 0 <= self.token_cost <= 1:
            raise RequestError(f"token_cost must be a share of a step from 0 to 1, found {self.token_cost}")
        if (self.draft_model is not None) != (self.drafter == "model"):
            raise RequestError("the drafter 'model' needs a draft model, and no other has one")


class Limits(NamedTuple):
    """The engine's dimensions, and what its cache holds numbers as."""

    num_blocks: int
    block_size: int
    context_length: int
    max_batch_tokens: int
    max_sequences: int
    vocab_size: int
    kv_type: str | None


class Lookahead:
    """A draft in the making: the tokens that may follow a sequence, and how the token of each place is chosen.

    ``rows`` has one more than ``draft`` has tokens. The last one is for the place that comes next.
    """

    def __init__(self, sequence: Sequence, row: SamplingRow, wanted: int) -> None:
        self.sequence = sequence
        self.draft: list[int] = []
        self.rows = [row]
        self.wanted = wanted
        self._tokens: array[int] | None = None
        self._constraint = sequence.fork_constraint()

    def extend(self, token: int) -> bool:
        """Propose the next token; whether one more is wanted.

        One that can't follow, or that would end the answer, is not taken, and nothing more is wanted.
        """
        allowed = self.rows[-1].allowed
        if self.sequence.ends_at(token) or (allowed is not None and not allowed[token >> 5] >> (token & 31) & 1):
            return False
        mask = None
        if self._constraint is not None:
            try:
                self._constraint.accept(token)
                if self._constraint.complete:
                    return False
                mask = self._constraint.allowed()
            except RequestError:  # if the sequence comes to this place, it will meet the error itself
                return False
        if self._tokens is None:
            self._tokens = self.sequence.tokens[:]
        self._tokens.append(token)
        self.draft.append(token)
        self.rows.append(self.sequence.row_after(self._tokens, mask))
        return len(self.draft) < self.wanted

    def shorten(self, length: int) -> None:
        """Take back what is beyond that length."""
        del self.draft[length:]
        del self.rows[length + 1 :]


class Drafter(Protocol):
    """Guesses tokens. Constructed from a Speculation and the engine's Limits."""

    def propose(self, lookaheads: SequenceOf[Lookahead]) -> None:
        """Extend each by what is likely to follow, for as long as it wants more."""

    def release(self, sequence_id: int) -> None:
        """Forget a sequence that has ended."""

    def check_idle(self) -> None:
        """Assert that nothing is left of sequences that have ended."""


class Speculator:
    """Adds drafts to the works of a step, as long as they pay for themselves."""

    def __init__(self, options: Speculation, limits: Limits, scheduler: Scheduler) -> None:
        module, attribute = DRAFTERS[options.drafter].split(":")
        drafter: Any = getattr(import_module(module), attribute)
        self._drafter: Drafter = drafter(options, limits)
        self._max_tokens = options.max_tokens
        self._max_batch_tokens = limits.max_batch_tokens
        self._scheduler = scheduler
        self._cost = DraftCost(options.token_cost)

    def extend(
        self, works: SequenceOf[Work], rows: SequenceOf[SamplingRow]
    ) -> tuple[SequenceOf[Work], SequenceOf[SamplingRow]]:
        """The same works with drafts, and the rows of all that they sample. Drafts take what the step has left."""
        lookaheads = self._lookaheads(works, rows)
        if not lookaheads:
            return works, rows
        started = time.perf_counter()
        self._drafter.propose(list(lookaheads.values()))
        seconds = time.perf_counter() - started
        for look in lookaheads.values():
            look.shorten(self._scheduler.reserve_draft(look.sequence, len(look.draft)))
        drafted = sum(len(look.draft) for look in lookaheads.values())
        if not drafted:
            return works, rows
        self._cost.observe_draft(drafted, seconds)
        drafted_works, drafted_rows, plain_rows = [], [], iter(rows)
        for work in works:
            added = [next(plain_rows)] if work.samples else []
            if work.sequence.id in lookaheads:
                look = lookaheads[work.sequence.id]
                work, added = work._replace(draft=look.draft), look.rows
            drafted_works.append(work)
            drafted_rows += added
        return drafted_works, drafted_rows

    def observe(self, works: SequenceOf[Work], seconds: float) -> None:
        """Learn from the time that a step took."""
        if all(work.num_tokens == 1 for work in works):
            self._cost.observe_step(sum(1 + len(work.draft) for work in works), seconds)

    def release(self, sequence_id: int) -> None:
        """Forget a sequence that has ended."""
        self._drafter.release(sequence_id)

    def check_idle(self) -> None:
        """Assert that nothing is left of sequences that have ended."""
        self._drafter.check_idle()

    def _lookaheads(self, works: SequenceOf[Work], rows: SequenceOf[SamplingRow]) -> dict[int, Lookahead]:
        left = self._max_batch_tokens - sum(work.num_tokens for work in works)
        price = self._cost.price(len(works))
        found = {}
        plain_rows = iter(rows)
        for work in works:
            if not work.samples:
                continue
            sequence, row = work.sequence, next(plain_rows)
            if work.num_tokens > 1:  # a first token does not wait for a draft
                continue
            limit = min(self._max_tokens, sequence.longest_draft, left)
            wanted = sequence.draft_length.choose(price, limit) if limit > 0 else 0
            if wanted > 0:
                found[sequence.id] = Lookahead(sequence, row, wanted)
                left -= wanted
        return found
