"""A request plus its progress."""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence as SequenceOf

import numpy as np
from numpy.typing import NDArray

from puna.engine.adapters import LoadedAdapter
from puna.engine.draft_length import DraftLength
from puna.engine.request import ConstraintState, Event, FinishReason, PromptLogprob, Request, Timings
from puna.engine.sampler import Sampler
from puna.errors import RequestError
from puna.ops.protocol import Sampled, SamplingRow

NO_TOKEN = (
    "no token may be chosen: constraint, logit_bias, min_tokens and ignore_eos forbid all that the model scores, "
    "or its scores are not numbers (damaged weights)"
)


class Sequence:
    """Some number of tokens, of which the last ``behind`` have no keys and values yet.

    That number is all there is to prefill (many behind), decoding (one behind), a cached prefix and preemption.
    ``tokens`` (prompt, then answer) and ``blocks`` are arrays of C ints, which the runner copies at memory speed.
    The first ``num_registered`` blocks are full and known to the block pool, which shares them under an equal
    ``cache_salt``: the request's, and what the adapter contains.

    ``wants_token``: whether there is anything to sample when it has caught up. ``scores_prompt``: whether log
    probabilities of the prompt are still to be computed.
    """

    def __init__(
        self,
        request_id: int,
        request: Request,
        context_length: int,
        vocab_size: int,
        adapter: LoadedAdapter | None = None,
    ) -> None:
        """Raises RequestError when the constraint cannot start."""
        self.id = request_id
        self.request = request
        self.adapter = -1 if adapter is None else adapter.number
        self.cache_salt = f"{adapter.digest if adapter else ''}:{request.cache_salt}"
        self.tokens = array("i", request.prompt_ids)
        self.num_prompt = len(self.tokens)
        self.num_computed = 0
        self.num_registered = 0
        self.blocks = array("i")
        self.timings = Timings(prompt_tokens=self.num_prompt)
        self.draft_length = DraftLength()
        self._sampler = Sampler(request, vocab_size)
        self._constraint = request.constraint.start() if request.constraint else None
        self._stop_ids = frozenset(request.eos_ids) | frozenset(request.params.stop_token_ids)
        self.pooling = request.pooling
        self.wants_token = request.pooling is None and request.params.max_tokens != 0
        self._scored = request.params.prompt_logprobs is not None
        self.scores_prompt = self._scored and self.num_prompt > 1
        self._shifts = request.shift
        self._max_tokens = request.params.max_tokens
        self._context_length = context_length
        self._num_forgotten = 0
        self._prompt_logprobs = [PromptLogprob(self.tokens[0])]
        self._hidden_sum: NDArray[np.float64] | None = None
        self._hidden_last: NDArray[np.float32] | None = None
        self._submitted = time.perf_counter()
        self._admitted = self._answered = 0.0

    @property
    def behind(self) -> int:
        """How many tokens must be computed before the next one can be sampled."""
        return len(self.tokens) - self.num_computed

    @property
    def num_generated(self) -> int:
        return len(self.tokens) + self._num_forgotten - self.num_prompt

    @property
    def reusable(self) -> array[int]:
        """The first of its tokens, which need not be computed where their keys and values are cached.

        Never the last one, whose logits are needed.
        """
        return self.tokens[:0] if self.scores_prompt or self.pooling == "mean" else self.tokens[:-1]

    def sampling_row(self) -> SamplingRow:
        """How to choose the next token. Raises RequestError when the constraint fails."""
        allowed = self._constraint.allowed() if self._constraint else None
        return self._sampler.row(self.tokens, self.num_generated, allowed)

    def prompt_rows(self, count: int) -> list[SamplingRow]:
        """How to score the tokens after the next ``count`` to be computed, as far as they are of the prompt."""
        places = range(self.num_computed + 1, min(self.num_computed + count + 1, self.num_prompt))
        return [self._sampler.prompt_row(self.tokens[place]) for place in places]

    @property
    def longest_draft(self) -> int:
        """How many tokens may be drafted so that one more still has a place."""
        left = self._context_length - len(self.tokens)
        limit = self._max_tokens
        return (left if limit is None else min(left, limit - self.num_generated)) - 1

    @property
    def must_shift(self) -> bool:
        """Whether the context is full and older tokens make room."""
        return self._shifts and len(self.tokens) >= self._context_length

    def fork_constraint(self) -> ConstraintState | None:
        """The constraint's state, to look ahead from."""
        return self._constraint.fork() if self._constraint else None

    def row_after(self, tokens: array[int], allowed: NDArray[np.uint32] | None) -> SamplingRow:
        """How to choose the token after ``tokens``: those of the sequence and a draft."""
        return self._sampler.row(tokens, len(tokens) + self._num_forgotten - self.num_prompt, allowed)

    def ends_at(self, token: int) -> bool:
        """Whether the token would only end the answer."""
        return token in self._stop_ids

    def record_draft(self, drafted: int, accepted: int) -> None:
        """Learn how good a draft was."""
        self.timings.drafted_tokens += drafted
        self.timings.accepted_tokens += accepted
        self.draft_length.record(drafted, accepted)

    def mark_admitted(self, cached_tokens: int) -> None:
        """Note the time of the first admission; a sequence that comes back after preemption keeps its first."""
        if not self._admitted:
            self._admitted = time.perf_counter()
            self.timings.queue_seconds = self._admitted - self._submitted
            self.timings.cached_tokens = cached_tokens

    def add_prompt_logprobs(self, sampled: SequenceOf[Sampled]) -> None:
        """Take the scores of the prompt's next tokens."""
        for entry in sampled:
            token = self.tokens[len(self._prompt_logprobs)]
            self._prompt_logprobs.append(PromptLogprob(token, entry.logprob, entry.top))
        self.scores_prompt = len(self._prompt_logprobs) < self.num_prompt

    def add_hidden(self, states: NDArray[np.float32]) -> None:
        """Take the final hidden states [T, D] of the next tokens."""
        total = np.zeros(states.shape[1]) if self._hidden_sum is None else self._hidden_sum
        for state in states:  # one by one, so that the sum does not depend on how the prompt was cut
            total += state
        self._hidden_sum = total
        self._hidden_last = states[-1].copy()

    def restart(self) -> None:
        """Forget what was computed; the blocks are no longer its own."""
        del self.blocks[:]
        self.num_computed = self.num_registered = 0
        self._hidden_sum = None
        if self.scores_prompt:
            del self._prompt_logprobs[1:]

    def shift(self) -> None:
        """Forget the older half of the tokens after the first ``num_keep``."""
        keep = self.request.num_keep
        dropped = max(1, (len(self.tokens) - keep) // 2)
        del self.tokens[keep : keep + dropped]
        self._num_forgotten += dropped
        self.timings.shifts += 1

    def complete(self) -> Event:
        """The only event of a sequence that has caught up and wants no token."""
        embedding = None
        if self.pooling is not None:
            assert self._hidden_sum is not None
            mean = (self._hidden_sum / self.num_prompt).astype(np.float32)
            embedding = mean if self.pooling == "mean" else self._hidden_last
        self._mark_computed()
        scores = self._take_prompt_logprobs()
        return Event(
            self.id,
            finish_reason="length" if embedding is None else "stop",
            prompt_logprobs=scores,
            embedding=embedding,
        )

    def advance(self, sampled: Sampled) -> Event:
        """Take the next token and decide whether it is the last."""
        token = sampled.token
        if token < 0:
            return self.end("error", NO_TOKEN)
        self.timings.generated_tokens += 1
        self._mark_computed()
        scores = self._take_prompt_logprobs()
        if token in self._stop_ids:
            return Event(self.id, None, sampled.logprob, sampled.top, "stop", stop_id=token, prompt_logprobs=scores)
        self.tokens.append(token)
        reason: FinishReason | None = None
        full = len(self.tokens) >= self._context_length and not self._shifts
        if full or self.num_generated == self._max_tokens:
            reason = "length"
        if self._constraint:
            try:
                self._constraint.accept(token)
            except RequestError as error:
                return self.end("error", str(error))
            if self._constraint.complete:
                reason = "stop"
        return Event(self.id, token, sampled.logprob, sampled.top, reason, prompt_logprobs=scores)

    def end(self, reason: FinishReason, error: str | None = None) -> Event:
        """The event of an end that no token brought."""
        return Event(self.id, finish_reason=reason, error=error)

    def _take_prompt_logprobs(self) -> list[PromptLogprob] | None:
        """For the first event."""
        return self._prompt_logprobs if self._scored and self.num_generated == 0 else None

    def _mark_computed(self) -> None:
        now = time.perf_counter()
        if not self._answered:
            self._answered = now
            self.timings.prefill_seconds = now - self._admitted
        self.timings.decode_seconds = now - self._answered
