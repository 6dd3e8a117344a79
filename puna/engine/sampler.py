"""From one request's parameters and progress to the row of numbers that the ops sample by."""

from __future__ import annotations

import math
from array import array
from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from puna.engine.request import Request
from puna.ops.protocol import SamplingRow

MASK64 = (1 << 64) - 1


class Sampler:
    """Makes the SamplingRow of each token of one request; keeps no state, so a token can be computed again.

    ``vocab_size`` is the model's.
    """

    def __init__(self, request: Request, vocab_size: int) -> None:
        params = request.params
        self._params = params
        self._stream = mix64(request.seed & MASK64)
        no_eos = dict.fromkeys(request.eos_ids, -math.inf)
        self._bias = {**params.logit_bias, **(no_eos if params.ignore_eos else {})}
        self._early_bias = {**self._bias, **no_eos, **dict.fromkeys(params.stop_token_ids, -math.inf)}
        penalised = params.repeat_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
        self._window = params.repeat_last_n if penalised else 0
        self._vocab_size = vocab_size
        self._bad_words = [array("i", word) for word in params.bad_words_ids]
        self._allowed: NDArray[np.uint32] | None = None
        if params.allowed_token_ids is not None:
            self._allowed = token_mask(params.allowed_token_ids, vocab_size)
        self._row = SamplingRow(
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            typical_p=params.typical_p,
            repeat_penalty=params.repeat_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            bias=self._bias,
            allowed=self._allowed,
            logprob=params.logprobs,
            top_logprobs=params.top_logprobs,
        )
        self._varies = params.temperature > 0 or self._window != 0 or bool(self._bad_words)

    def row(self, tokens: array[int], num_generated: int, allowed: NDArray[np.uint32] | None) -> SamplingRow:
        """The row of the token after ``tokens`` (prompt and answer), of which the last ``num_generated`` are answer."""
        early = num_generated < self._params.min_tokens
        if not (self._varies or early or allowed is not None):
            return self._row
        bias = self._early_bias if early else self._bias
        if self._bad_words:
            bias = self._without_bad_words(tokens, num_generated, bias)
        if self._allowed is not None:
            allowed = self._allowed if allowed is None else allowed & self._allowed
        return self._row._replace(
            history=self._history(tokens), bias=bias, allowed=allowed, uniform=uniform(self._stream, num_generated)
        )

    def prompt_row(self, token: int) -> SamplingRow:
        """The row that gives a token of the prompt and its log probability: no other is allowed."""
        return SamplingRow(
            allowed=token_mask((token,), self._vocab_size), top_logprobs=self._params.prompt_logprobs or 0
        )

    def _without_bad_words(self, tokens: array[int], num_generated: int, bias: dict[int, float]) -> dict[int, float]:
        """Forbid what would complete a bad word within the answer."""
        forbidden = {}
        for word in self._bad_words:
            begun = len(word) - 1
            if begun <= num_generated and tokens[len(tokens) - begun :] == word[:-1]:
                forbidden[word[-1]] = -math.inf
        return {**bias, **forbidden} if forbidden else bias

    def _history(self, tokens: array[int]) -> NDArray[np.int32] | None:
        if self._window == 0:
            return None
        return np.array(tokens if self._window < 0 else tokens[-self._window :], np.int32)


def token_mask(tokens: Collection[int], vocab_size: int) -> NDArray[np.uint32]:
    """The bit mask of SamplingRow that allows these tokens."""
    mask = np.zeros(-(-vocab_size // 32), np.uint32)
    ids = np.fromiter(tokens, np.int64, len(tokens))
    np.bitwise_or.at(mask, ids >> 5, np.uint32(1) << (ids & 31).astype(np.uint32))
    return mask


def uniform(stream: int, index: int) -> float:
    """Number ``index`` of a random stream, in [0, 1): SplitMix64 (Steele, Lea & Flood 2014), addressed by counter.

    A token's number depends on its request's seed and its place alone, whatever else runs and however often it is
    computed again.
    """
    return (mix64((stream + (index + 1) * 0x9E3779B97F4A7C15) & MASK64) >> 11) * 2.0**-53


def mix64(z: int) -> int:
    """SplitMix64's finaliser: every bit of the result depends on every bit of ``z`` (uint64)."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    return z ^ (z >> 31)
