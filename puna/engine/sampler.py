"""From one request's parameters and progress to the row of numbers that the ops sample by."""

from __future__ import annotations

import math
from array import array

import numpy as np
from numpy.typing import NDArray

from puna.engine.request import Request
from puna.ops.protocol import SamplingRow

MASK64 = (1 << 64) - 1
NO_HISTORY = np.empty(0, np.int32)


class Sampler:
    """Makes the SamplingRow of each token of one request; keeps no state, so a token can be computed again."""

    def __init__(self, request: Request) -> None:
        params = request.params
        self._params = params
        self._stream = mix64(request.seed & MASK64)
        no_eos = dict.fromkeys(request.eos_ids, -math.inf)
        self._bias = {**params.logit_bias, **(no_eos if params.ignore_eos else {})}
        self._early_bias = {**self._bias, **no_eos, **dict.fromkeys(params.stop_token_ids, -math.inf)}
        penalised = params.repeat_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
        self._window = params.repeat_last_n if penalised else 0

    def row(self, tokens: array[int], num_generated: int, allowed: NDArray[np.uint32] | None) -> SamplingRow:
        """The row of the token after ``tokens`` (prompt and answer), of which the last ``num_generated`` are answer."""
        params = self._params
        return SamplingRow(
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            typical_p=params.typical_p,
            repeat_penalty=params.repeat_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            history=self._history(tokens),
            bias=self._early_bias if num_generated < params.min_tokens else self._bias,
            allowed=allowed,
            uniform=uniform(self._stream, num_generated),
            top_logprobs=params.top_logprobs,
        )

    def _history(self, tokens: array[int]) -> NDArray[np.int32]:
        if self._window == 0:
            return NO_HISTORY
        return np.array(tokens if self._window < 0 else tokens[-self._window :], np.int32)


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
