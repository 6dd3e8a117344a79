"""A request plus its progress."""

from __future__ import annotations

import time
from array import array

import numpy as np
from numpy.typing import NDArray

from puna.engine.adapters import LoadedAdapter
from puna.engine.draft_length import DraftLength
from puna.engine.request import ConstraintState, Event, FinishReason, Request, Timings
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
    """

    def __init__(
        self, request_id: int, request: Request, context_length: int, adapter: LoadedAdapter | None = None
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
        self._sampler = Sampler(request)
        self._constraint = request.constraint.start() if request.constraint else None
        self._stop_ids = frozenset(request.eos_ids) | frozenset(request.params.stop_token_ids)
        limit = request.params.max_tokens
        self._max_length = context_length if limit is None else min(context_length, self.num_prompt + limit)
        self._submitted = time.perf_counter()
        self._admitted = self._answered = 0.0

    @property
    def behind(self) -> int:
        """How many tokens must be computed before the next one can be sampled."""
        return len(self.tokens) - self.num_computed

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt

    def sampling_row(self) -> SamplingRow:
        """How to choose the next token. Raises RequestError when the constraint fails."""
        allowed = self._constraint.allowed() if self._constraint else None
        return self._sampler.row(self.tokens, self.num_generated, allowed)

    @property
    def longest_draft(self) -> int:
        """How many tokens may be drafted so that one more still has a place."""
        return self._max_length - len(self.tokens) - 1

    def fork_constraint(self) -> ConstraintState | None:
        """The constraint's state, to look ahead from."""
        return self._constraint.fork() if self._constraint else None

    def row_after(self, tokens: array[int], allowed: NDArray[np.uint32] | None) -> SamplingRow:
        """How to choose the token after ``tokens``: those of the sequence and a draft."""
        return self._sampler.row(tokens, len(tokens) - self.num_prompt, allowed)

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

    def advance(self, sampled: Sampled) -> Event:
        """Take the next token and decide whether it is the last."""
        token = sampled.token
        if token < 0:
            return self.end("error", NO_TOKEN)
        self._mark_token()
        if token in self._stop_ids:
            return Event(self.id, None, sampled.logprob, sampled.top, "stop", stop_id=token)
        self.tokens.append(token)
        reason: FinishReason | None = "length" if len(self.tokens) >= self._max_length else None
        if self._constraint:
            try:
                self._constraint.accept(token)
            except RequestError as error:
                return self.end("error", str(error))
            if self._constraint.complete:
                reason = "stop"
        return Event(self.id, token, sampled.logprob, sampled.top, reason)

    def end(self, reason: FinishReason, error: str | None = None) -> Event:
        """The event of an end that no token brought."""
        return Event(self.id, finish_reason=reason, error=error)

    def _mark_token(self) -> None:
        now = time.perf_counter()
        self.timings.generated_tokens += 1
        if not self._answered:
            self._answered = now
            self.timings.prefill_seconds = now - self._admitted
        self.timings.decode_seconds = now - self._answered
