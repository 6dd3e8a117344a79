"""A smaller model of the same vocabulary guesses (Leviathan et al. 2023, Chen et al. 2023), all in one batch."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

from puna.engine.block_pool import BlockPool
from puna.engine.runner import Runner
from puna.engine.speculation import Limits, Lookahead, Speculation
from puna.errors import RequestError

CATCH_UP = 16  # tokens; a sequence further behind drafts nothing in that step


class DraftedSequence:
    """A sequence as the draft model sees it: ``num_confirmed`` tokens that it had when it was last looked at, the
    drafted ones after them, and blocks of the draft model's cache. The draft model has no adapters.
    """

    adapter = -1

    def __init__(self) -> None:
        self.tokens = array("i")
        self.blocks = array("i")
        self.num_confirmed = 0
        self.num_computed = 0
        self.num_registered = 0


class DraftWork(NamedTuple):
    """A part of a drafting step (runner.Part)."""

    sequence: DraftedSequence
    num_tokens: int
    look: Lookahead | None
    draft: tuple[int, ...] = ()
    num_scored: int = 0

    @property
    def samples(self) -> bool:
        return self.look is not None


class ModelDrafter:
    """Runs the draft model beside the engine's, with its own blocks and prefixes, as many as the engine has.

    Each place is sampled by the same row of numbers, random number included, by which the model's own token will be
    chosen. Where the two distributions agree, so do the tokens, at any temperature.
    """

    def __init__(self, options: Speculation, limits: Limits) -> None:
        model = options.draft_model
        assert model is not None
        if model.config.vocab_size != limits.vocab_size:
            raise RequestError(
                f"the draft model must have the same vocabulary; it has {model.config.vocab_size} tokens, "
                f"the model {limits.vocab_size}"
            )
        self._pool = BlockPool(limits.num_blocks, limits.block_size)
        self._max_tokens = limits.max_batch_tokens
        self._max_length = min(limits.context_length, model.config.max_position_embeddings)
        kv = model.ops.new_kv(model.config, limits.num_blocks, limits.block_size, limits.kv_type)
        max_blocks = self._pool.blocks_for(limits.context_length)
        self._runner = Runner(model, kv, limits.max_batch_tokens, limits.max_sequences, max_blocks)
        self._sequences: dict[int, DraftedSequence] = {}

    def propose(self, lookaheads: SequenceOf[Lookahead]) -> None:
        works = self._first_works(lookaheads)
        while works:
            looks = [work.look for work in works if work.look is not None]
            chosen = self._runner.run(works, [look.rows[-1] for look in looks])
            tokens = iter(chosen)
            following = []
            for sequence, count, look, _, _ in works:
                sequence.num_computed += count
                if look is not None:
                    token = next(tokens).token
                    if token >= 0 and look.extend(token):
                        sequence.tokens.append(token)
                        following.append(DraftWork(sequence, 1, look))
            works = following

    def release(self, sequence_id: int) -> None:
        sequence = self._sequences.pop(sequence_id, None)
        if sequence is not None:
            self._pool.release(sequence.blocks)

    def check_idle(self) -> None:
        assert not self._sequences
        self._pool.check_idle()

    def _first_works(self, lookaheads: SequenceOf[Lookahead]) -> list[DraftWork]:
        """What each sequence is behind, as far as the step's tokens and the blocks last."""
        works = []
        left = self._max_tokens
        for look in lookaheads:
            length = len(look.sequence.tokens)
            look.wanted = min(look.wanted, self._max_length - length)
            if look.wanted < 1 or left == 0:
                continue
            sequence = self._follow(look)
            if not self._reserve(sequence, length + look.wanted - 1):
                self.release(look.sequence.id)
                continue
            behind = length - sequence.num_computed
            count = min(behind, left)
            left -= count
            works.append(DraftWork(sequence, count, look if behind <= min(CATCH_UP, count) else None))
        return works

    def _follow(self, look: Lookahead) -> DraftedSequence:
        """The draft model's side of a sequence, with the tokens that it has by now."""
        tokens, salt = look.sequence.tokens, look.sequence.request.cache_salt
        sequence = self._sequences.get(look.sequence.id)
        if sequence is None:
            sequence = self._sequences[look.sequence.id] = DraftedSequence()
            # The last token is never taken from the cache: its logits are needed.
            sequence.blocks.extend(self._pool.match(tokens[:-1], salt))
            sequence.num_registered = len(sequence.blocks)
            sequence.num_computed = sequence.num_registered * self._pool.block_size
        else:
            # What was computed of the last draft is kept as far as the answer went the same way.
            kept = sequence.num_confirmed
            last = min(sequence.num_computed, len(tokens) - 1)
            while kept < last and sequence.tokens[kept] == tokens[kept]:
                kept += 1
            sequence.num_computed = min(kept, last)
        sequence.tokens = tokens[:]
        sequence.num_confirmed = len(tokens)
        self._register(sequence, salt)
        return sequence

    def _reserve(self, sequence: DraftedSequence, length: int) -> bool:
        missing = self._pool.blocks_for(length) - len(sequence.blocks)
        if missing > self._pool.available:
            return False
        if missing > 0:
            sequence.blocks.extend(self._pool.allocate(missing))
        return True

    def _register(self, sequence: DraftedSequence, salt: str) -> None:
        """Offer the blocks that hold confirmed tokens to later sequences."""
        size = self._pool.block_size
        while (sequence.num_registered + 1) * size <= sequence.num_computed:
            i = sequence.num_registered
            parent = sequence.blocks[i - 1] if i else None
            sequence.blocks[i] = self._pool.register(
                sequence.blocks[i], parent, sequence.tokens[i * size : (i + 1) * size], salt
            )
            sequence.num_registered += 1
